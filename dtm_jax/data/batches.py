"""Batches on the host, as a function of (seed, step) alone.

The training stream is one endless list of places g = examples before the batch + row (step·B + row while the
batch size B does not change). Place g belongs to epoch g // n and
shows the example that the shuffle of that epoch, keyed by (seed, epoch), puts at g % n; its crop is drawn
from a generator keyed by (seed, g). So no state is kept: any step is reached at no cost, and P processes,
each reading rows [p·b, (p+1)·b) with b = B / P, see together what one process would. An epoch may end inside
a batch.

A batch is a dict of numpy arrays: image uint8 [b, S, S, 3], label int32 [b] (-1: unlabelled), index int64 [b]
(of the example in the data set); evaluation adds valid bool [b], and training with crop="joint" map uint8
[b, S, S] (255: ignored). Everything random after the crop (flips,
colour) happens on the device (augment.py).

Grain works through indexed sets in threads, a chunk of rows at a time: its cost for each element it
handles (about 0.2 ms) would otherwise exceed that of a small image. Sets that can only be read in
sequence (`Stream`) are decoded and cropped by the same code, under a thread pool.
"""

import collections
import dataclasses
import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from absl import logging
from numpy.random.bit_generator import ISeedSequence

from dtm_jax import progress
from dtm_jax.arrays import Batch
from dtm_jax.data.image_decoding import CROPS, MAX_PIXELS, CorruptImageError, EvalView, TrainView, decode
from dtm_jax.data.label_maps import JointView, Map, MapCoding, decode_pair
from dtm_jax.data.resampling import Pixels
from dtm_jax.errors import NotThereError, OptionError, UserError
from dtm_jax.normalizations import Triple

Example = dict[str, Any]
"""image: encoded bytes or uint8 [H, W, 3]; label: int (-1: none); name: for messages. A Stream adds index.
Where there are label maps also map: encoded bytes or integers [H, W]; map_name."""

ATTEMPTS = 10
CHUNK = 32


@runtime_checkable
class Source(Protocol):
  """Examples by index; called from many threads at once."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...


@runtime_checkable
class Stream(Protocol):
  """Examples in sequence only; the processes share them out disjointly."""

  def num_local(self, process_index: int, process_count: int) -> int:
    """How many examples this process reads in an epoch."""

  def read(self, process_index: int, process_count: int, seed: int | None, skip: int) -> Iterator[Example]:
    """One epoch without its first `skip` examples, shuffled by `seed` (None: in order)."""


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A named set of images.

  `class_names` is None where there are no labels, `image_size` where images are not all squares of one side,
  `mean_and_std` of the training images' channels where they are not known beforehand, and `maps` where there
  are no label maps. `labels`, int [num_examples], is None where they are not known without reading examples.
  """

  name: str
  num_examples: int
  class_names: tuple[str, ...] | None
  source: Source | Stream
  image_size: int | None = None
  mean_and_std: tuple[Triple, Triple] | None = None
  maps: MapCoding | None = None
  labels: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)
  warned_of: set[str] = dataclasses.field(default_factory=set, compare=False, repr=False)
  """Corrupt and missing examples that the log has named."""


_num_corrupt = 0
_corrupt_lock = threading.Lock()


def corrupt_count() -> int:
  """How many times this process has met a corrupt or missing image."""
  return _num_corrupt


def require_labels(batch: Batch, dataset: Dataset) -> Batch:
  """The batch as it is, if every valid example has a label 0..G-1.

  Raises:
    OptionError: one has not, or the data set has no classes.
  """
  _require_range(batch["label"], batch["index"], batch.get("valid", True), dataset)
  return batch


def require_known_labels(dataset: Dataset) -> None:
  """Like `require_labels` for all examples, where their labels are known: before hours of training.

  Raises:
    OptionError: one has no label 0..G-1, or the data set has no classes.
  """
  labels = np.zeros(0, int) if dataset.labels is None else dataset.labels
  _require_range(labels, np.arange(len(labels)), True, dataset)


def _require_range(label: np.ndarray, index: np.ndarray, valid: np.ndarray | bool, dataset: Dataset) -> None:
  if dataset.class_names is None:
    raise OptionError(f"Data set {dataset.name!r} has no class names, hence no labels.")
  wrong = ((label < 0) | (label >= len(dataset.class_names))) & valid
  if wrong.any():
    place = int(wrong.argmax())
    hint = " It lies in no class folder, or its label is not told." if label[place] == -1 else ""
    raise OptionError(
      f"Example {index[place]} of data set {dataset.name!r} has label {label[place]}, which is none "
      f"of its {len(dataset.class_names)} classes.{hint}"
    )


