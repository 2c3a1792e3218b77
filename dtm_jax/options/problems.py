"""Describe what is wrong with an option, and raise the error that lists all problems of a config."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from dtm_jax.errors import OptionError


@dataclasses.dataclass(frozen=True)
class Problem:
  """One option that is wrong: its key, its value, and what is allowed."""

  key: str
  value: Any
  text: str

  def __str__(self) -> str:
    shown = self.value if isinstance(self.value, str) else repr(self.value)
    return f"--config.{self.key}{'=' if shown else ''}{shown}: {self.text}."


def refuse(problems: Iterable[Problem]) -> None:
  """Raise an OptionError that lists the problems, the first of each key. Do nothing without problems."""
  first: dict[str, Problem] = {}
  for problem in problems:
    first.setdefault(problem.key, problem)
  if first:
    head = f"{len(first)} options are not right:\n  " if len(first) > 1 else ""
    raise OptionError(head + "\n  ".join(map(str, first.values())))
