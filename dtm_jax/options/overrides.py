"""Set the typed options in a config, and do what follows from a typed choice.

arguments = split_arguments(sys.argv)
config = load_config(arguments.config)
problems = apply(config, arguments.typed)     # typed: [("optim.lr", "-1"), ...]
"""

import ast
from typing import Any

from ml_collections import ConfigDict

from dtm_jax.options.arguments import Typed
from dtm_jax.options.known_options import no_such_option, rule_of
from dtm_jax.options.problems import Problem
from dtm_jax.options.sections import get, parent_of, sections
from dtm_jax.options.socket_options import ALWAYS, KEPT
from dtm_jax.options.value_rules import UNITS, Rule

_KEPT_OF_MASK = ("kind", "share", "num_masked")
"""Options that every kind of mask has."""


def apply(config: ConfigDict, typed: Typed) -> list[Problem]:
  """Set the typed options in `config` in order, and return the problems of those that cannot be set.

  - Another choice of a socket starts from its own defaults: the options that the config holds for its own
    choice are dropped. Typed options stay, and so do the options of the run (`KEPT`).
  - An evaluation on the training data set also gets the typed options of `data.dataset`.
  - A duration can be typed in steps, examples or epochs. The one that is typed last wins.
  """
  asked = {key for key, _ in typed}
  typed = [*typed, *_for_evaluators(config, typed)]
  before = {section.path: section.name for section in sections(config)}
  mask_before = get(config, "mask.kind")
  problems = []
  for key, text in typed:
    if _is_choice(config, key):
      problems += _set(config, key, text)
  _drop_options_of_other_choices(config, {key for key, _ in typed}, before, mask_before)
  for key, text in typed:
    if not _is_choice(config, key):
      problems += _set(config, key, text)
      _unset_other_units(config, key)
  return [problem for problem in problems if problem.key in asked]


def parse(rule: Rule, text: str | None) -> Any:
  """Return the value that a typed text means.

  Raises:
    ValueError, KeyError: the text means no value of the rule's type.
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
  if rule.kind is int or rule.kind is float:
    return rule.kind(text)
  value = parse_literal(text)
  if rule.kind is tuple and isinstance(value, str) and rule.problem((value,)) and "," in value:
    return tuple(part.strip() for part in value.split(","))
  if rule.kind is tuple or isinstance(value, list):
    return tuple(value) if isinstance(value, tuple | list) else (value,)
  return value


def parse_literal(text: str) -> Any:
  """Return the Python literal that the text is, or else the text."""
  text = text.capitalize() if text in ("true", "false") else text
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text


def _given_twice(text: str) -> list[str]:
  """Return the keys that stand several times in the dict that the text is, also in the dicts inside it."""
  dicts = [node for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Dict)]
  keys = [[ast.unparse(key) for key in each.keys if key] for each in dicts]
  return [key for each in keys for key in dict.fromkeys(each) if each.count(key) > 1]


def _is_choice(config: ConfigDict, key: str) -> bool:
  """Return whether the option decides which other options there are."""
  if key in ("task", "mask.kind"):
    return True
  return key.endswith(".name") and any(key == f"{section.path}.name" for section in sections(config))


def _set(config: ConfigDict, key: str, text: str | None) -> list[Problem]:
  """Set one typed option. Return the problem if this is not possible."""
  shown = "" if text is None else text
  (parent, name), rule = parent_of(config, key), rule_of(config, key)
  if isinstance(get(config, key), ConfigDict):
    value = parse_literal(shown)
    if not isinstance(value, dict):
      return [Problem(key, shown, "is a section; type one of its options, or a dict in braces")]
    if twice := _given_twice(shown):
      return [Problem(key, shown, f"gives {' and '.join(twice)} twice")]
    value = ConfigDict(value)
  elif rule is None or not isinstance(parent, ConfigDict):
    return [Problem(key, shown, no_such_option(config, key))]
  else:
    try:
      value = parse(rule, text)
    except (ValueError, KeyError):
      return [Problem(key, shown, rule.expected)]
  with config.unlocked(), parent.ignore_type():
    parent[name] = value
  return []


def _drop_options_of_other_choices(
  config: ConfigDict, typed: set[str], before: dict[str, str], mask_before: str | None
) -> None:
  """Delete the options of sections that have another choice than before, except kept and typed ones."""
  for section in list(sections(config)):
    if section.name != before.get(section.path) and section.exists:
      accepted = {*section.accepted_options(), "name"}
      kept = {"name", *ALWAYS.get(section.socket, ()), *(accepted & {*KEPT[section.socket]})}
      _drop(config, section.options, section.path, kept, typed)
  mask = get(config, "mask.kind")
  if mask != mask_before and mask != "block":
    _drop(config, config.mask, "mask", set(_KEPT_OF_MASK), typed)


def _drop(config: ConfigDict, section: ConfigDict, path: str, kept: set[str], typed: set[str]) -> None:
  """Delete the options of a section that are neither kept nor typed."""
  with config.unlocked():
    for option in list(section):
      if option not in kept and not any(f"{key}.".startswith(f"{path}.{option}.") for key in typed):
        del section[option]


def _unset_other_units(config: ConfigDict, key: str) -> None:
  """Set a duration to None in the other units than the one that was typed."""
  prefix, _, unit = key.rpartition("_")
  if unit not in UNITS or get(config, key) is None:
    return
  for other in UNITS:
    parent, name = parent_of(config, f"{prefix}_{other}")
    if other != unit and name in parent:
      with parent.ignore_type():
        parent[name] = None


def _for_evaluators(config: ConfigDict, typed: Typed) -> list[tuple[str, str | None]]:
  """Return the typed options of `data.dataset` again, for the evaluators that use the same data set."""
  training, keys = get(config, "data.dataset"), {key for key, _ in typed}
  own = [(key.removeprefix("data.dataset."), text) for key, text in typed if key.startswith("data.dataset.")]
  found = []
  for name in get(config, "evals") or ():
    path = f"evals.{name}.dataset"
    dataset = get(config, path)
    same = isinstance(dataset, ConfigDict) and dataset.to_dict() == training.to_dict()
    if same and f"{path}.name" not in keys:
      found += [(f"{path}.{key}", text) for key, text in own if f"{path}.{key}" not in keys]
  return found
