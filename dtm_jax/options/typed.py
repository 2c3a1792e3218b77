"""Options as users type them: the command line, the config file, and what follows from a typed choice.

arguments = split_arguments(sys.argv)
config = load_config(arguments.config)
problems = apply(config, arguments.typed)     # [("optim.lr", "-1"), ...] in the order of the command line
"""

import ast
import dataclasses
import difflib
import os
import re
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from dtm_jax import plugins
from dtm_jax.errors import NotThereError, OptionError
from dtm_jax.options import table as option_rules
from dtm_jax.options.rules import Rule, anything

UNITS = ("steps", "examples", "epochs")
"""A duration is typed in one of these; the one typed last wins."""

KEPT = {
  "teachers": ("dtype", "attention"),
  "datasets": (),
  "morphers": ("weight",),
  "evaluators": (*option_rules.SCHEDULE, "dataset", "image_size", "batch_size", "features"),
}
"""Options that belong to the run, so that they stay when another choice is typed."""

ALWAYS = {"morphers": ("weight",), "evaluators": option_rules.SCHEDULE}
"""Options of every choice of a socket, which its `build` does not see."""

WORDS = {"teachers": "teacher", "datasets": "data set", "morphers": "morpher", "evaluators": "evaluator"}

MASK_KEPT = ("kind", "share", "num_masked")
"""Options of every kind of mask."""

PLACES = {
  "teachers": (r"teacher",),
  "datasets": (r"data\.dataset", r"evals\.[^.]+\.dataset"),
  "morphers": (r"morphers\.[^.]+", r"evals\.[^.]+\.morphers\.[^.]+"),
  "evaluators": (r"evals\.[^.]+",),
}
"""The sections of a config that choose a module of a socket."""

Typed = Sequence[tuple[str, str | None]]
"""(key, text) in the order of the command line; the text of a flag without "=" is None."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """Something that is wrong with one option: the key, its value, and what is allowed."""

  key: str
  value: Any
  text: str

  def __str__(self) -> str:
    shown = self.value if isinstance(self.value, str) else repr(self.value)
    return f"--config.{self.key}{'=' if shown else ''}{shown}: {self.text}."


@dataclasses.dataclass(frozen=True)
class Arguments:
  """A command line: the config's file, the typed options in order, and all other arguments."""

  config: str | None
  typed: Typed
  rest: list[str]


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the config that chooses a module of a socket, such as "evals.knn.dataset"."""

  path: str
  socket: str
  name: str
  options: ConfigDict


def split_arguments(argv: Sequence[str]) -> Arguments:
  """Take `--config FILE`, `--config.KEY=VALUE`, `--config.KEY VALUE` and `--noconfig.KEY` out of `argv`.

  Raises:
    OptionError: --config is given twice or without a file.
  """
  config, typed, rest = None, [], list(argv[:1])
  words = list(argv[1:])
  while words:
    word = words.pop(0)
    if word == "--":
      rest += [word, *words]
      break
    name, equals, value = word.partition("=")
    flag = name.lstrip("-") if name.startswith("-") else ""
    if flag == "config":
      value = value if equals else words.pop(0) if words else ""
      if config is not None:
        raise OptionError(f"--config is given twice: {config} and {value}.")
      config = value
    elif flag.startswith("noconfig."):
      typed.append((flag.removeprefix("noconfig."), "False"))
    elif flag.startswith("config."):
      alone = not equals and (not words or words[0].startswith("--"))
      typed.append((flag.removeprefix("config."), value if equals else None if alone else words.pop(0)))
    else:
      rest.append(word)
  return Arguments(config, typed, rest)


def load_config(path: str) -> ConfigDict:
  """Return what `get_config()` of the file returns; "FILE:TEXT" passes the text to it.

  Raises:
    NotThereError: there is no such file.
    OptionError: it is no config. An error in the file's own code keeps the file and the line.
  """
  file, _, text = (path, "", "") if os.path.exists(path) else path.partition(":")
  if not os.path.isfile(file):
    raise NotThereError(f"--config={path}: there is no such file.{_configs_near(file)}")
  module = types.ModuleType("config")
  module.__file__ = file
  sys.path.insert(0, os.getcwd())  # for `from configs import ...`, also where the package is installed
  try:
    with open(file, encoding="utf-8") as opened:
      exec(compile(opened.read(), file, "exec"), module.__dict__)
    if not callable(getattr(module, "get_config", None)):
      raise OptionError(f"--config={path}: the file has no function get_config().")
    config = module.get_config(*([text] if text else []))
  except OptionError:
    raise
  except Exception as error:
    lines = traceback.format_exception(error)
    own = [line for line in lines[1:] if __file__ not in line]
    raise OptionError(f"--config={path}: the file raises an error.\n{''.join(own).rstrip()}") from error
  finally:
    sys.path.remove(os.getcwd())
  if not isinstance(config, ConfigDict):
    raise OptionError(f"--config={path}: get_config() returns {type(config).__name__}, not a ConfigDict.")
  return config.lock()


def _configs_near(file: str) -> str:
  folder = os.path.dirname(file) or "."
  if not os.path.isdir(folder):
    folder = "configs"
  present = (
    sorted(name for name in os.listdir(folder) if name.endswith(".py")) if os.path.isdir(folder) else []
  )
  near = difflib.get_close_matches(os.path.basename(file), present, n=3, cutoff=0.3)
  return f" Nearest: {', '.join(os.path.join(folder, name) for name in near)}." if near else ""


def apply(config: ConfigDict, typed: Typed) -> list[Problem]:
  """Set the typed options in `config`, in order, and return those that cannot be set.

  - Another choice of a socket starts from its own defaults: what the config holds for its default choice is
    dropped. What was typed stays, and so do the options of the run (`KEPT`).
  - An evaluation on the training's data set follows what is typed of `data.dataset`.
  - Of the spellings of a duration (steps, examples, epochs) the one that is typed last wins.
  """
  asked = {key for key, _ in typed}
  typed = [*typed, *_followers(config, typed)]
  keys = {key for key, _ in typed}
  problems = []
  before = {section.path: section.name for section in sections(config)} | {"mask": _mask_kind(config)}
  for key, text in typed:
    if _is_choice(config, key):
      problems += _set(config, key, text)
  for section in list(sections(config)):
    if section.name != before.get(section.path) and _base(section.name) in plugins.available(section.socket):
      accepted = {*options_of(section), "name"}
      kept = {"name", *ALWAYS.get(section.socket, ()), *(accepted & {*KEPT[section.socket]})}
      _drop(config, section.options, section.path, kept, keys)
  if _mask_kind(config) != before["mask"] and _mask_kind(config) != "block":
    _drop(config, config.mask, "mask", set(MASK_KEPT), keys)
  for key, text in typed:
    if not _is_choice(config, key):
      problems += _set(config, key, text)
      _forget_other_spellings(config, key)
  return [problem for problem in problems if problem.key in asked]


def sections(config: ConfigDict) -> Iterator[Section]:
  """All parts of the config that choose a module of a socket."""
  for path in dotted_keys(config, sections=True):
    section = section_of(config, f"{path}.name")
    if section is not None and section.path == path:
      yield section


def options_of(section: Section) -> dict[str, plugins.Option]:
  """The options of a section's choice, by name; none if there is no such choice."""
  name = _base(section.name)
  return plugins.options_of(section.socket, name) if name in plugins.available(section.socket) else {}


