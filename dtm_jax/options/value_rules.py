"""Make rules for the value of an option. A rule says in words what is allowed, and tests a value.

number(0, 1).problem(1.5)     # "must be a number of at least 0 and at most 1"
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

UNITS = ("steps", "examples", "epochs")
"""The units of a duration: `total_steps`, `total_examples`, `total_epochs`."""


@dataclasses.dataclass(frozen=True)
class Rule:
  """What the value of one option may be.

  Attributes:
    kind: the Python type; `object` if there are several.
    allowed: the allowed values, in words that follow "must be".
    accepts: returns whether a value of that type is allowed.
    about: the meaning of the option, in sentences.
    optional: whether None is allowed. None switches the option off or leaves it at its default.
    names: the choices, if the value is one of a list of names; for a tuple of names, those of each element.
    kinds: the types of a rule that allows several.
  """

  kind: type
  allowed: str
  accepts: Callable[[Any], bool]
  about: str = ""
  optional: bool = False
  names: tuple[str, ...] = ()
  kinds: tuple[type, ...] = ()

  @property
  def type_name(self) -> str:
    """The type in words, such as "whole number" or "text or tuple"."""
    words = list(dict.fromkeys(_TYPE_NAMES[kind] for kind in self.kinds or (self.kind,)))
    return " or ".join([*words, "None"] if self.optional and self.kind is not object else words)

  @property
  def expected(self) -> str:
    """What is allowed, as "must be ..."."""
    return f"must be {self.allowed}" + (", or None" if self.optional else "")

  def problem(self, value: Any) -> str | None:
    """Return `expected` if the value is not allowed, and None if it is."""
    if value is None and self.optional:
      return None
    try:
      right = _has_type(value, self.kind) and self.accepts(value)
    except (TypeError, ValueError, AttributeError, re.error):
      right = False
    return None if right else self.expected

  def or_none(self, about: str = "") -> "Rule":
    """Return the same rule, which also allows None."""
    return dataclasses.replace(self, optional=True, about=about or self.about)


_TYPE_NAMES = {
  int: "whole number",
  float: "number",
  bool: "True or False",
  str: "text",
  tuple: "tuple",
  object: "any",
}


def _has_type(value: Any, kind: type) -> bool:
  """Return whether the value has the type. A boolean is not a number, and a number must be finite."""
  if isinstance(value, bool):
    return kind in (bool, object)
  if isinstance(value, int | float) and not math.isfinite(value):
    return False
  if kind is float:
    return isinstance(value, int | float)
  return isinstance(value, (tuple, list) if kind is tuple else kind)


def whole(
  low: int | None = 0, about: str = "", *, also: tuple[int, ...] = (), high: int | None = None
) -> Rule:
  """Allow whole numbers from `low` to `high`, and those in `also`."""
  words = " or ".join([_range("a whole number", low, high), *map(str, also)])
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
  """Allow finite numbers from `low` to `high`. `above` excludes `low` itself, and `below` excludes `high`."""

  def accepts(value: int | float) -> bool:
    enough = low is None or (value > low if above else value >= low)
    return enough and (high is None or (value < high if below else value <= high))

  return Rule(float, _range("a number", low, high, above, below), accepts, about)


def _range(
  what: str, low: int | float | None, high: int | float | None, above: bool = False, below: bool = False
) -> str:
  lower = "" if low is None else f"above {low}" if above else f"of at least {low}"
  upper = "" if high is None else f"below {high}" if below else f"at most {high}"
  return f"{what} {' and '.join(filter(None, (lower, upper)))}".strip()


def choice(*names: str, about: str = "") -> Rule:
  """Allow these names."""
  return Rule(str, f"one of {', '.join(names)}", names.__contains__, about, names=names)


def flag(about: str = "") -> Rule:
  """Allow True and False."""
  return Rule(bool, "True or False", lambda value: True, about)


def text(about: str = "", *, empty: bool = False) -> Rule:
  """Allow any string. `empty` also allows the empty string."""
  words = "a text" if empty else "a text that is not empty"
  return Rule(str, words, lambda value: empty or bool(value.strip()), about)


def several(
  each: Rule, about: str = "", *, lengths: tuple[int, ...] | None = None, empty: bool = False
) -> Rule:
  """Allow tuples in which every element follows `each`."""
  counts = " or ".join(map(str, lengths)) if lengths else "any number" if empty else "one or more"
  right = lambda length: length in lengths if lengths else empty or length > 0
  accepts = lambda value: right(len(value)) and all(each.problem(x) is None for x in value)
  return Rule(tuple, f"a tuple of {counts}, each {each.allowed}", accepts, about, names=each.names)


def interval(low: int | float, high: int | float | None, about: str = "") -> Rule:
  """Allow pairs (from, to) in ascending order, both above `low` and at most `high`."""
  each = number(low, high, above=True)
  words = f"a pair (from, to) of numbers above {low}" + ("" if high is None else f" and at most {high}")
  accepts = lambda pair: len(pair) == 2 and all(each.problem(x) is None for x in pair) and pair[0] <= pair[1]
  return Rule(tuple, f"{words}, the first no greater than the second", accepts, about)


def any_of(*rules: Rule, about: str = "") -> Rule:
  """Allow everything that one of the rules allows."""
  accepts = lambda value: any(rule.problem(value) is None for rule in rules)
  names = tuple(name for rule in rules for name in rule.names)
  kinds = tuple(rule.kind for rule in rules)
  return Rule(object, ", or ".join(rule.allowed for rule in rules), accepts, about, names=names, kinds=kinds)


def anything(about: str = "") -> Rule:
  """Allow every value, because no rule is known."""
  return Rule(object, "anything", lambda value: True, about, optional=True)


def regex(about: str = "") -> Rule:
  """Allow regular expressions that are not empty."""
  return Rule(str, "a regular expression", lambda value: bool(re.compile(value)) and bool(value), about)


def durations(name: str, about: str, *, low: int = 0, above: bool = False) -> dict[str, Rule]:
  """Return the rules of `{name}_steps`, `{name}_examples` and `{name}_epochs`."""
  least = whole(low + above, about).or_none()
  return {
    f"{name}_steps": least,
    f"{name}_examples": least,
    f"{name}_epochs": number(low, None, about, above=above).or_none(),
  }


def below(prefix: str, rules: dict[str, Rule]) -> dict[str, Rule]:
  """Return the rules with a prefix before each key: "lr" becomes "optim.lr"."""
  return {f"{prefix}.{key}": rule for key, rule in rules.items()}


def of_annotation(annotation: str, special: dict[str, Rule]) -> Rule:
  """Return the rule that a type annotation means, such as "int | None".

  Args:
    annotation: as written in the code.
    special: rules of types that are not Python's.
  """
  kinds = {
    "int": whole(None),
    "float": number(None),
    "bool": flag(),
    "str": text(),
    "tuple": Rule(tuple, "a tuple", lambda value: True),
    **special,
  }
  names = [part.strip().partition("[")[0] for part in annotation.split("|")]
  rules = [kinds[name] for name in names if name in kinds]
  if not rules or {*names} - {*kinds, "None"}:
    return anything()
  rule = rules[0] if len(rules) == 1 else any_of(*rules)
  return rule.or_none() if "None" in names else rule
