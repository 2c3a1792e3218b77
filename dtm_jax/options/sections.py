"""Read the parts of a config: values at dotted keys, and the sections that choose a module of a socket.

get(config, "optim.lr")                                      # 0.0015
[section.path for section in sections(config)]               # ["teacher", "data.dataset", "evals.knn"]
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from dtm_jax import plugins
from dtm_jax.signatures import Parameter

NOUNS = {"teachers": "teacher", "datasets": "data set", "morphers": "morpher", "evaluators": "evaluator"}
"""The word that messages use for a choice of each socket."""

_PLACES = {
  "teachers": (r"teacher",),
  "datasets": (r"data\.dataset", r"evals\.[^.]+\.dataset"),
  "morphers": (r"morphers\.[^.]+", r"evals\.[^.]+\.morphers\.[^.]+"),
  "evaluators": (r"evals\.[^.]+",),
}
"""Patterns of the sections that choose a module of each socket."""

_DEPTHS = {"teacher": (1,), "data": (2,), "morphers": (2,), "evals": (4, 3, 2)}
"""First part of a key -> how many parts the path of such a section can have, the largest number first."""


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the config that chooses a module of a socket.

  Attributes:
    path: its dotted key, such as "evals.knn.dataset".
    socket: such as "datasets".
    name: the choice, such as "cifar10" or "tfds/cifar100".
    options: the part itself, with its name.
  """

  path: str
  socket: str
  name: str
  options: ConfigDict

  @property
  def module(self) -> str:
    """The name of the module: the choice without its variant."""
    return str(self.name).partition("/")[0]

  @property
  def exists(self) -> bool:
    """Whether the socket has such a module."""
    return self.module in plugins.available(self.socket)

  def accepted_options(self) -> dict[str, Parameter]:
    """Return the options of the choice by name; none if there is no such module."""
    return plugins.options_of(self.socket, self.module) if self.exists else {}


def get(config: ConfigDict, key: str, default: Any = None) -> Any:
  """Return the value at a dotted key, or `default` if there is none. The empty key means the config."""
  for name in key.split(".") if key else ():
    if not isinstance(config, ConfigDict) or name not in config:
      return default
    config = config.get(name)
  return config


def parent_of(config: ConfigDict, key: str) -> tuple[Any, str]:
  """Return the section that holds a dotted key (None if there is none), and the last part of the key."""
  parent, _, name = key.rpartition(".")
  return get(config, parent), name


def dotted_keys(config: ConfigDict, prefix: str = "", *, sections: bool = False) -> Iterator[str]:
  """Yield the keys of all options of the config ("optim.lr"); `sections` yields its sections ("optim")."""
  for name in config:
    value = config.get(name)
    is_section = isinstance(value, ConfigDict)
    if is_section == sections:
      yield prefix + name
    if is_section:
      yield from dotted_keys(value, f"{prefix}{name}.", sections=sections)


def sections(config: ConfigDict) -> Iterator[Section]:
  """Yield all sections that choose a module of a socket."""
  for path in dotted_keys(config, sections=True):
    section = section_of(config, f"{path}.name")
    if section is not None and section.path == path:
      yield section


def section_of(config: ConfigDict, key: str) -> Section | None:
  """Return the innermost section of a socket that holds the option `key`, or None."""
  parts = key.split(".")
  for path in (".".join(parts[:depth]) for depth in _DEPTHS.get(parts[0], ()) if depth < len(parts)):
    for socket, patterns in _PLACES.items():
      if any(re.fullmatch(pattern, path) for pattern in patterns):
        options = get(config, path)
        if not isinstance(options, ConfigDict):
          return None
        return Section(path, socket, options.get("name", path.rpartition(".")[2]), options)
  return None
