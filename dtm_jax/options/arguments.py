"""Split a command line: the config's file, the typed options in order, and all other arguments."""

import dataclasses
from collections.abc import Sequence

from dtm_jax.errors import OptionError

Typed = Sequence[tuple[str, str | None]]
"""(key, text) in the order of the command line. The text of a flag without "=" is None."""


@dataclasses.dataclass(frozen=True)
class Arguments:
  """A command line.

  Attributes:
    config: the file after `--config`; None if there is none.
    typed: the options of the config.
    rest: the program's name and all other arguments.
  """

  config: str | None
  typed: Typed
  rest: list[str]


def split_arguments(argv: Sequence[str]) -> Arguments:
  """Take `--config FILE`, `--config.KEY=VALUE`, `--config.KEY VALUE` and `--noconfig.KEY` out of `argv`.

  Raises:
    OptionError: `--config` is given twice.
  """
  config: str | None = None
  typed: list[tuple[str, str | None]] = []
  rest, words = list(argv[:1]), list(argv[1:])
  while words:
    word = words.pop(0)
    if word == "--":
      rest += [word, *words]
      break
    name, equals, value = word.partition("=")
    flag = name.lstrip("-") if name.startswith("-") else ""
    if flag == "config":
      value = value if equals else words.pop(0) if words else ""
      if config is not None:
        raise OptionError(f"--config is given twice: {config} and {value}.")
      config = value
    elif flag.startswith("noconfig."):
      typed.append((flag.removeprefix("noconfig."), "False"))
    elif flag.startswith("config."):
      alone = not equals and (not words or words[0].startswith("--"))
      typed.append((flag.removeprefix("config."), value if equals else None if alone else words.pop(0)))
    else:
      rest.append(word)
  return Arguments(config, typed, rest)
