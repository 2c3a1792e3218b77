"""Names of classes: their order, and whether those of two splits are the same."""

import re
from collections.abc import Collection, Mapping

from dtm_jax.datasets import _splits
from dtm_jax.errors import OptionError


def natural_order(name: str) -> tuple:
  """A key to sort by: digits count as numbers (5 before 14, class2 before class10), case last. As in timm."""
  parts = re.split(r"([0-9]+)", name.lower())
  return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def of_splits(mine: str | None, names: Mapping[str | None, Collection[str]]) -> tuple[str, ...]:
  """The classes of the split `mine`, in order; `names` are the class folders of every split.

  All splits share one numbering, so that a class that one lacks shifts no other. A split that has no class
  in common with the training split, such as test/images, keeps its own names.

  Raises:
    OptionError: names of two splits differ in upper and lower case alone.
  """
  _require_one_case(names)
  trained = set().union(*(names[split] for split in names if split and _splits.kind_of(split) == "train"))
  own = set(names[mine])
  if trained and own and trained.isdisjoint(own):
    return tuple(sorted(own, key=natural_order))
  together = trained.union(*(each for each in names.values() if not trained or trained & set(each)))
  return tuple(sorted(together, key=natural_order))


def _require_one_case(names: Mapping[str | None, Collection[str]]) -> None:
  spelled = {}
  for split, each in names.items():
    for name in each:
      spelled.setdefault(name.casefold(), {}).setdefault(name, []).append(split)
  for spellings in spelled.values():
    if len(spellings) > 1 and not any(set(spellings) <= set(each) for each in names.values()):
      places = ", ".join(f"{splits[0]}/{name}" for name, splits in sorted(spellings.items()))
      raise OptionError(f"Class folders differ in upper and lower case alone: {places}. Rename one of them.")
