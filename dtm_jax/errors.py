"""Errors that a user can mend. `main` prints their message alone, without a traceback.

A message names the culprit as the user typed it, its value, and the choices or the way out.
"""

import contextlib
from collections.abc import Collection, Iterator


class UserError(Exception):
  """Something that the user asked for is not possible."""


class OptionError(UserError, ValueError):
  """An option has a value that is not allowed."""


class NotThereError(UserError, FileNotFoundError):
  """A file, folder or run that the user named does not exist."""


def check_choice(option: str, value: object, choices: Collection[str]) -> None:
  """Raise an OptionError that lists the choices, unless the value is one of them."""
  if value not in choices:
    raise OptionError(f"Unknown {option} {value!r}. Available: {', '.join(choices)}.")


@contextlib.contextmanager
def concerning(**options: object) -> Iterator[None]:
  """Name these options of the config, keys with __ for the dot, in a UserError that is raised inside.

  The code that finds the fault often knows a folder or a file, and not which option named it.
  """
  try:
    yield
  except UserError as error:
    typed = [
      f"--config.{key.replace('__', '.')}={value}" for key, value in options.items() if value is not None
    ]
    error.add_note(f"This concerns {' '.join(typed)}.")
    raise
