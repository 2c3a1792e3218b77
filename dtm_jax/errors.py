"""Errors that a user can mend. `main` prints their message alone, without a traceback.

A message names the culprit as the user typed it, its value, and the choices or the way out.
"""


class UserError(Exception):
  """Something that the user asked for is not possible."""


class OptionError(UserError, ValueError):
  """An option has a value that is not allowed."""


class NotThereError(UserError, FileNotFoundError):
  """A file, folder or run that the user named does not exist."""
