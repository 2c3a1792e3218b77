"""Read every example of a data set exactly once: in equal batches, or as whole images with label maps."""

import collections
import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from dtm_jax import progress
from dtm_jax.arrays import Batch
from dtm_jax.data.dataset import Dataset, Example, Stream, require_maps
from dtm_jax.data.image_decoding import MAX_PIXELS, CorruptImageError, decode
from dtm_jax.data.label_maps import Map, MapCoding, decode_pair
from dtm_jax.data.pools import Rows, batches_by_index, batches_in_sequence
from dtm_jax.data.reading import read_existing, report
from dtm_jax.data.resampling import Pixels
from dtm_jax.data.views import EvalView


def eval_batches(
  dataset: Dataset,
  *,
  batch_size: int,
  image_size: int,
  resize: int | None = None,
  interpolation: str = "bicubic",
  antialias: bool = True,
  max_pixels: int = MAX_PIXELS,
  num_threads: int = 16,
  prefetch: int = 2,
  max_batches: int | None = None,
  process_index: int | None = None,
  process_count: int | None = None,
) -> Iterator[Batch]:
  """Yield every example once and in order. All batches are full, and all processes yield equally many.

  A batch has the arrays of a batch of `train_batches`, and valid, bool [b]. Rows that pad the last batch have
  valid=False and index -1. A corrupt or missing image has valid=False and its own index; see reading.py.

  Args:
    batch_size: rows of the global batch.
    resize, interpolation, antialias: options of `views.EvalView`.
    max_pixels: a larger image counts as corrupt.
    num_threads: threads that decode and crop.
    prefetch: number of batches that are made in advance.
    max_batches: stop after this number of batches.
    process_index, process_count: default to those of JAX.

  Raises:
    OptionError: the data set is empty, batch_size is not a multiple of process_count, or an option of the
      view is not allowed.
    UserError: a file exists but cannot be read.
  """
  rows = Rows.of_process(dataset, batch_size, process_index, process_count)
  load = functools.partial(_load, dataset, EvalView(image_size, resize, interpolation, antialias), max_pixels)
  steps = range(-(-dataset.num_examples // batch_size))[:max_batches]
  source, pool = dataset.source, (rows.local_size, num_threads, prefetch)
  if isinstance(source, Stream):
    examples = source.read(rows.process_index, rows.process_count, None, 0)
    padded = itertools.islice(itertools.chain(examples, itertools.repeat(None)), len(steps) * rows.local_size)
    batches = batches_in_sequence(padded, lambda local, step, row: load(local[row], -1), *pool)
  else:

    def load_indexed(step: int, row: int) -> Batch:
      index = rows.place(step, row)
      if index >= dataset.num_examples:
        return load(None, -1)
      return load(read_existing(dataset, source, index), index)

    batches = batches_by_index(steps, load_indexed, *pool)
  return progress.track(batches, f"Evaluating on {dataset.name!r}", len(steps), "batches")


def _load(dataset: Dataset, view: EvalView, max_pixels: int, example: Example | None, index: int) -> Batch:
  """Return one row of a batch. If there is no example, the row has valid=False."""
  row = {"label": -1, "index": index, "valid": False}
  if example is not None:
    row.update(label=example["label"], index=example.get("index", index))
    try:
      return row | {"image": view(decode(example["image"], max_pixels)), "valid": True}
    except CorruptImageError as error:
      report(dataset, example["name"], error)
  return row | {"image": np.zeros((view.image_size, view.image_size, 3), np.uint8)}


def whole_examples(
  dataset: Dataset,
  *,
  num_threads: int = 16,
  process_index: int | None = None,
  process_count: int | None = None,
) -> Iterator[tuple[Pixels, Map]]:
  """Yield each image of this process's part of the data set once, at full size, with its label map.

  Corrupt and missing images are skipped; see reading.py.

  Raises:
    OptionError: the data set is empty or has no label maps.
    ValueError: an image and its map do not match, see `label_maps.decode_pair`.
    UserError: a file exists but cannot be read.
  """
  maps = require_maps(dataset)
  count = jax.process_count() if process_count is None else process_count
  rows = Rows.of_process(dataset, count, process_index, count)
  total = -(-dataset.num_examples // count)
  reads = progress.track(_local_reads(dataset, rows), f"Evaluating on {dataset.name!r}", total, "images")
  pending: collections.deque[Future] = collections.deque()
  with ThreadPoolExecutor(num_threads) as pool:
    for read in reads:
      pending.append(pool.submit(_load_pair, dataset, maps, read))
      if len(pending) > num_threads and (pair := pending.popleft().result()):
        yield pair
    yield from filter(None, (each.result() for each in pending))


def _local_reads(dataset: Dataset, rows: Rows) -> Iterator[Callable[[], Example | None]]:
  """Yield one function per example of this process. It returns the example, or None without a file."""
  source = dataset.source
  if isinstance(source, Stream):
    for example in source.read(rows.process_index, rows.process_count, None, 0):
      yield functools.partial(lambda example: example, example)
  else:
    for index in range(rows.process_index, dataset.num_examples, rows.process_count):
      yield functools.partial(read_existing, dataset, source, index)


def _load_pair(
  dataset: Dataset, maps: MapCoding, read: Callable[[], Example | None]
) -> tuple[Pixels, Map] | None:
  example = read()
  if example is None:
    return None
  try:
    return decode_pair(example, maps)
  except CorruptImageError as error:
    report(dataset, example["name"], error)
    return None
