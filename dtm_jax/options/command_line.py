"""Read the command line of `dtm_jax.main`, or of a script that takes a config, and end with its errors."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags, logging
from ml_collections import ConfigDict

from dtm_jax.errors import OptionError, UserError
from dtm_jax.options import validation
from dtm_jax.options.arguments import Arguments, split_arguments
from dtm_jax.options.config_file import load_config
from dtm_jax.options.overrides import apply
from dtm_jax.options.problems import Problem

USER_ERROR = 2
"""The exit code after an error that the user can fix."""


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
  _refuse(rest[1:])
  return *read_config(arguments), rest


def read_config(arguments: Arguments) -> tuple[ConfigDict, list[Problem]]:
  """Return the config with the typed options, and the problems of these. The config is not checked yet.

  Raises:
    OptionError: there is no `--config`.
    NotThereError: there is no such config.
  """
  if not arguments.config:
    raise OptionError("--config is missing: name a file of configs/, such as --config=configs/quickstart.py.")
  config = load_config(arguments.config)
  return config, apply(config, arguments.typed)


def _refuse(unexpected: Sequence[str]) -> None:
  """Raise an OptionError if there are unexpected arguments."""
  if unexpected:
    words = " ".join(unexpected)
    raise OptionError(f"Unexpected arguments: {words}. Options are written --config.name=value.")


def script_parser(doc: str | None) -> argparse.ArgumentParser:
  """Return a parser for the command line of a script, which shows the script's docstring as its help."""
  return argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )


def parse_with_config(
  parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[ConfigDict, argparse.Namespace]:
  """Return the checked config and the other flags from the command line of a script.

  Args:
    parser: the parser of the other flags. This function adds `--config` to its help.
    argv: the arguments after the script's name. By default those of the process.

  Raises:
    OptionError: an option of the config is unknown or wrong, or there is no `--config`.
    NotThereError: there is no such config.
  """
  parser.add_argument("--config", metavar="FILE", help="file of configs/; its options: --config.name=value")
  arguments = split_arguments([parser.prog, *(sys.argv[1:] if argv is None else argv)])
  args, unexpected = parser.parse_known_args(arguments.rest[1:])
  _refuse(unexpected)
  config, problems = read_config(arguments)
  validation.check(config, problems)
  return config, args


def start_above(file: str) -> NoReturn:
  """Start the command of the same name in the folder above, in place of this process.

  A file of scripts/FOLDER that imports its neighbours calls this if it was started by its own path. Python
  then knows no package that holds the neighbours. The command above does.
  """
  folder, name = os.path.split(os.path.abspath(file))
  os.execv(sys.executable, [sys.executable, os.path.join(os.path.dirname(folder), name), *sys.argv[1:]])


def run_script(main: Callable[[], None]) -> None:
  """Run `main()` with the log on stderr. A UserError ends the script with one message and exit code 2."""
  _log_to_stderr()
  try:
    main()
  except UserError as error:
    end_with(error)


def _log_to_stderr() -> None:
  """Set up absl's log as `absl.app.run` does."""
  flags.FLAGS.mark_as_parsed()  # the log has flags, which these scripts leave at their defaults
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)


def end_with(error: UserError, prefix: str = "") -> NoReturn:
  """Print the message and the notes of an error that the user can mend, and exit with code 2."""
  logging.flush()
  notes = getattr(error, "__notes__", [])
  print("\n".join([f"{prefix}{error}", *notes]), file=sys.stderr, flush=True)
  sys.exit(USER_ERROR)
