"""Data sets: one module each, with `build(split, **options) -> data.Dataset` and `splits(**options)`.

Every `build` takes `data_dir`, the place of the files; None means the usual place. A split may be a part of
one, in TFDS's notation: "train[:90%]", "train[45000:]". `splits` takes the same options and names those
that are there. A module whose name starts with _ is no data set.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np

from dtm_jax import plugins
from dtm_jax.data import Dataset, Example, Source
from dtm_jax.datasets import _splits
from dtm_jax.errors import OptionError


def evaluation_split(options) -> str:
  """The first of val, test and eval, by any of their names, that the data set `options` has.

  Raises:
    OptionError: it has none of them, or two that may be the first.
  """
  present = plugins.build("datasets", options, function="splits")
  for kind in _splits.EVALUATION_KINDS:
    if split := _splits.only_one(kind, present, f"data set {options['name']!r}"):
      return split
  raise OptionError(
    f"Data set {options['name']!r} has none of the splits {', '.join(_splits.EVALUATION_KINDS)}. It has: "
    f"{', '.join(present) or 'no splits'}. Name one for the evaluation, or a part that training does not "
    "see: data.split=train[:90%] and split=train[90%:]."
  )


def sliceable(build: Callable[..., Dataset]) -> Callable[..., Dataset]:
  """Makes a `build` of sets with random access understand parts of splits.

  A part is one of a fixed shuffle of the split, the same on every machine: files often lie class by class,
  and a tail of them would be one class. Bounds are examples or percent, rounded; negative ones count from the
  end.

  Raises:
    OptionError: brackets that are no part, or an empty part.
  """

  @functools.wraps(build)
  def build_part(split: str = "train", **options) -> Dataset:
    base, bracket, part = split.partition("[")
    whole = build(base, **options)
    if not bracket:
      return whole
    start, stop = _bounds(split, part, whole.num_examples)
    order = np.sort(np.random.default_rng(0).permutation(whole.num_examples)[start:stop])
    name = f"{whole.name}[{part}"
    return dataclasses.replace(_selected(whole, order), name=name)

  return build_part


def _bounds(split: str, part: str, num_examples: int) -> tuple[int, int]:
  match = re.fullmatch(r"(-?\d+%?)?:(-?\d+%?)?\]", part)
  if not match:
    raise OptionError(f"Split {split!r}: a part is written [from:to], in examples or percent, as in [:90%].")

  def place(bound: str | None, default: int) -> int:
    if bound is None:
      return default
    value = round(int(bound[:-1]) * num_examples / 100) if bound.endswith("%") else int(bound)
    return min(max(value + num_examples * (value < 0), 0), num_examples)

  start, stop = place(match[1], 0), place(match[2], num_examples)
  if start >= stop:
    raise OptionError(f"Split {split!r} is empty: from {start} to {stop} of {num_examples} examples.")
  return start, stop


def spread(dataset: Dataset, count: int | None) -> Dataset:
  """A data set whose first `count` examples are spread over the classes, as those of a shuffled one are.

  That is the data set itself where it is so already, and otherwise `evenly`. A `Stream` stays as it is, and
  so does a set of which all examples are wanted.
  """
  if count is None or count >= dataset.num_examples or not isinstance(dataset.source, Source):
    return dataset
  if dataset.labels is not None and _is_spread(dataset.labels, count):
    return dataset
  return evenly(dataset, count)


def evenly(dataset: Dataset, count: int) -> Dataset:
  """`count` of the set's examples at even distances, or all if it has no more.

  Raises:
    OptionError: the set can only be read in sequence.
  """
  if not isinstance(dataset.source, Source):
    raise OptionError(f"Evenly spaced examples need random access, and {dataset.name!r} has none.")
  count = min(count, dataset.num_examples)
  return _selected(dataset, np.arange(count) * dataset.num_examples // count)


def is_part(dataset: Dataset) -> bool:
  """Whether it is a part of a split, of `sliceable`, `spread` or `evenly`."""
  return isinstance(dataset.source, _Part)


def _is_spread(labels: np.ndarray, count: int) -> bool:
  """Whether the first `count` examples show the classes as random ones would.

  Each class must be there as often as expected, less three standard deviations, and three quarters of the
  classes that so many random examples would have: where classes are rare, the first rule asks for nothing.
  """
  first, labels = labels[:count], labels[labels >= 0]
  share = np.bincount(labels) / max(len(labels), 1)
  number = np.bincount(first[first >= 0], minlength=len(share))
  least = share * count - 3 * np.sqrt(share * count)
  classes = np.sum(1 - (1 - share) ** count)
  return bool(np.all(number >= least) and np.sum(number > 0) >= 0.75 * classes)


def _selected(dataset: Dataset, order: np.ndarray) -> Dataset:
  labels = None if dataset.labels is None else dataset.labels[order]
  return dataclasses.replace(
    dataset, num_examples=len(order), source=_Part(dataset.source, order), labels=labels
  )


@dataclasses.dataclass(frozen=True)
class _Part:
  """Some examples of a source."""

  source: Source
  order: np.ndarray

  def __len__(self) -> int:
    return len(self.order)

  def __getitem__(self, index: int) -> Example:
    return self.source[int(self.order[index])]
