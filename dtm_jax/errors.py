"""Define the errors that a user can mend. `main` prints their message alone, without a traceback.

A message names the wrong option or file as the user typed it, its value, and what is allowed or what to do.
"""

import contextlib
from collections.abc import Collection, Iterator


class UserError(Exception):
  """The user asked for something that is not possible."""


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
  """Add a note with these options of the config to a UserError that is raised inside the `with` block.

  The code that finds a fault often knows a folder or a file, but not the option that named it.

  Args:
    options: values by key, with __ for the dot of the key. Values of None are left out.
  """
  try:
    yield
  except UserError as error:
    typed = [
      f"--config.{key.replace('__', '.')}={value}" for key, value in options.items() if value is not None
    ]
    error.add_note(f"This concerns {' '.join(typed)}.")
    raise
