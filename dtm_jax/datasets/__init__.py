"""Data sets: one module each, with `build(split, **options) -> data.Dataset` and `splits(**options)`.

Every `build` takes `data_dir`, the place of the files; None means the usual place. A split may be a part of
one, in TFDS's notation: "train[:90%]", "train[45000:]". `splits` takes the same options and names those
that are there.
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable

import numpy as np

from dtm_jax import plugins
from dtm_jax.data import Dataset, Example, Source

EVALUATION_SPLITS = ("val", "validation", "test")


def cache_folder(data_dir: str | os.PathLike | None = None) -> pathlib.Path:
  """Where downloads are kept: `data_dir`, else $DTM_JAX_CACHE, else ~/.cache/dtm_jax."""
  return pathlib.Path(data_dir or os.environ.get("DTM_JAX_CACHE") or "~/.cache/dtm_jax").expanduser()


def evaluation_split(options) -> str:
  """The first of "val", "validation" and "test" that the data set `options`, `name` among them, has.

  Raises:
    ValueError: it has none of them.
  """
  present = plugins.build("datasets", options, function="splits")
  for split in EVALUATION_SPLITS:
    if split in present:
      return split
  raise ValueError(
    f"Data set {options['name']!r} has none of the splits {', '.join(EVALUATION_SPLITS)}. It has: "
    f"{', '.join(present) or 'no splits'}. Name one for the evaluation, or a part that training does not "
    "see: data.split=train[:90%] and split=train[90%:]."
  )


def sliceable(build: Callable[..., Dataset]) -> Callable[..., Dataset]:
  """Makes a `build` of sets with random access understand parts of splits.

  A part is one of a fixed shuffle of the split, the same on every machine: files often lie class by class,
  and a tail of them would be one class. Bounds are examples or percent, rounded; negative ones count from the
  end.

  Raises:
    ValueError: brackets that are no part, or an empty part.
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
    return dataclasses.replace(whole, name=name, num_examples=len(order), source=_Part(whole.source, order))

  return build_part


def _bounds(split: str, part: str, num_examples: int) -> tuple[int, int]:
  match = re.fullmatch(r"(-?\d+%?)?:(-?\d+%?)?\]", part)
  if not match:
    raise ValueError(f"Split {split!r}: a part is written [from:to], in examples or percent, as in [:90%].")

  def place(bound: str | None, default: int) -> int:
    if bound is None:
      return default
    value = round(int(bound[:-1]) * num_examples / 100) if bound.endswith("%") else int(bound)
    return min(max(value + num_examples * (value < 0), 0), num_examples)

  start, stop = place(match[1], 0), place(match[2], num_examples)
  if start >= stop:
    raise ValueError(f"Split {split!r} is empty: from {start} to {stop} of {num_examples} examples.")
  return start, stop


@dataclasses.dataclass(frozen=True)
class _Part:
  """Some examples of a source."""

  source: Source
  order: np.ndarray

  def __len__(self) -> int:
    return len(self.order)

  def __getitem__(self, index: int) -> Example:
    return self.source[int(self.order[index])]