def section_of(config: ConfigDict, key: str) -> Section | None:
  """The innermost section of a socket that the option `key` is in."""
  parts = key.split(".")
  lengths = {"teacher": (1,), "data": (2,), "morphers": (2,), "evals": (4, 3, 2)}.get(parts[0], ())
  for path in (".".join(parts[:length]) for length in lengths if length < len(parts)):
    for socket, pattern in PLACES.items():
      if any(re.fullmatch(each, path) for each in pattern):
        return next(_section(config, path, socket), None)
  return None


def rule_of(config: ConfigDict, key: str) -> Rule | None:
  """The rule of the option `key`, such as "optim.lr", in this config; None if there is no such option."""
  section = section_of(config, key)
  if section is not None:
    return _socket_rule(section, key.removeprefix(f"{section.path}."))
  task_rules = option_rules.TASK_RULES.get(config.get("task"), {})
  return {**option_rules.COMMON, **task_rules}.get(key)


def _socket_rule(section: Section, option: str) -> Rule | None:
  if option == "name":
    return option_rules.text(f"which of dtm_jax/{section.socket}")
  rules = option_rules.SOCKET_RULES[section.socket]
  at_top = section.socket != "morphers" or section.path.startswith("morphers.")
  if option in ALWAYS.get(section.socket, ()) and at_top:
    return rules[option]
  if _base(section.name) not in plugins.available(section.socket):
    return anything()  # the unknown name is what is reported
  if option not in options_of(section):
    return None
  rule = rules.get(f"{section.name}/{option}", rules.get(option))
  return rule or option_rules.of_annotation(options_of(section)[option].annotation)


