"""Load the choices of a config by name from the sockets, the folders with one module for each choice.

`load("teachers", "clip")` is `import dtm_jax.teachers.clip`, so a new teacher is one new file. A module with
a name that starts with _ is a helper and not a choice.
"""

import difflib
import functools
import importlib
import pathlib
import pkgutil
from types import ModuleType
from typing import Any

from dtm_jax.devices import resolved
from dtm_jax.errors import OptionError, check_choice
from dtm_jax.signatures import Parameter, parameters_in_source, parameters_of

SOCKETS = ("datasets", "evaluators", "morphers", "tasks", "teachers")
PACKAGE = pathlib.Path(__file__).parent

GIVEN = {
  "datasets": ("split",),
  "evaluators": ("self", "context"),
}
"""Parameters that the caller passes. They are not options of the config."""


def available(socket: str) -> list[str]:
  """Return the names that `load(socket, ...)` knows, sorted. Nothing is imported.

  Raises:
    OptionError: there is no such socket.
  """
  check_choice("socket", socket, SOCKETS)
  return list(_names(socket))


@functools.cache
def _names(socket: str) -> tuple[str, ...]:
  names = (module.name for module in pkgutil.iter_modules([str(PACKAGE / socket)]))
  return tuple(sorted(name for name in names if not name.startswith("_")))


def require_name(socket: str, name: Any) -> None:
  """Raise an OptionError that lists the choices if the socket has no module with this name."""
  names = available(socket)
  if name not in names:
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise OptionError(f"Unknown name {name!r} in {socket}.{hint} Available: {', '.join(names)}.")


def load(socket: str, name: str) -> ModuleType:
  """Import and return the module `dtm_jax.<socket>.<name>`.

  Raises:
    OptionError: there is no such module. The message lists those that exist.
  """
  require_name(socket, name)
  return importlib.import_module(f"dtm_jax.{socket}.{name}")


@functools.cache
def options_of(socket: str, name: str) -> dict[str, Parameter]:
  """Return the options of a choice by name, in the order of its signature.

  The source is parsed and not imported, because an import of JAX or TensorFlow takes seconds. A module is
  imported only if its `build` is not a plain function definition.

  Raises:
    OptionError: there is no such module.
  """
  require_name(socket, name)
  source = (PACKAGE / socket / f"{name}.py").read_text(encoding="utf-8")
  path = ("Evaluator", "__init__") if socket == "evaluators" else ("build",)
  found = parameters_in_source(source, *path)
  if found is None:
    module = load(socket, name)
    function = module.Evaluator if socket == "evaluators" else module.build
    found = parameters_of(function, function.__doc__)
  return {option.name: option for option in found if option.name not in GIVEN.get(socket, ())}


def build(socket: str, options: Any, *, function: str = "build", **more: Any) -> Any:
  """Call `build`, or another `function`, of the choice `options["name"]` with the other options and `more`.

  An option of None takes the default of the choice, and "auto" what suits the device (see `devices`). Text
  after a slash in the name is the option `variant`: "tfds/cifar100" is the choice "tfds" with
  variant="cifar100".
  """
  name, _, variant = options["name"].partition("/")
  keywords = {option: value for option, value in options.items() if option != "name" and value is not None}
  if variant:
    keywords["variant"] = variant
  for option in options_of(socket, name).values() if socket != "tasks" else ():
    if option.required and "None" in option.annotation:  # the choice itself reports what is missing
      keywords.setdefault(option.name, None)
  return getattr(load(socket, name), function)(**resolved(keywords), **more)
