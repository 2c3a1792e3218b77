"""Training batches as a function of (seed, step) alone.

order.py decides which example the place g of the training stream shows. Its crop is drawn from a generator
that is keyed by (seed, g).

No state is kept, so any step is reached at once. P processes together make the batches that one process would
make. An epoch may end inside a batch.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dtm_jax.arrays import Batch
from dtm_jax.data.dataset import Dataset, Example, Stream, require_maps
from dtm_jax.data.image_decoding import MAX_PIXELS, decode
from dtm_jax.data.label_maps import Map, decode_pair
from dtm_jax.data.order import epoch_seed, example_at, generator
from dtm_jax.data.pools import Rows, batches_by_index, batches_in_sequence
from dtm_jax.data.reading import read_or_replace
from dtm_jax.data.resampling import Pixels
from dtm_jax.data.views import CROPS, JointView, TrainView
from dtm_jax.errors import check_choice

ENDLESS = range(sys.maxsize // 2**32)


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
  **options: Any,
) -> Iterator[Batch]:
  """Yield this process's rows of the global batches without end, b = batch_size / process_count rows each.

  A batch holds NumPy arrays, with S = image_size:

      image    uint8 [b, S, S, 3]
      label    int32 [b]; -1 if there is no label
      index    int64 [b]; place of the example in the data set
      map      uint8 [b, S, S]; 255 where a pixel is ignored; only with crop="joint"

  Flips and colours happen on the device, see augment.py.

  A corrupt or unreadable image is replaced by another example, which is drawn from (seed, g); see reading.py.
  In a `Stream` the replacement comes from the same batch, and the order depends on the number of processes. A
  start inside an epoch of a `Stream` reads past the examples that come before it in that epoch.

  Args:
    batch_size: B, rows of the global batch.
    start: number of examples of the stream before the first batch.
    crop: "random_resized", "pad" or "none" of `views.TrainView`, or "joint" for an image with its label map.
    max_pixels: a larger image counts as corrupt.
    num_threads: threads that decode and crop.
    prefetch: number of batches that are made in advance.
    process_index, process_count: default to those of JAX.
    options: the other options of `views.TrainView`, or of `views.JointView` with crop="joint".

  Raises:
    OptionError: the data set is empty, batch_size is not a multiple of process_count, or the crop is unknown.
      Also if the crop is "joint" and the data set has no label maps.
    CorruptImageError: an image and all its replacements are corrupt.
    UserError: an image and all its replacements cannot be read.
  """
  rows = Rows.of_process(dataset, batch_size, process_index, process_count, start)
  decode_example, view = _decode_and_view(dataset, image_size, crop, max_pixels, options)
  source = dataset.source

  def load(read: Callable[[int], Example], index: int, count: int, place: int) -> Batch:
    rng = generator(seed, place)
    decoded, example, index = read_or_replace(dataset, read, decode_example, index, count, rng)
    return view(decoded, rng) | {"label": example["label"], "index": example.get("index", index)}

  if isinstance(source, Stream):

    def load_streamed(local: list[Example], step: int, row: int) -> Batch:
      return load(local.__getitem__, row, len(local), rows.place(step, row))

    examples = _endless_epochs(source, rows, seed)
    return batches_in_sequence(examples, load_streamed, rows.local_size, num_threads, prefetch)

  def load_indexed(step: int, row: int) -> Batch:
    place, n = rows.place(step, row), dataset.num_examples
    return load(source.__getitem__, example_at(place, n, seed), n, place)

  return batches_by_index(ENDLESS, load_indexed, rows.local_size, num_threads, prefetch)


def _decode_and_view(
  dataset: Dataset, image_size: int, crop: str, max_pixels: int, options: dict[str, Any]
) -> tuple[Callable[[Example], Any], Callable[[Any, np.random.Generator], Batch]]:
  """Return a function that decodes an example, and one that crops the result with a generator."""
  check_choice("crop", crop, (*CROPS, "joint"))
  if crop != "joint":
    view = TrainView(image_size, crop, **options)
    decode_image = lambda example: decode(example["image"], max_pixels)
    return decode_image, lambda image, rng: {"image": view(image, rng)}
  maps, joint_view = require_maps(dataset), JointView(image_size, **options)

  def view_both(pair: tuple[Pixels, Map], rng: np.random.Generator) -> Batch:
    return dict(zip(("image", "map"), joint_view(*pair, rng), strict=True))

  return lambda example: decode_pair(example, maps, max_pixels), view_both


def _endless_epochs(stream: Stream, rows: Rows, seed: int) -> Iterator[Example]:
  """Yield this process's examples epoch after epoch, without its share of the first `rows.start`."""
  process = rows.process_index, rows.process_count
  epoch, skip = divmod(rows.start // rows.process_count, stream.num_local(*process))
  while True:
    yield from stream.read(*process, epoch_seed(seed, epoch), skip)
    epoch, skip = epoch + 1, 0
