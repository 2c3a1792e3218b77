"""Sockets: a folder of modules, one kind of thing each, chosen by name in the config.

`load("teachers", "clip")` is `import dtm_jax.teachers.clip`. A new teacher is one new file.
"""

import difflib
import importlib
import pkgutil
from types import ModuleType
from typing import Any

SOCKETS = ("datasets", "evaluators", "morphers", "tasks", "teachers")


def available(socket: str) -> list[str]:
  """The names that `load(socket, ...)` knows, sorted. Modules whose name starts with _ are private."""
  if socket not in SOCKETS:
    raise ValueError(f"Unknown socket {socket!r}. Available sockets are: {', '.join(SOCKETS)}.")
  folder = importlib.import_module(f"dtm_jax.{socket}").__path__
  return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def load(socket: str, name: str) -> ModuleType:
  """The module `dtm_jax.<socket>.<name>`.

  Raises:
    ValueError: there is no such module; the message lists those that exist.
  """
  names = available(socket)
  if name not in names:
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Unknown name {name!r} in {socket}.{hint} Available: {', '.join(names)}.")
  return importlib.import_module(f"dtm_jax.{socket}.{name}")


def build(socket: str, options: Any, *, function: str = "build", **more: Any) -> Any:
  """`load(socket, options["name"]).build(...)`, or another `function`, with the other options and `more`.

  What follows a slash in the name is the option `variant`: "tfds/cifar100".
  """
  name, _, variant = options["name"].partition("/")
  keywords = {option: value for option, value in options.items() if option != "name"}
  if variant:
    keywords["variant"] = variant
  return getattr(load(socket, name), function)(**keywords, **more)
