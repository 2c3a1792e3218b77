"""Command lines that name a config, of `dtm_jax.main` and of the scripts that take one."""

import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import ConfigDict

from dtm_jax.errors import OptionError, UserError
from dtm_jax.options import typed as typed_options
from dtm_jax.options import validation
from dtm_jax.options.typed import Arguments, Problem

USER_ERROR = 2
"""The exit code of an error that the user can mend."""


def read(arguments: Arguments) -> tuple[ConfigDict, list[Problem], list[str]]:
  """Return the config with the typed options, what is wrong with these, and the program's name alone.

  All other flags are parsed. The config is not checked yet.

  Raises:
    OptionError: an unknown flag, an argument that is no flag, or no config.
    NotThereError: there is no such config.
  """
  try:
    rest = flags.FLAGS(arguments.rest)
  except flags.Error as error:
    raise OptionError(f"{error} Options of the config are written --config.name=value.") from error
  if rest[1:]:
    raise OptionError(f"Unexpected arguments: {' '.join(rest[1:])}. Options are written --config.name=value.")
  if not arguments.config:
    raise OptionError("--config is missing: name a file of configs/, such as --config=configs/quickstart.py.")
  config = typed_options.load_config(arguments.config)
  return config, typed_options.apply(config, arguments.typed), rest


def run_script(main: Callable[[ConfigDict], None]) -> None:
  """Run `main(config)` of a script with the checked config of its command line.

  What a user can mend ends with one message and exit code 2.
  """
  found = []

  def parse_flags(argv: list[str]) -> list[str]:
    try:
      config, problems, rest = read(typed_options.split_arguments(argv))
      validation.check(config, problems)
    except UserError as error:
      end_with(error)
    found.append(config)
    return rest

  def run(_: list[str]) -> None:
    try:
      main(*found)
    except UserError as error:
      end_with(error)

  app.run(run, flags_parser=parse_flags)


def end_with(error: UserError, prefix: str = "") -> None:
  """End the process with the message and the notes of an error that the user can mend."""
  logging.flush()
  notes = getattr(error, "__notes__", [])
  print("\n".join([f"{prefix}{error}", *notes]), file=sys.stderr, flush=True)
  sys.exit(USER_ERROR)
