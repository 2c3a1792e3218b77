"""Options that a config may leave to the data set: image size, and mean and deviation of the channels."""

import copy
import functools
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from dtm_jax import progress
from dtm_jax.arrays import Float
from dtm_jax.data import Dataset, Example, Stream
from dtm_jax.data.image_decoding import MAX_PIXELS, CorruptImageError, decode
from dtm_jax.errors import OptionError
from dtm_jax.normalizations import Triple

SAMPLE = 2000


def resolve(config: ConfigDict, dataset: Dataset) -> ConfigDict:
  """Return a copy of `config` with the options that it leaves to the training set `dataset`.

  A `data.image_size` of 0 or None becomes the side of the images. An `augment.normalization` of "dataset"
  becomes the (mean, std) of their channels, which are known constants or else measured. Options that refer
  to these follow. `config` itself stays as it is.

  Raises:
    OptionError: the size is left to a data set with images of several sizes.
  """
  config = copy.deepcopy(config)  # keeps references between options, unlike ConfigDict's own copies
  if not config.data.image_size:
    if dataset.image_size is None:
      raise OptionError(
        f"data.image_size={config.data.image_size} leaves the size to data set {dataset.name!r}, and its "
        "images have several sizes. Set data.image_size."
      )
    config.data.image_size = dataset.image_size
    logging.info("data.image_size=%d, the size of the images of %r.", dataset.image_size, dataset.name)
  augment = config.get("augment", {})
  if augment.get("normalization") == "dataset":
    with augment.ignore_type():
      augment.normalization = dataset.mean_and_std or measure(
        dataset, max_pixels=config.data.get("view", {}).get("max_pixels", MAX_PIXELS)
      )
    logging.info("augment.normalization=%s, from the images of %r.", augment.normalization, dataset.name)
  return config


def measure(dataset: Dataset, sample: int = SAMPLE, max_pixels: int = MAX_PIXELS) -> tuple[Triple, Triple]:
  """Return the mean and standard deviation of the channels, values in [0, 1], to four decimals.

  Reads evenly spaced images, or the first images of a `Stream`. Every process reads the same images. Every
  image has the same weight, whatever its size. Corrupt images and images of more than `max_pixels` are left
  out.

  Args:
    sample: number of images to read, at most.

  Raises:
    OptionError: all images of the sample are corrupt.
  """
  histogram = functools.partial(_histogram, max_pixels=max_pixels)
  with ThreadPoolExecutor(16) as pool:
    what, total = f"Measuring the channels of {dataset.name!r}", min(sample, dataset.num_examples)
    found = progress.track(pool.map(histogram, _sample(dataset, sample)), what, total, "images")
    histograms = [each for each in found if each is not None]
  if not histograms:
    raise OptionError(f"None of {total} sampled images of data set {dataset.name!r} can be read.")
  share_3V, level_V = np.mean(histograms, axis=0), np.arange(256) / 255
  mean_3 = share_3V @ level_V
  std_3 = np.sqrt(share_3V @ level_V**2 - mean_3**2)
  std_3 = np.maximum(std_3, 1 / 255)  # images of one colour have no deviation
  return tuple(np.round(mean_3, 4).tolist()), tuple(np.round(std_3, 4).tolist())


def _sample(dataset: Dataset, sample: int) -> Iterable[Callable[[], Example]]:
  """Return one function for each example of the sample, which reads it."""
  if isinstance(dataset.source, Stream):
    examples = itertools.islice(dataset.source.read(0, 1, None, 0), sample)
    return (functools.partial(lambda example: example, example) for example in examples)
  count = min(sample, dataset.num_examples)
  places = (i * dataset.num_examples // count for i in range(count))
  return (functools.partial(dataset.source.__getitem__, place) for place in places)


def _histogram(read: Callable[[], Example], max_pixels: int) -> Float[np.ndarray, "3 256"] | None:
  """Return the share of each level in each channel, or None if the image is corrupt or missing."""
  try:
    pixels = decode(read()["image"], max_pixels)
  except (CorruptImageError, FileNotFoundError):
    return None
  counts = [np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)]
  return np.array(counts) / pixels[..., 0].size
