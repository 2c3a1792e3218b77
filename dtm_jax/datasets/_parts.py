"""Parts of data sets that are read by index: slices of splits, and samples of all classes."""

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np

from dtm_jax.data import Dataset, Example, Source
from dtm_jax.errors import OptionError


def sliceable(build: Callable[..., Dataset]) -> Callable[..., Dataset]:
  """Decorate a `build` of data sets with an index, so that it also opens parts such as "train[:90%]".

  Bounds are examples or percent, rounded. Negative bounds count from the end. The split is shuffled before it
  is cut, in the same order on every machine. Otherwise a part might hold a single class, because files often
  lie class by class.

  Raises:
    OptionError: by the decorated function, if the brackets do not have this form or the part is empty.
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
  """Return a data set whose first `count` examples are spread over the classes.

  Returns the data set itself if its first examples are already spread like those of a shuffled data set. Also
  returns it if all examples are wanted (None), or if it is a `Stream`. Otherwise returns
  `evenly(dataset, count)`.
  """
  if count is None or count >= dataset.num_examples or not isinstance(dataset.source, Source):
    return dataset
  if dataset.labels is not None and _is_spread(dataset.labels, count):
    return dataset
  return evenly(dataset, count)


def evenly(dataset: Dataset, count: int) -> Dataset:
  """Return `count` examples at even distances, or all examples if there are fewer.

  Raises:
    OptionError: the data set can only be read in sequence.
  """
  if not isinstance(dataset.source, Source):
    raise OptionError(f"Evenly spaced examples need random access, and {dataset.name!r} has none.")
  count = min(count, dataset.num_examples)
  return _selected(dataset, np.arange(count) * dataset.num_examples // count)


def is_part(dataset: Dataset) -> bool:
  """Return whether `sliceable`, `spread` or `evenly` made this data set as a part of another."""
  return isinstance(dataset.source, _Part)


def _is_spread(labels: np.ndarray, count: int) -> bool:
  """Return whether the first `count` examples show the classes as random examples would.

  Each class must occur at least as often as expected, minus three standard deviations. For rare classes this
  lower bound is negative. So the number of classes must also be at least three quarters of the number that
  random examples would show.
  """
  first, labels = labels[:count], labels[labels >= 0]
  share = np.bincount(labels) / max(len(labels), 1)
  number = np.bincount(first[first >= 0], minlength=len(share))
  least = share * count - 3 * np.sqrt(share * count)
  classes = np.sum(1 - (1 - share) ** count)
  return bool(np.all(number >= least) and np.sum(number > 0) >= 0.75 * classes)


def _selected(dataset: Dataset, order: np.ndarray) -> Dataset:
  assert isinstance(dataset.source, Source)
  labels = None if dataset.labels is None else dataset.labels[order]
  return dataclasses.replace(
    dataset, num_examples=len(order), source=_Part(dataset.source, order), labels=labels
  )


@dataclasses.dataclass(frozen=True)
class _Part:
  """The examples of a source at the indices `order`."""

  source: Source
  order: np.ndarray

  def __len__(self) -> int:
    return len(self.order)

  def __getitem__(self, index: int) -> Example:
    return self.source[int(self.order[index])]
