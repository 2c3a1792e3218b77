"""Reading examples of which some are corrupt or missing: training replaces them, evaluation marks them.

A corrupt image is named in the log once, and counted each time that it is met.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from absl import logging

from dtm_jax.data.dataset import Dataset, Example, Source
from dtm_jax.data.image_decoding import CorruptImageError
from dtm_jax.errors import NotThereError, UserError

REPLACEMENTS = 10
"""The number of other examples to try if one example cannot be used."""

Decoded = TypeVar("Decoded")

_num_corrupt = 0
_corrupt_lock = threading.Lock()


def corrupt_count() -> int:
  """Return how many times this process has met a corrupt or missing image."""
  return _num_corrupt


def read_or_replace(
  dataset: Dataset,
  read: Callable[[int], Example],
  decode_example: Callable[[Example], Decoded],
  index: int,
  count: int,
  rng: np.random.Generator,
) -> tuple[Decoded, Example, int]:
  """Return example `index` decoded, the example, and its index.

  If it cannot be used, `rng` draws other indices in 0..count-1, and the first usable example takes its place.

  Raises:
    CorruptImageError: the example and all its replacements are corrupt.
    NotThereError: none can be used, and the last error is a missing file.
    UserError: none can be used, and the last error is another error of reading.
  """
  names: list[str] = []
  error: CorruptImageError | OSError
  for _ in range(1 + REPLACEMENTS):
    try:
      example = read(index)
    except OSError as unreadable:
      name, error = unreadable.filename or f"example {index} of {dataset.name}", unreadable
    else:
      try:
        return decode_example(example), example, index
      except CorruptImageError as corrupt:
        name, error = example["name"], corrupt
    report(dataset, name, error)
    names.append(str(name))
    index = int(rng.integers(count))
  kind = {CorruptImageError: CorruptImageError, FileNotFoundError: NotThereError}.get(type(error), UserError)
  raise kind(
    f"An image and its {REPLACEMENTS} replacements are corrupt or cannot be read: {', '.join(names)}. "
    f"Last error: {error}"
  ) from error


def read_existing(dataset: Dataset, source: Source, index: int) -> Example | None:
  """Return an example, or None if its file is missing.

  Raises:
    UserError: the file exists but cannot be read. The error may be temporary, and a result without the
      example would be wrong.
  """
  try:
    return source[index]
  except FileNotFoundError as error:
    report(dataset, error.filename or f"example {index} of {dataset.name}", error)
    return None
  except OSError as error:
    raise UserError(f"Example {index} of data set {dataset.name!r} cannot be read: {error}") from error


def report(dataset: Dataset, name: str, error: Exception) -> None:
  """Count a corrupt or missing image, and name it in the log if the data set has not named it yet."""
  global _num_corrupt
  with _corrupt_lock:
    _num_corrupt += 1
    first = name not in dataset.warned_of
    dataset.warned_of.add(name)
  if first:
    what = "Corrupt image" if isinstance(error, CorruptImageError) else "Unreadable file"
    logging.warning("%s %s is left out. corrupt_images counts it each time: %s", what, name, error)
