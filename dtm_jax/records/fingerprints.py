"""Compute checksums of weights and images, to check whether they are the same as at the last start."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dtm_jax.arrays import PyTree, named_leaves
from dtm_jax.data import Dataset, Stream

SAMPLE = 8
"""Number of examples of a data set that are compared."""


def of_arrays(arrays: PyTree) -> int | None:
  """Return one CRC-32 of names, shapes, types and bytes of host arrays, or None if there are no arrays."""
  leaves = named_leaves(arrays)
  if not leaves:
    return None
  crc = 0
  for name, leaf in leaves.items():
    leaf = np.ascontiguousarray(leaf)
    crc = zlib.crc32(f"{name} {leaf.shape} {leaf.dtype}".encode(), crc)
    crc = zlib.crc32(leaf.reshape(-1).view(np.uint8).data, crc)
  return crc


def of_dataset(dataset: Dataset) -> dict[str, Any]:
  """Return "num_examples", and in "sample" the checksums of a few examples; None if one cannot be read.

  The sample is evenly spaced. Of a `Stream` it is the first examples.
  """
  if isinstance(dataset.source, Stream):
    examples = dataset.source.read(0, 1, None, 0)
    read: Callable[[int], Any] = lambda place: next(examples)
  else:
    read = dataset.source.__getitem__
  count = min(SAMPLE, dataset.num_examples)
  places = [i * dataset.num_examples // count for i in range(count)]
  return {"num_examples": dataset.num_examples, "sample": [_of_example(read, place) for place in places]}


def same_dataset(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
  """Return whether two results of `of_dataset` can belong to the same images.

  Examples that could not be read on one of the two occasions are not compared.
  """
  if one["num_examples"] != other["num_examples"]:
    return False
  pairs = zip(one["sample"], other["sample"], strict=False)
  return all(a == b for a, b in pairs if a is not None and b is not None)


def _of_example(read: Callable[[int], Any], place: int) -> int | None:
  try:
    example = read(place)
    image = example["image"]
    content = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
    return zlib.crc32(f"{int(example['label'])}".encode(), zlib.crc32(content))
  except Exception:  # the reader of the training data reports an image that cannot be read
    return None
