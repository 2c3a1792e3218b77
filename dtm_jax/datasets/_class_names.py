"""Names of classes: their order, and the numbering that all splits share."""

import re
from collections.abc import Collection, Mapping

from dtm_jax.datasets import _splits
from dtm_jax.errors import OptionError


def natural_order(name: str) -> tuple:
  """Return a sort key that treats digits as numbers, as timm does: class2 comes before class10.

  Upper and lower case only decide between names that are otherwise equal.
  """
  parts = re.split(r"([0-9]+)", name.lower())
  return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def classes_of_split(split: str | None, names: Mapping[str | None, Collection[str]]) -> tuple[str, ...]:
  """Return the class names of a split in the order of their labels.

  All splits share one numbering, so a class that is missing in one split does not shift the others. A split
  that has no class in common with the training split, such as test/images, keeps its own names.

  Args:
    names: the class folders of every split.

  Raises:
    OptionError: the names of two splits differ only in upper and lower case.
  """
  _require_one_case(names)
  trained = set().union(*(names[each] for each in names if each and _splits.kind_of(each) == "train"))
  own = set(names[split])
  if trained and own and trained.isdisjoint(own):
    return tuple(sorted(own, key=natural_order))
  together = trained.union(*(each for each in names.values() if not trained or trained & set(each)))
  return tuple(sorted(together, key=natural_order))


def _require_one_case(names: Mapping[str | None, Collection[str]]) -> None:
  spelled: dict[str, dict[str, list]] = {}
  for split, each in names.items():
    for name in each:
      spelled.setdefault(name.casefold(), {}).setdefault(name, []).append(split)
  for spellings in spelled.values():
    if len(spellings) > 1 and not any(set(spellings) <= set(each) for each in names.values()):
      places = ", ".join(f"{splits[0]}/{name}" for name, splits in sorted(spellings.items()))
      raise OptionError(f"Class folders differ only in upper and lower case: {places}. Rename one of them.")
