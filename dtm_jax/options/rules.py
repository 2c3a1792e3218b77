"""Rules: what a value may be, in words and as a function.

number(0, 1).problem(1.5)     # "must be a number of at least 0 and at most 1"
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
  """What one option may be.

  Attributes:
    kind: the Python type; `object` for several.
    allowed: what is allowed, in words that follow "must be".
    accepts: whether a value of that type is allowed.
    about: what the option means.
    optional: whether None is allowed, which leaves the option out or to its default.
  """

  kind: type
  allowed: str
  accepts: Callable[[Any], bool]
  about: str = ""
  optional: bool = False

  def problem(self, value: Any) -> str | None:
    """Return what is wrong with the value, as "must be ...", or None if it is allowed."""
    if value is None and self.optional:
      return None
    try:
      right = _is_of(self.kind, value) and self.accepts(value)
    except (TypeError, ValueError, AttributeError, re.error):
      right = False
    return None if right else f"must be {self.allowed}" + (", or None" if self.optional else "")

  def or_none(self, about: str = "") -> "Rule":
    """The same rule, which also allows None."""
    return dataclasses.replace(self, optional=True, about=about or self.about)


def _is_of(kind: type, value: Any) -> bool:
  """Whether the value has the type; a boolean is not a number, and a number must be finite."""
  if isinstance(value, bool):
    return kind in (bool, object)
  if isinstance(value, (int, float)) and not math.isfinite(value):
    return False
  if kind is float:
    return isinstance(value, (int, float))
  return isinstance(value, (tuple, list) if kind is tuple else kind)


def whole(
  low: int | None = 0, about: str = "", *, also: tuple[int, ...] = (), high: int | None = None
) -> Rule:
  """A whole number from `low` to `high`, or one of `also`."""
  words = _range("a whole number", low, high)
  words = " or ".join([words, *map(str, also)])
  inside = lambda value: (low is None or value >= low) and (high is None or value <= high)
  return Rule(int, words, lambda value: inside(value) or value in also, about)


def number(
  low: int | float | None = 0,
  high: int | float | None = None,
  about: str = "",
  *,
  above: bool = False,
  below: bool = False,
) -> Rule:
  """A finite number from `low` (not included if `above`) to `high` (not included if `below`)."""

  def accepts(value: int | float) -> bool:
    enough = low is None or (value > low if above else value >= low)
    return enough and (high is None or (value < high if below else value <= high))

  return Rule(float, _range("a number", low, high, above, below), accepts, about)


def _range(what: str, low, high, above: bool = False, below: bool = False) -> str:
  lower = "" if low is None else f"above {low}" if above else f"of at least {low}"
  upper = "" if high is None else f"below {high}" if below else f"at most {high}"
  return f"{what} {' and '.join(filter(None, (lower, upper)))}".strip()


def choice(*names: str, about: str = "") -> Rule:
  """One of the names."""
  return Rule(str, f"one of {', '.join(names)}", names.__contains__, about)


def flag(about: str = "") -> Rule:
  """True or False."""
  return Rule(bool, "True or False", lambda value: True, about)


def text(about: str = "", *, empty: bool = False) -> Rule:
  """Any string; an empty one only where `empty` says so."""
  return Rule(
    str, "a text" if empty else "a text that is not empty", lambda x: empty or bool(x.strip()), about
  )


def several(
  each: Rule, about: str = "", *, lengths: tuple[int, ...] | None = None, empty: bool = False
) -> Rule:
  """A tuple whose every element follows `each`."""
  counts = " or ".join(map(str, lengths)) if lengths else "any number" if empty else "one or more"
  right = lambda n: n in lengths if lengths else empty or n > 0
  accepts = lambda value: right(len(value)) and all(each.problem(x) is None for x in value)
  return Rule(tuple, f"a tuple of {counts}, each {each.allowed}", accepts, about)


def interval(low: int | float, high: int | float | None, about: str = "") -> Rule:
  """A pair (from, to), both above `low` and at most `high`, in ascending order."""
  each = number(low, high, above=True)
  words = f"a pair (from, to) of numbers above {low}" + ("" if high is None else f" and at most {high}")
  accepts = lambda pair: len(pair) == 2 and all(each.problem(x) is None for x in pair) and pair[0] <= pair[1]
  return Rule(tuple, f"{words}, the first no greater than the second", accepts, about)


def any_of(*rules: Rule, about: str = "") -> Rule:
  """What any of the rules allows."""
  accepts = lambda value: any(rule.problem(value) is None for rule in rules)
  return Rule(object, ", or ".join(rule.allowed for rule in rules), accepts, about)


def anything(about: str = "") -> Rule:
  """No rule is known."""
  return Rule(object, "anything", lambda value: True, about, optional=True)


def regex(about: str = "") -> Rule:
  """A regular expression that is not empty."""
  return Rule(str, "a regular expression", lambda value: bool(re.compile(value)) and bool(value), about)


def durations(name: str, about: str, *, low: int | float = 0, above: bool = False) -> dict[str, Rule]:
  """The rules of `{name}_steps`, `{name}_examples` and `{name}_epochs`."""
  least = whole(int(low) + above, about).or_none()
  return {
    f"{name}_steps": least,
    f"{name}_examples": least,
    f"{name}_epochs": number(low, None, about, above=above).or_none(),
  }
