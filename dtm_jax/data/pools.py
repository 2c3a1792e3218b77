"""Threads that make rows into batches, and the rows of the global batch that each process makes.

Grain runs the threads for data sets with an index. Each of its elements costs about 0.2 ms, more than a small
image takes to decode. So one element is a chunk of up to CHUNK rows. A thread pool serves data sets that can
only be read in sequence.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grain
import jax
import numpy as np
from absl import flags

from dtm_jax.arrays import Batch
from dtm_jax.data.dataset import Dataset, Example
from dtm_jax.errors import OptionError

# Otherwise Grain adds a note about its tracebacks to every message for a user.
flags.FLAGS.set_default("grain_py_traceback_filtering", "off")

CHUNK = 32
DTYPES = {"image": np.uint8, "map": np.uint8, "label": np.int32, "index": np.int64, "valid": np.bool_}


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows that one of P processes makes of every global batch of B rows: [p·b, (p+1)·b) with b = B / P.

  Attributes:
    batch_size: B, rows of the global batch.
    start: number of examples of the stream that come before the first batch.
  """

  batch_size: int
  process_index: int
  process_count: int
  start: int = 0

  @classmethod
  def of_process(
    cls, dataset: Dataset, batch_size: int, index: int | None, count: int | None, start: int = 0
  ) -> "Rows":
    """Return the rows of process `index` of `count`; None means this process, as JAX counts them.

    Raises:
      OptionError: the data set is empty, or batch_size is not a multiple of the number of processes.
    """
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    if dataset.num_examples == 0:
      raise OptionError(f"Data set {dataset.name!r} is empty.")
    if batch_size % count:
      raise OptionError(f"{batch_size=} is not a multiple of the {count} processes.")
    return cls(batch_size, index, count, start)

  @property
  def local_size(self) -> int:
    """The per-host batch size b."""
    return self.batch_size // self.process_count

  def place(self, step: int, row: int) -> int:
    """Return the place g in the stream of examples of this process's `row` at `step`."""
    return self.start + step * self.batch_size + self.process_index * self.local_size + row


def batches_by_index(
  steps: range, load: Callable[[int, int], Batch], local_size: int, num_threads: int, prefetch: int
) -> Iterator[Batch]:
  """Yield the batches of the rows `load(step, row)`.

  Args:
    load: returns one row, arrays without the leading axis B. Threads call it in any order.
    local_size: rows of a batch on this process.
    prefetch: number of batches that are made in advance, at least.
  """
  chunks = -(-local_size // CHUNK)

  def load_chunk(place: int) -> Batch:
    step, chunk = divmod(place, chunks)
    first, last = (local_size * edge // chunks for edge in (chunk, chunk + 1))
    return _stack([load(step, row) for row in range(first, last)])

  ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(num_threads, prefetch * chunks))
  places = grain.MapDataset.range(steps.start * chunks, steps.stop * chunks)
  return iter(places.map(load_chunk).to_iter_dataset(ahead).batch(chunks, batch_fn=_concatenate))


def batches_in_sequence(
  examples: Iterable[Example | None],
  load: Callable[[list, int, int], Batch],
  local_size: int,
  num_threads: int,
  prefetch: int,
) -> Iterator[Batch]:
  """Yield the batches of the rows `load(examples of the batch, step, row)` until the examples end.

  Args:
    examples: read by one thread; their number is a multiple of local_size, or infinite.
    prefetch: number of batches that are made in advance.
  """
  examples = iter(examples)
  pending: collections.deque = collections.deque()
  with ThreadPoolExecutor(num_threads) as pool:
    for step in itertools.count():
      local = list(itertools.islice(examples, local_size))
      if local:
        pending.append([pool.submit(load, local, step, row) for row in range(local_size)])
      if len(pending) > prefetch or not local:
        if not pending:
          return
        yield _stack([row.result() for row in pending.popleft()])


def _stack(rows: list[Batch]) -> Batch:
  return {name: np.array([row[name] for row in rows], DTYPES[name]) for name in rows[0]}


def _concatenate(chunks: list[Batch]) -> Batch:
  return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
