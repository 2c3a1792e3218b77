"""The types that every data set shares, and the checks of its labels and label maps."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dtm_jax.arrays import Batch
from dtm_jax.data.label_maps import MapCoding
from dtm_jax.errors import OptionError
from dtm_jax.normalizations import Triple

Example = dict[str, Any]
"""One example of a data set:

    image     encoded bytes, or uint8 [H, W, 3]
    label     int; -1 without a label
    name      the words that messages use, such as a path
    index     int, the place in the data set; only a Stream sets it
    map       encoded bytes, or integers [H, W]; only in data sets with label maps
    map_name  like name, for the map
"""


@runtime_checkable
class Source(Protocol):
  """Examples by index. Many threads call it at the same time. A list of examples is a Source."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Example: ...


@runtime_checkable
class Stream(Protocol):
  """Examples that can only be read in sequence. Every process reads a disjoint part of them."""

  def num_local(self, process_index: int, process_count: int) -> int:
    """Return how many examples this process reads in an epoch."""
    ...

  def read(self, process_index: int, process_count: int, seed: int | None, skip: int) -> Iterator[Example]:
    """Yield this process's part of one epoch, without its first `skip` examples.

    The seed decides the order; None keeps the order of the data set.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A named set of images.

  Attributes:
    class_names: names of the G classes in the order of their labels; None without labels.
    image_size: side in pixels if all images are squares of one size, else None.
    mean_and_std: mean and standard deviation of the training images' channels, values in [0, 1]; None if
      they are not known in advance.
    maps: how the label maps are written; None without label maps.
    labels: int [num_examples]; None if they are not known without reading the examples.
    warned_of: names of the corrupt and missing examples that the log has reported.
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


def require_labels(batch: Batch, dataset: Dataset) -> Batch:
  """Return the batch unchanged if every valid example has a label in 0..G-1.

  Raises:
    OptionError: a label is out of range, or the data set has no class names.
  """
  _require_range(batch["label"], batch["index"], batch.get("valid", True), dataset)
  return batch


def require_known_labels(dataset: Dataset) -> None:
  """Check `dataset.labels`, if they are known, before hours of training.

  Raises:
    OptionError: a label is out of range 0..G-1, or the data set has no class names.
  """
  labels = np.zeros(0, int) if dataset.labels is None else dataset.labels
  _require_range(labels, np.arange(len(labels)), True, dataset)


def _require_range(label: np.ndarray, index: np.ndarray, valid: np.ndarray | bool, dataset: Dataset) -> None:
  if dataset.class_names is None:
    raise OptionError(f"Data set {dataset.name!r} has no class names, so it has no labels.")
  wrong = ((label < 0) | (label >= len(dataset.class_names))) & valid
  if wrong.any():
    place = int(wrong.argmax())
    hint = " It lies in no class folder, or its label is unknown." if label[place] == -1 else ""
    raise OptionError(
      f"Example {index[place]} of data set {dataset.name!r} has label {label[place]}, which is none "
      f"of its {len(dataset.class_names)} classes.{hint}"
    )


def require_maps(dataset: Dataset) -> MapCoding:
  """Return how the data set writes its label maps.

  Raises:
    OptionError: the data set has no label maps.
  """
  if dataset.maps is None:
    raise OptionError(
      f"Data set {dataset.name!r} has no label maps. `segmentation_folder` and `ade20k` have label maps."
    )
  return dataset.maps
