"""Read the command line of `dtm_jax.main`, or of a script that takes a config, and end with its errors."""

import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict

from dtm_jax.errors import OptionError, UserError
from dtm_jax.options import validation
from dtm_jax.options.arguments import Arguments, split_arguments
from dtm_jax.options.config_file import load_config
from dtm_jax.options.overrides import apply
from dtm_jax.options.problems import Problem

USER_ERROR = 2
"""The exit code after an error that the user can mend."""


def read(arguments: Arguments) -> tuple[ConfigDict, list[Problem], list[str]]:
  """Return the config with the typed options, the problems of these, and the program's name alone.

  All other flags are parsed. The config is not checked yet.

  Raises:
    OptionError: a flag is unknown, an argument is not a flag, or there is no `--config`.
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
  config = load_config(arguments.config)
  return config, apply(config, arguments.typed), rest


def run_script(main: Callable[[ConfigDict], None]) -> None:
  """Run `main(config)` of a script with the checked config of its command line.

  An error that the user can mend ends the script with one message and exit code 2.
  """
  found: list[ConfigDict] = []

  def parse_flags(argv: list[str]) -> list[str]:
    try:
      config, problems, rest = read(split_arguments(argv))
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


def end_with(error: UserError, prefix: str = "") -> NoReturn:
  """Print the message and the notes of an error that the user can mend, and exit with code 2."""
  logging.flush()
  notes = getattr(error, "__notes__", [])
  print("\n".join([f"{prefix}{error}", *notes]), file=sys.stderr, flush=True)
  sys.exit(USER_ERROR)
