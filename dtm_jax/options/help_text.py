"""Write the text of `--help` for 80 columns: the options of a config, or the shipped configs."""

import ast
import itertools
import os
import textwrap
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from dtm_jax import plugins
from dtm_jax.options.reference import LEFT_OUT, Option, options_of_config
from dtm_jax.options.sections import get

WIDTH = 80
_MEANING = " " * 6
"""Indent of the lines about an option. The option itself is indented by two."""


def paragraph(text: str, indent: str = _MEANING) -> str:
  """Return the text in lines of at most `WIDTH` columns.

  A word that is too long for the indent stands without it. Only a word longer than `WIDTH` makes a longer
  line.
  """
  wrapper = textwrap.TextWrapper(WIDTH, indent, indent, break_long_words=False, break_on_hyphens=False)
  return "\n".join(line if len(line) <= WIDTH else line.strip() for line in wrapper.wrap(text))


def config_help(config: ConfigDict) -> str:
  """Return the options of a config by section, each with its value, its meaning and what is allowed."""
  lines = []
  for section, options in itertools.groupby(options_of_config(config), lambda option: option.section):
    choice = get(config, f"{section}.name" if section else "task")
    name = f"{section or 'run'} ({choice})" if choice else section
    lines += ["", name, *map(_option_help, options)]
  return "\n".join(lines[1:])


def configs_help(folder: str | None = None) -> str:
  """Return the configs of a folder, each with the start of its docstring; "" without configs.

  Args:
    folder: by default ./configs, or else the folder beside the package.
  """
  beside_package = os.path.join(os.path.dirname(plugins.PACKAGE), "configs")
  folder = folder or next(filter(os.path.isdir, ("configs", beside_package)), "configs")
  lines = [f"  {path}\n{paragraph(doc)}" for path, doc in _configs_in(folder)]
  return "\n".join([f"Configs in {folder}:", *lines]) if lines else ""


def _option_help(option: Option) -> str:
  flag, value = f"  --config.{option.key}", _shown(option.value)
  if option.value is LEFT_OUT:
    first = flag
  elif len(flag) + len(value) < WIDTH:
    first = f"{flag}={value}"
  else:
    first = f"{flag}=\n{paragraph(value)}"
  facts = [option.meaning, f"{_type_and_choices(option)}."]
  if option.value is LEFT_OUT:
    facts.append(f"Default: {option.default}." if option.default else "Not set.")
  return f"{first}\n{paragraph(' '.join(facts))}"


def _type_and_choices(option: Option) -> str:
  """Return such as "Number of at least 0, or None", or "One of cosine, linear"."""
  allowed = option.allowed.removeprefix("a ").removesuffix(" that is not empty")
  if option.choices and allowed == "text":  # the files of a folder
    allowed = f"one of {', '.join(option.choices)}"
  none = ", or None" if option.type.endswith("or None") else ""
  return allowed[:1].upper() + allowed[1:] + none


def _shown(value: Any) -> str:
  return value if isinstance(value, str) else repr(value)


def _configs_in(folder: str) -> Iterator[tuple[str, str]]:
  """Yield the path of each config of a folder and the start of its docstring. No config is run."""
  for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
    path = os.path.join(folder, name)
    if not name.endswith(".py"):
      continue
    with open(path, encoding="utf-8") as file:
      module = ast.parse(file.read())
    if any(isinstance(node, ast.FunctionDef) and node.name == "get_config" for node in module.body):
      yield path, (ast.get_docstring(module) or "No docstring.").partition("\n\n")[0]
