"""Write the tables of the page docs/configuration.md from the code: every option of every config.

The meanings and the allowed values are those that `dtm_jax.main` checks and that its `--help` prints.
"""

import ast
import itertools
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dtm_jax import plugins
from dtm_jax.options.config_file import load_config
from dtm_jax.options.known_options import known_keys, rule_of, rule_of_choice
from dtm_jax.options.sections import NOUNS, get, section_of
from dtm_jax.options.socket_options import SOCKET_OPTIONS
from dtm_jax.options.value_rules import Rule, choice

ROOT = Path(__file__).parents[2]
MARKER = "<!-- the tables stand here -->"
TASKS = {
  "pretrain": ("Pre-training", "vitb16"),
  "finetune": ("Fine-tuning", "finetune_vitb16_in1k"),
  "segment": ("Segmentation", "seg_ade20k_vitb16"),
  "linear_probe": ("Linear probe", "linear_probe_vitb16_in1k"),
  "contrastive": ("Training a CLIP", "tiny_clip_cifar10"),
  "frozen": ("Evaluation of a frozen network", "knn_vitb16_in1k"),
  "frozen_clip": ("Evaluation of a CLIP", "zeroshot_vitb16_in1k"),
}
"""Task -> its heading, and the config whose values the tables give first."""

ABSENT = object()
Configs = dict[str, ConfigDict]


def filled_in(markdown: str) -> str:
  """Return the text of the page with the tables in place of the marker."""
  return markdown.replace(MARKER, tables())


def tables() -> str:
  """Return all tables: one chapter for each task, and one for each socket."""
  loaded = {name: load_config(str(ROOT / f"configs/{name}.py")) for name in config_names()}
  tasks = dict.fromkeys([*TASKS, *sorted(config.task for config in loaded.values())])
  chapters = [
    _chapter_of_task(task, {name: config for name, config in loaded.items() if config.task == task})
    for task in tasks
  ]
  return "\n\n".join([*chapters, *map(_chapter_of_socket, SOCKET_OPTIONS)])


def config_names() -> list[str]:
  """Return the names of the configs that can be run."""
  files = sorted((ROOT / "configs").glob("*.py"))
  return [path.stem for path in files if path.stem not in ("__init__", "common")]


def _chapter_of_task(task: str, configs: Configs) -> str:
  """Return the configs of a task and a table of options for each of their sections."""
  heading, main = TASKS.get(task, (task, next(iter(configs))))
  configs = {main: configs[main]} | configs
  lines = [f"## {heading}", ""]
  for name in configs:
    sentence = docstring(ROOT / f"configs/{name}.py").partition("\n\n")[0].replace("\n", " ")
    lines.append(f"- `configs/{name}.py`: {sentence}")
  lines += ["", f"The last column gives the value in `{main}`, then those of configs with another value."]
  keys = sorted(dict.fromkeys(key for config in configs.values() for key in known_keys(config)), key=_section)
  for section, members in itertools.groupby(keys, key=_section):
    title = f"`{section}`" if section else "The run"
    lines += ["", f"### {heading}: {title} {{#{'-'.join([task, *section.split('.')]).rstrip('-')}}}", ""]
    lines += ["| option | meaning | allowed | value |", "|---|---|---|---|"]
    lines += [_row(key, configs) for key in members]
  return "\n".join(lines)


def _section(key: str) -> str:
  """Return the heading that an option belongs to: its first part, or the first two where names are free."""
  parts = key.split(".")
  depth = 2 if parts[0] in ("evals", "morphers") else 1
  return ".".join(parts[: min(depth, len(parts) - 1)])


def _row(key: str, configs: Configs) -> str:
  """Return the line of a table for one option of a task."""
  rules = (_rule_with_choices(config, key) for config in configs.values())
  rule = next((rule for rule in rules if rule is not None), None)
  return _line(key, rule, _values(key, configs))


def _rule_with_choices(config: ConfigDict, key: str) -> Rule | None:
  """Return the rule of an option. The rule of an option that chooses a module lists the modules."""
  rule, section = rule_of(config, key), section_of(config, key)
  if key == "task":
    socket = "tasks"
  elif rule is not None and section is not None and key == f"{section.path}.name":
    socket = section.socket
  else:
    return rule
  return choice(*plugins.available(socket), about=rule.about if rule else "")


def _line(key: str, rule: Rule | None, value: str) -> str:
  """Return the line of a table, with the meaning and the allowed values of a rule."""
  about, allowed = (rule.about, _allowed(rule)) if rule else ("", "")
  return f"| `{key}` | {_escaped(about)} | {_escaped(allowed)} | {value} |"


def _allowed(rule: Rule) -> str:
  """Return the allowed values. Names of choices are set as code."""
  words = rule.allowed.removeprefix("one of ")
  if words != rule.allowed and "or a pair" not in words:
    words = ", ".join(f"`{word}`" for word in words.split(", "))
  return words + (", or `None`" if rule.optional else "")


def _values(key: str, configs: Configs) -> str:
  """Return the value in the first config, then the other values with the names of their configs."""
  names_by_value: dict[str, list[str]] = {}
  for name, config in configs.items():
    value = get(config, key, ABSENT)
    if value is not ABSENT:
      names_by_value.setdefault(_code(value), []).append(name)
  main = next(iter(configs))
  parts = [
    value if main in names else f"{value} in {', '.join(names)}" for value, names in names_by_value.items()
  ]
  return "; ".join(parts) or "not set"


def _chapter_of_socket(socket: str) -> str:
  """Return the choices of a socket, each with a table of its options."""
  noun = NOUNS[socket]
  lines = [f"## Options of each {noun} {{#{socket}}}"]
  for name in plugins.available(socket):
    sentence = docstring(ROOT / f"dtm_jax/{socket}/{name}.py").partition("\n\n")[0].replace("\n", " ")
    lines += ["", f"### {noun} `{name}` {{#{socket}-{name}}}", "", sentence, ""]
    options = plugins.options_of(socket, name)
    if not options:
      lines.append("It has no options.")
      continue
    lines += ["| option | meaning | allowed | default |", "|---|---|---|---|"]
    for option in options.values():
      default = "must be set" if option.default is None else _code(option.default)
      lines.append(_line(option.name, rule_of_choice(socket, name, option), default))
  return "\n".join(lines)


def docstring(path: Path) -> str:
  """Return the docstring of a file without importing it."""
  return ast.get_docstring(ast.parse(path.read_text())) or ""


def _code(value: Any) -> str:
  """Return a value as code for a cell of a table."""
  return f"`{_escaped(str(value) if value != '' else repr(value))}`"


def _escaped(words: str) -> str:
  return words.replace("|", "\\|")
