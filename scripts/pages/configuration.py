"""Write the tables of the page docs/configuration.md from the code: every option of every config.

`dtm_jax.options.reference` gives the meanings, types and defaults, as it does for `--help`.
"""

import ast
import contextlib
import itertools
from pathlib import Path

from ml_collections import ConfigDict

from dtm_jax import plugins
from dtm_jax.options.config_file import load_config
from dtm_jax.options.reference import LEFT_OUT, Option, all_options, options_of_config
from dtm_jax.options.sections import NOUNS

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
"""Task -> its heading, and the config with the values that the tables give first."""

HEAD = ["| option | meaning | type and allowed values | {} |", "|---|---|---|---|"]
Options = dict[str, dict[str, Option]]
"""The options of each config by key."""


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
  return "\n\n".join([*chapters, *map(_chapter_of_socket, NOUNS)])


def config_names() -> list[str]:
  """Return the names of the configs that can be run."""
  files = sorted((ROOT / "configs").glob("*.py"))
  return [path.stem for path in files if path.stem not in ("__init__", "common")]


def _chapter_of_task(task: str, configs: dict[str, ConfigDict]) -> str:
  """Return the configs of a task and a table of options for each of their sections."""
  heading, main = TASKS.get(task, (task, next(iter(configs))))
  configs = {main: configs[main]} | configs
  lines = [f"## {heading}", ""]
  lines += [f"- `configs/{name}.py`: {_first_sentence(ROOT / f'configs/{name}.py')}" for name in configs]
  lines += ["", f"The last column gives the value in `{main}`, then those of configs with another value."]
  options = {
    name: {option.key: option for option in options_of_config(config)} for name, config in configs.items()
  }
  keys = sorted(dict.fromkeys(key for found in options.values() for key in found), key=_section)
  for section, members in itertools.groupby(keys, key=_section):
    title = f"`{section}`" if section else "The run"
    anchor = "-".join([task, *section.split(".")]).rstrip("-")
    lines += ["", f"### {heading}: {title} {{#{anchor}}}", "", HEAD[0].format("value"), HEAD[1]]
    lines += [_line_of_task(key, options) for key in members]
  return "\n".join(lines)


def _section(key: str) -> str:
  """Return the heading that an option belongs to: its first part, or the first two where names are free."""
  parts = key.split(".")
  depth = 2 if parts[0] in ("evals", "morphers") else 1
  return ".".join(parts[: min(depth, len(parts) - 1)])


def _line_of_task(key: str, options: Options) -> str:
  """Return the line of a table for one option of a task, with its values in the configs."""
  found = {name: by_key[key] for name, by_key in options.items() if key in by_key}
  main, option = next(iter(options)), next(iter(found.values()))
  names_by_value: dict[str, list[str]] = {}
  for name, each in found.items():
    if each.value is not LEFT_OUT:
      names_by_value.setdefault(repr(each.value), []).append(name)
  parts = [""]
  for value, names in names_by_value.items():
    if main in names:
      parts[0] = _code(value)
    elif value != option.default:
      parts.append(f"{_code(value)} in {', '.join(names)}")
  if not parts[0] and option.default:
    parts[0] = f"default {_code(option.default)}"
  return _line(key, option, "; ".join(filter(None, parts)) or "not set")


def _chapter_of_socket(socket: str) -> str:
  """Return the choices of a socket, each with a table of its options."""
  noun = NOUNS[socket]
  by_title, lines = all_options(), [f"## Options of each {noun} {{#{socket}}}"]
  for name in plugins.available(socket):
    lines += ["", f"### {noun.capitalize()} `{name}` {{#{socket}-{name}}}", ""]
    lines += [_first_sentence(ROOT / f"dtm_jax/{socket}/{name}.py"), ""]
    options = by_title[f"{noun.capitalize()} {name}"]
    lines += [HEAD[0].format("default"), HEAD[1]] if options else ["It has no options."]
    for option in options:
      default = _code(option.default) if option.default else "must be set"
      lines.append(_line(option.key.rpartition(".")[2], option, default))
  return "\n".join(lines)


def _line(key: str, option: Option, value: str) -> str:
  """Return the line of a table."""
  return f"| `{key}` | {_escaped(option.meaning)} | {_allowed(option)} | {value} |"


def _allowed(option: Option) -> str:
  """Return the type and the allowed values of an option. Names of choices are set as code."""
  only_names = option.choices and "or a pair" not in option.allowed
  words = ", ".join(f"`{name}`" for name in option.choices) if only_names else _escaped(option.allowed)
  return words + (", or `None`" if option.type.endswith("or None") else "")


def _first_sentence(path: Path) -> str:
  """Return the first paragraph of the docstring of a file, which is not imported."""
  text = ast.get_docstring(ast.parse(path.read_text())) or ""
  return text.partition("\n\n")[0].replace("\n", " ")


def _code(value: str) -> str:
  """Return a value as users type it, set as code. The argument is the value as Python code."""
  with contextlib.suppress(ValueError, SyntaxError):
    parsed = ast.literal_eval(value)
    value = parsed or value if isinstance(parsed, str) else value
  return f"`{_escaped(value)}`"


def _escaped(words: str) -> str:
  return words.replace("|", "\\|")