def no_such_option(config: ConfigDict, key: str) -> str:
  """Say that there is no such option, and which there are."""
  section = section_of(config, key)
  if section is None or _base(section.name) not in plugins.available(section.socket):
    own = [known for known in known_keys(config) if rule_of(config, known)]
    return f"there is no such option for the task {config.get('task')!r}. Nearest: {nearest(key, own)}"
  option = key.removeprefix(f"{section.path}.")
  options = [*options_of(section), *ALWAYS.get(section.socket, ())]
  near = difflib.get_close_matches(option, options, n=1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  words = WORDS[section.socket]
  return f"{words} {section.name!r} has no option {option!r}.{hint} Its options: {', '.join(options)}"


def known_keys(config: ConfigDict) -> list[str]:
  """The keys of all options that this config has, or could have."""
  keys = dict.fromkeys(dotted_keys(config))
  for section in sections(config):
    keys |= dict.fromkeys(f"{section.path}.{option}" for option in options_of(section))
  parents = {*dotted_keys(config, sections=True), ""}
  rules = option_rules.COMMON | option_rules.TASK_RULES.get(config.get("task"), {})
  return list(keys | dict.fromkeys(key for key in rules if key.rpartition(".")[0] in parents))


def nearest(key: str, known: Sequence[str]) -> str:
  """The keys that are spelt most like `key`, as users type them."""
  near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
  same_option = [each for each in known if each.rpartition(".")[2] == key.rpartition(".")[2]]
  near = list(dict.fromkeys([*near, *same_option[:2]])) or list(known)
  return ", ".join(f"--config.{each}" for each in near)


def dotted_keys(config: ConfigDict, prefix: str = "", *, sections: bool = False) -> Iterator[str]:
  """The keys of all options of the config ("optim.lr"), or of its sections ("optim")."""
  for name in config:
    value = config.get(name)
    is_section = isinstance(value, ConfigDict)
    if is_section == sections:
      yield prefix + name
    if is_section:
      yield from dotted_keys(value, f"{prefix}{name}.", sections=sections)


def get(config: ConfigDict, key: str, default: Any = None) -> Any:
  """The value at a dotted key, or `default` if there is none."""
  for name in key.split(".") if key else ():
    if not isinstance(config, ConfigDict) or name not in config:
      return default
    config = config.get(name)
  return config


def parse(rule: Rule, text: str | None) -> Any:
  """The value that a typed text stands for.

  Raises:
    ValueError: it does not stand for a value of the rule's type.
  """
  if text is None:
    if rule.kind not in (bool, object):
      raise ValueError("no value")
    return True
  if rule.optional and text == "None":
    return None
  if rule.kind is str:
    return text
  if rule.kind is bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
  if rule.kind in (int, float):
    return rule.kind(text)
  value = _literal(text)
  if rule.kind is tuple or isinstance(value, list):
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
  return value


def _literal(text: str) -> Any:
  text = text.capitalize() if text in ("true", "false") else text
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text


def _set(config: ConfigDict, key: str, text: str | None) -> list[Problem]:
  """Set one typed option; the problem, if that cannot be done."""
  shown = "" if text is None else text
  parent_key, _, name = key.rpartition(".")
  parent, rule = get(config, parent_key) if parent_key else config, rule_of(config, key)
  if isinstance(get(config, key), ConfigDict):
    value = _literal(shown)
    if not isinstance(value, dict):
      return [Problem(key, shown, "is a section; type one of its options, or a dict in braces")]
    value = ConfigDict(value)
  elif rule is None or not isinstance(parent, ConfigDict):
    return [Problem(key, shown, no_such_option(config, key))]
  else:
    try:
      value = parse(rule, text)
    except (ValueError, KeyError):
      return [Problem(key, shown, f"must be {rule.allowed}" + (", or None" if rule.optional else ""))]
  with config.unlocked(), parent.ignore_type():
    parent[name] = value
  return []


def _drop(config: ConfigDict, section: ConfigDict, path: str, kept: set[str], typed: set[str]) -> None:
  """Delete the options of a section that are neither kept nor typed."""
  with config.unlocked():
    for option in list(section):
      if option not in kept and not any(f"{key}.".startswith(f"{path}.{option}.") for key in typed):
        del section[option]


def _forget_other_spellings(config: ConfigDict, key: str) -> None:
  prefix, _, unit = key.rpartition("_")
  if unit not in UNITS or get(config, key) is None:
    return
  for other in UNITS:
    parent_key, _, name = f"{prefix}_{other}".rpartition(".")
    parent = get(config, parent_key) if parent_key else config
    if other != unit and name in parent:
      with parent.ignore_type():
        parent[name] = None


def _followers(config: ConfigDict, typed: Typed) -> list[tuple[str, str | None]]:
  """What is typed of `data.dataset`, for the evaluators that use the same data set."""
  training, keys = get(config, "data.dataset"), {key for key, _ in typed}
  mine = [(key.removeprefix("data.dataset."), text) for key, text in typed if key.startswith("data.dataset.")]
  followers = []
  for evaluator in _names(config, "evals"):
    path = f"evals.{evaluator}.dataset"
    theirs = get(config, path)
    if (
      isinstance(theirs, ConfigDict) and theirs.to_dict() == training.to_dict() and f"{path}.name" not in keys
    ):
      followers += [(f"{path}.{key}", text) for key, text in mine if f"{path}.{key}" not in keys]
  return followers


def _is_choice(config: ConfigDict, key: str) -> bool:
  return key in ("task", "mask.kind") or (
    key.endswith(".name") and any(key == f"{section.path}.name" for section in sections(config))
  )


def _mask_kind(config: ConfigDict) -> str | None:
  return get(config, "mask.kind")


def _base(name: Any) -> str:
  return str(name).partition("/")[0]


def _names(config: ConfigDict, key: str) -> list[str]:
  section = get(config, key)
  return [name for name in section if isinstance(section.get(name), ConfigDict)] if section else []


def _section(config: ConfigDict, path: str, socket: str) -> Iterator[Section]:
  options = get(config, path)
  if isinstance(options, ConfigDict):
    yield Section(path, socket, options.get("name", path.rpartition(".")[2]), options)