def train_batches(
  dataset: Dataset,
  *,
  batch_size: int,
  image_size: int,
  seed: int,
  start: int = 0,
  crop: str = "random_resized",
  max_pixels: int = MAX_PIXELS,
  num_threads: int = 16,
  prefetch: int = 2,
  process_index: int | None = None,
  process_count: int | None = None,
  **options,
) -> Iterator[Batch]:
  """This process's rows of the global batches after the first `start` examples of the stream, without end.

  `crop` and `options` are those of `image_decoding.TrainView`; with crop="joint", of an image and its label
  map, `options` are those of `label_maps.JointView`. `prefetch` batches are made ahead, by `num_threads`
  threads.

  A corrupt image is replaced by another example, drawn from (seed, g), and so is one that cannot be read.
  It is named in the log once and counted each time. An image of more than `max_pixels` counts as corrupt.
  In a `Stream` the replacement comes from the same batch, the order holds for one number of processes, and
  a start in mid-epoch reads past what came before it in that epoch.

  Raises:
    OptionError: the data set is empty, batch_size is not a multiple of process_count, an unknown crop, or a
      joint one of a data set without label maps.
    CorruptImageError: an image and all its replacements are corrupt.
    UserError: they cannot be read.
  """
  rows = _Rows(dataset, batch_size, process_index, process_count, start)
  decode_example, view = _train_view(dataset, image_size, crop, max_pixels, options)

  def load(read: Callable[[int], Example], index: int, count: int, place: int) -> Batch:
    rng = np.random.Generator(np.random.Philox(_PhiloxKey(seed, place)))
    decoded, example, index = _readable(dataset, read, decode_example, index, count, rng)
    return view(decoded, rng) | {"label": example["label"], "index": example.get("index", index)}

  if isinstance(dataset.source, Stream):

    def load_stream(local: list[Example], step: int, row: int) -> Batch:
      return load(local.__getitem__, row, len(local), rows.place(step, row))

    examples = _epochs(dataset.source, rows, seed)
    return _pooled(examples, load_stream, rows.local_size, num_threads, prefetch)

  def load_indexed(step: int, row: int) -> Batch:
    place, n = rows.place(step, row), dataset.num_examples
    return load(dataset.source.__getitem__, _shuffled(place, n, seed), n, place)

  steps = range(sys.maxsize // 2**32)
  return _chunked(steps, load_indexed, rows.local_size, num_threads, prefetch)


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
  """Every example once, in order, in whole batches: the same number of batches on every process.

  `resize` and the options after it are those of `image_decoding.EvalView`. Padding has valid=False and
  index -1. A corrupt image has valid=False and its own index; it is named in the log once and counted each
  time. An image of more than `max_pixels` counts as corrupt. `max_batches` ends it earlier.

  Raises:
    OptionError: the data set is empty, batch_size is not a multiple of process_count, or an unknown option.
    UserError: a file is there and cannot be read. One that is gone counts as corrupt.
  """
  rows = _Rows(dataset, batch_size, process_index, process_count)
  view = EvalView(image_size, resize, interpolation, antialias)
  blank = np.zeros((image_size, image_size, 3), np.uint8)
  steps = range(-(-dataset.num_examples // batch_size))[:max_batches]
  tracked = functools.partial(
    progress.track, what=f"Evaluating on {dataset.name!r}", total=len(steps), unit="batches"
  )

  def load(example: Example | None, index: int) -> Batch:
    row = {"image": blank, "label": -1, "index": index, "valid": False}
    if example is not None:
      row.update(label=example["label"], index=example.get("index", index))
      try:
        row.update(image=view(decode(example["image"], max_pixels)), valid=True)
      except CorruptImageError as error:
        _report(dataset, example["name"], error)
    return row

  if isinstance(dataset.source, Stream):
    examples = dataset.source.read(rows.process_index, rows.process_count, None, 0)
    total = len(steps) * rows.local_size
    padded = itertools.islice(itertools.chain(examples, itertools.repeat(None)), total)

    def load_stream(local: list[Example | None], step: int, row: int) -> Batch:
      return load(local[row], -1)

    return tracked(_pooled(padded, load_stream, rows.local_size, num_threads, prefetch))

  def load_indexed(step: int, row: int) -> Batch:
    index = rows.place(step, row)
    return load(_existing(dataset, index), index) if index < dataset.num_examples else load(None, -1)

  return tracked(_chunked(steps, load_indexed, rows.local_size, num_threads, prefetch))


def whole_examples(
  dataset: Dataset,
  *,
  num_threads: int = 16,
  process_index: int | None = None,
  process_count: int | None = None,
) -> Iterator[tuple[Pixels, Map]]:
  """The images of this process's part of the data set in full size, with their label maps, each once.

  A corrupt one is left out; it is named in the log once and counted each time.

  Raises:
    OptionError: the data set is empty or has no label maps; or see `label_maps.decode_pair`.
    UserError: a file is there and cannot be read. One that is gone counts as corrupt.
  """
  maps = require_maps(dataset)
  count = jax.process_count() if process_count is None else process_count
  rows = _Rows(dataset, count, process_index, count)
  if isinstance(dataset.source, Stream):
    parts = dataset.source.read(rows.process_index, count, None, 0)
    reads = (functools.partial(lambda example: example, example) for example in parts)
  else:
    indices = range(rows.process_index, dataset.num_examples, count)
    reads = (functools.partial(_existing, dataset, index) for index in indices)

  def load(read: Callable[[], Example | None]) -> tuple[Pixels, Map] | None:
    if (example := read()) is None:
      return None
    try:
      return decode_pair(example, maps)
    except CorruptImageError as error:
      _report(dataset, example["name"], error)

  total = -(-dataset.num_examples // count)
  reads = progress.track(reads, f"Evaluating on {dataset.name!r}", total, "images")
  pending = collections.deque()
  with ThreadPoolExecutor(num_threads) as pool:
    for read in reads:
      pending.append(pool.submit(load, read))
      if len(pending) > num_threads and (pair := pending.popleft().result()):
        yield pair
    yield from filter(None, (each.result() for each in pending))


def require_maps(dataset: Dataset) -> MapCoding:
  """How the data set writes its label maps.

  Raises:
    OptionError: it has none.
  """
  if dataset.maps is None:
    raise OptionError(
      f"Data set {dataset.name!r} has no label maps. Those of `segmentation_folder` and `ade20k` have."
    )
  return dataset.maps


def _train_view(
  dataset: Dataset, image_size: int, crop: str, max_pixels: int, options: dict
) -> tuple[Callable, Callable]:
  """What decodes an example, and what makes arrays by name of that and a generator."""
  if crop != "joint":
    if crop not in CROPS:
      raise OptionError(f"Unknown crop {crop!r}. Available: {', '.join((*CROPS, 'joint'))}.")
    view = TrainView(image_size, crop, **options)
    decode_image = lambda example: decode(example["image"], max_pixels)
    return decode_image, lambda image, rng: {"image": view(image, rng)}
  maps, joint_view = require_maps(dataset), JointView(image_size, **options)

  def both(pair: tuple[Pixels, Map], rng: np.random.Generator) -> Batch:
    return dict(zip(("image", "map"), joint_view(*pair, rng), strict=True))

  return lambda example: decode_pair(example, maps, max_pixels), both


class _Rows:
  """Which rows of the global batches after the first `start` examples this process reads."""

  def __init__(self, dataset: Dataset, batch_size: int, index: int | None, count: int | None, start: int = 0):
    self.process_index = jax.process_index() if index is None else index
    self.process_count = jax.process_count() if count is None else count
    if dataset.num_examples == 0:
      raise OptionError(f"Dataset {dataset.name!r} is empty.")
    if batch_size % self.process_count:
      raise OptionError(f"{batch_size=} is not a multiple of the {self.process_count} processes.")
    self.batch_size, self.start = batch_size, start
    self.local_size = batch_size // self.process_count

  def place(self, step: int, row: int) -> int:
    return self.start + step * self.batch_size + self.process_index * self.local_size + row


@functools.lru_cache(maxsize=8)
def _epoch_seed(seed: int, epoch: int) -> int:
  return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def _shuffled(place: int, n: int, seed: int) -> int:
  """A permutation of 0..n-1 for each epoch, evaluated at one place without the others being made."""
  epoch, place = divmod(place, n)
  return grain.experimental.index_shuffle(place, max_index=n - 1, seed=_epoch_seed(seed, epoch), rounds=4)


class _PhiloxKey(ISeedSequence):
  """`Philox(key=...)` as a seed: that asks the system for entropy first, which it does not use."""

  def __init__(self, *key: int):
    self._key = np.array(key, np.uint64)

  def generate_state(self, n_words, dtype=np.uint32):
    return self._key


def _readable(
  dataset: Dataset,
  read: Callable[[int], Example],
  decode_example: Callable[[Example], Any],
  index: int,
  count: int,
  rng: np.random.Generator,
) -> tuple[Any, Example, int]:
  """`read(index)` decoded, that example and index; of another drawn by `rng` while those cannot be used."""
  names, error = [], None
  for _ in range(1 + ATTEMPTS):
    try:
      example = read(index)
    except OSError as unreadable:
      name, error = unreadable.filename or f"example {index} of {dataset.name}", unreadable
    else:
      try:
        return decode_example(example), example, index
      except CorruptImageError as corrupt:
        name, error = example["name"], corrupt
    _report(dataset, name, error)
    names.append(str(name))
    index = int(rng.integers(count))
  kind = {CorruptImageError: CorruptImageError, FileNotFoundError: NotThereError}.get(type(error), UserError)
  raise kind(
    f"An image and its {ATTEMPTS} replacements are corrupt or cannot be read: {', '.join(names)}. "
    f"Last error: {error}"
  ) from error


def _existing(dataset: Dataset, index: int) -> Example | None:
  """An example, or None if its file is gone.

  Raises:
    UserError: it is there and cannot be read: a result without it would be wrong for a reason that may pass.
  """
  try:
    return dataset.source[index]
  except FileNotFoundError as error:
    _report(dataset, error.filename or f"example {index} of {dataset.name}", error)
  except OSError as error:
    raise UserError(f"Example {index} of data set {dataset.name!r} cannot be read: {error}") from error


def _report(dataset: Dataset, name: str, error: Exception) -> None:
  global _num_corrupt
  with _corrupt_lock:
    _num_corrupt += 1
    first = name not in dataset.warned_of
    dataset.warned_of.add(name)
  if first:
    what = "Corrupt image" if isinstance(error, CorruptImageError) else "Unreadable file"
    logging.warning("%s %s is left out, each time; corrupt_images counts on: %s", what, name, error)


def _stack(rows: list[Batch]) -> Batch:
  dtypes = {"image": np.uint8, "map": np.uint8, "label": np.int32, "index": np.int64, "valid": np.bool_}
  return {name: np.array([row[name] for row in rows], dtypes[name]) for name in rows[0]}


def _concatenate(chunks: list[Batch]) -> Batch:
  return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _chunked(
  steps: range, load: Callable[[int, int], Batch], local_size: int, num_threads: int, prefetch: int
) -> Iterator[Batch]:
  """Batches of rows `load(step, row)`, at most CHUNK rows to one element of Grain."""
  chunks = -(-local_size // CHUNK)

  def load_chunk(place: int) -> Batch:
    step, chunk = divmod(place, chunks)
    first, last = (local_size * edge // chunks for edge in (chunk, chunk + 1))
    return _stack([load(step, row) for row in range(first, last)])

  ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(num_threads, prefetch * chunks))
  places = grain.MapDataset.range(steps.start * chunks, steps.stop * chunks)
  return iter(places.map(load_chunk).to_iter_dataset(ahead).batch(chunks, batch_fn=_concatenate))


def _epochs(stream: Stream, rows: _Rows, seed: int) -> Iterator[Example]:
  """This process's examples of an endless stream, after its share of the first `rows.start`."""
  process = rows.process_index, rows.process_count
  epoch, skip = divmod(rows.start // rows.process_count, stream.num_local(*process))
  while True:
    yield from stream.read(*process, _epoch_seed(seed, epoch), skip)
    epoch, skip = epoch + 1, 0


def _pooled(
  examples: Iterator[Example | None],
  load: Callable[[list, int, int], Batch],
  local_size: int,
  num_threads: int,
  prefetch: int,
) -> Iterator[Batch]:
  """Batches of `load(examples of the batch, step, row)`, `prefetch` batches ahead of the reader."""
  examples, pending = iter(examples), collections.deque()
  with ThreadPoolExecutor(num_threads) as pool:
    for step in itertools.count():
      local = list(itertools.islice(examples, local_size))
      if local:
        pending.append([pool.submit(load, local, step, row) for row in range(local_size)])
      if len(pending) > prefetch or not local:
        if not pending:
          return
        yield _stack([row.result() for row in pending.popleft()])
