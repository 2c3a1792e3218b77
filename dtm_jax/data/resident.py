"""Load a whole data set of small images, which a run then keeps on its devices, and choose its examples.

loaded = load(dataset, limit=2**30)
rows = loaded.order.rows(batch_size=128, seed=0)
next(rows)                      # {"index": int32 [b], "place": uint32 [b, 2]}
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dtm_jax import progress
from dtm_jax.arrays import Batch, Int, UInt8
from dtm_jax.data.dataset import Dataset, Example, Stream, require_labels
from dtm_jax.data.image_decoding import MAX_PIXELS, CorruptImageError, decode
from dtm_jax.data.order import example_at, generator
from dtm_jax.data.pools import Rows
from dtm_jax.data.reading import read_or_replace
from dtm_jax.errors import OptionError

CHUNK = 1024
"""Images that are decoded ahead."""


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
  """Which examples the rows of a run show.

  Attributes:
    unusable: the names and errors of the images that are corrupt or cannot be read, by index.
  """

  dataset: Dataset
  unusable: Mapping[int, tuple[str, Exception]]

  def rows(
    self,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
  ) -> Iterator[Batch]:
    """Yield this process's rows of the global batches without end, b = batch_size / process_count rows each.

    The examples and their order are those of `train_batches` with the same arguments. A batch holds:

        index    int32 [b]; place of the example in the data set
        place    uint32 [b, 2]; epoch and place in the epoch, which identify the row among all rows of the run

    If an image cannot be used, its replacement is also the one of `train_batches`. The exception is a set
    that `train_batches` reads in sequence (`Stream`). Here its order is that of a set with an index.

    Raises:
      OptionError: batch_size is not a multiple of process_count.
    """
    n = self.dataset.num_examples
    share = Rows.of_process(self.dataset, batch_size, process_index, process_count, start)
    for step in itertools.count():
      places = [share.place(step, row) for row in range(share.local_size)]
      index = [self._usable(example_at(place, n, seed), place, seed) for place in places]
      yield {
        "index": np.array(index, np.int32),
        "place": np.array([divmod(place, n) for place in places], np.uint32),
      }

  def _usable(self, index: int, place: int, seed: int) -> int:
    """Return the example, or its replacement if it cannot be used."""
    if index not in self.unusable:
      return index

    def check(example: Example) -> None:
      if isinstance(error := example["error"], CorruptImageError):
        raise error

    def read(index: int) -> Example:
      name, error = self.unusable.get(index, ("", None))
      if isinstance(error, OSError):
        raise error
      return {"name": name, "error": error}

    n = self.dataset.num_examples
    return read_or_replace(self.dataset, read, check, index, n, generator(seed, place))[2]


@dataclasses.dataclass(frozen=True, eq=False)
class Resident:
  """All images of a data set.

  Attributes:
    image: zeros where an image cannot be used.
    label: -1 without a label, or where an image cannot be used.
  """

  order: Order
  image: UInt8[np.ndarray, "n H W 3"]
  label: Int[np.ndarray, " n"]

  def require_labels(self) -> None:
    """Check the labels of all images that can be used.

    Raises:
      OptionError: see `dataset.require_labels`.
    """
    index = np.arange(len(self.label))
    usable = ~np.isin(index, list(self.order.unusable))
    require_labels({"label": self.label, "index": index, "valid": usable}, self.order.dataset)


def load(dataset: Dataset, *, limit: int, max_pixels: int = MAX_PIXELS, num_threads: int = 16) -> Resident:
  """Decode all images of a data set.

  Args:
    limit: the most bytes that the images may have.
    max_pixels: a larger image counts as corrupt.
    num_threads: threads that decode.

  Raises:
    OptionError: the images have several sizes, need more than `limit` bytes, or none can be used.
  """
  n = dataset.num_examples
  images: np.ndarray | None = None
  labels, unusable = np.full(n, -1, np.int32), {}
  what = f"Loading data set {dataset.name!r}"
  for index, name, decoded, label in progress.track(
    _decoded(dataset, max_pixels, num_threads), what, n, "images"
  ):
    if isinstance(decoded, Exception):
      unusable[index] = name, decoded
      continue
    if images is None:
      _require_space(dataset, decoded, limit)
      images = np.zeros((n, *decoded.shape), np.uint8)
    if decoded.shape != images.shape[1:]:
      height, width = images.shape[1:3]
      raise OptionError(
        f"data.device_resident=True needs images of one size. Data set {dataset.name!r} has images of "
        f"{width}x{height} pixels, and {name} has {decoded.shape[1]}x{decoded.shape[0]}. Set it to False."
      )
    images[index], labels[index] = decoded, label
  if images is None:
    raise OptionError(f"None of the {n} images of data set {dataset.name!r} can be read.")
  return Resident(Order(dataset, unusable), images, labels)


def _require_space(dataset: Dataset, image: np.ndarray, limit: int) -> None:
  needed = dataset.num_examples * image.nbytes
  if needed > limit:
    height, width = image.shape[:2]
    raise OptionError(
      f"data.device_resident=True needs {needed / 2**30:.2f} GiB on every device for the "
      f"{dataset.num_examples:,} images of {width}x{height} pixels of data set {dataset.name!r}. At most "
      f"{limit / 2**30:.2f} GiB may be used. Set it to False."
    )


_Read = tuple[int, str, np.ndarray | Exception, int]
"""Index, name, pixels or what is wrong with the image, and label."""


def _decoded(dataset: Dataset, max_pixels: int, num_threads: int) -> Iterator[_Read]:
  """Yield all examples in the order of the data set, decoded by threads."""
  source = dataset.source

  def decode_example(index: int, example: Example) -> _Read:
    try:
      return index, str(example["name"]), decode(example["image"], max_pixels), int(example["label"])
    except CorruptImageError as error:
      return index, str(example["name"]), error, -1

  def read(index: int) -> _Read:
    try:
      return decode_example(index, source[index])  # type: ignore[index]
    except OSError as error:
      return index, str(error.filename or f"example {index} of {dataset.name}"), error, -1

  with ThreadPoolExecutor(num_threads) as pool:
    if isinstance(source, Stream):
      examples = iter(source.read(0, 1, None, 0))
      while chunk := list(itertools.islice(examples, CHUNK)):
        yield from pool.map(lambda example: decode_example(example["index"], example), chunk)
      return
    for first in range(0, dataset.num_examples, CHUNK):
      yield from pool.map(read, range(first, min(first + CHUNK, dataset.num_examples)))
