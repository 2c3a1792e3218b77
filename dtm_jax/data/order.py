"""Decide which example each row of each batch of the training stream shows.

The stream is an endless list of places g. Row r of step t has g = start + t·B + r. Here B is the global batch
size, and `start` counts the examples before the first step. Place g belongs to epoch g // n of a data set of
n examples. It shows the example that the shuffle of that epoch, keyed by (seed, epoch), puts at g % n.
"""

import functools
from typing import Any

import grain
import numpy as np
from numpy.random.bit_generator import ISeedSequence


def example_at(place: int, n: int, seed: int) -> int:
  """Return the example that the shuffle of the epoch puts at this place of the stream.

  Every epoch has its own permutation of 0..n-1. Only the one entry is computed.
  """
  epoch, place = divmod(place, n)
  return grain.experimental.index_shuffle(place, max_index=n - 1, seed=epoch_seed(seed, epoch), rounds=4)


@functools.lru_cache(maxsize=8)
def epoch_seed(seed: int, epoch: int) -> int:
  """Return the seed of the shuffle of one epoch."""
  return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def generator(*key: int) -> np.random.Generator:
  """Return the generator that is keyed by these numbers, such as (seed, place)."""
  seed: Any = _PhiloxKey(*key)  # NumPy's annotations do not mention ISeedSequence
  return np.random.Generator(np.random.Philox(seed))


class _PhiloxKey(ISeedSequence):
  """A seed that gives the generator `Philox(key=key)`.

  `Philox(key=...)` itself first asks the system for entropy that it does not use, which costs time.
  """

  def __init__(self, *key: int):
    self._key = np.array(key, np.uint64)

  def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
    return self._key
