"""mIoU of a segmenter over every labelled pixel of a split, by sliding windows at one scale."""

import collections
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils

from dtm_jax import data, evaluators, plugins
from dtm_jax.arrays import Int, PyTree
from dtm_jax.data.resampling import Pixels
from dtm_jax.evaluators import Context
from dtm_jax.evaluators import _sliding_windows as segmentation
from dtm_jax.training import mesh as meshes


class Evaluator:
  """Pixels are counted in integers, over the whole set, into one confusion matrix.

  Every process reads its own part of the images and puts its own scores together; a device sees `windows`
  of them at a time whatever the number of devices, so that it computes the same numbers.

  Args:
    context: what the run gives; `output` names the one that gives logits [B, h, w, G].
    dataset: options of the data set, `name` among them; it must have label maps.
    image_size, longer: sides that images are resized to, see `segmentation.Sliding`.
    crop: side of a window, which the model must take; default image_size.
    stride: from window to window; default two thirds of the crop (341 of 512), as BEiT has it.
    windows: a device's in one call.
  """

  def __init__(
    self,
    context: Context,
    *,
    dataset,
    output: str = "logits",
    split: str = "val",
    image_size: int,
    longer: int | None = None,
    crop: int | None = None,
    stride: int | None = None,
    windows: int = 1,
    num_threads: int = 16,
  ):
    self._predict = context.function(output)
    self._mesh = context.mesh
    self._dataset = plugins.build("datasets", dataset, split=split)
    evaluators.require_same_classes(self._dataset, context.training)
    self._num_classes = data.require_maps(self._dataset).num_classes
    crop = crop or image_size
    self._sliding = segmentation.Sliding(image_size, crop, stride or 2 * crop // 3, longer)
    self._batch_size = windows * len(context.mesh.local_devices)
    self._num_threads = num_threads

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yields miou, pixel_accuracy and mean_accuracy: see `segmentation.scores`.

    Raises:
      ValueError: no pixel is labelled, or the model has another number of classes than the data set.
    """
    total = np.zeros((self._num_classes,) * 2, np.int64)
    with ThreadPoolExecutor(self._num_threads) as pool:
      pending = collections.deque()
      for image in self._images(state):
        pending.append(pool.submit(image.confusion, self._num_classes))
        if len(pending) > self._num_threads:
          total += pending.popleft().result()
      total += sum(each.result() for each in pending)
    yield from segmentation.scores(_sum_over_processes(total)).items()

  def _images(self, state: PyTree) -> Iterator["_Image"]:
    """This process's images as soon as the scores of all their windows are there."""
    examples = data.whole_examples(self._dataset, num_threads=self._num_threads)
    images = (_Image(*self._sliding.windows(pixels), label_map) for pixels, label_map in examples)
    windows = ((image, window) for image in images for window in image.windows)
    while _anywhere(bool(batch := list(itertools.islice(windows, self._batch_size)))):
      logits = self._logits(state, [window for _, window in batch])
      for (image, _), scores in zip(batch, logits, strict=False):
        image.logits.append(scores)
        if len(image.logits) == len(image.windows):
          yield image

  def _logits(self, state: PyTree, windows: list[Pixels]) -> np.ndarray:
    """Of these windows, in a batch filled up to its fixed size."""
    local = np.zeros((self._batch_size, self._sliding.crop, self._sliding.crop, 3), np.uint8)
    local[: len(windows)] = windows or 0
    logits = self._predict(state, meshes.to_device({"image": local}, self._mesh))
    if logits.shape[-1] != self._num_classes:
      raise ValueError(
        f"The model scores {logits.shape[-1]} classes, data set {self._dataset.name!r} has "
        f"{self._num_classes}."
      )
    first = jax.process_index() * self._batch_size
    return np.asarray(jax.device_get(logits))[first : first + len(windows)]


class _Image:
  """What is known of an image on its way through the model."""

  def __init__(self, windows: list[Pixels], plan: segmentation.Plan, label_map: np.ndarray):
    self.windows, self._plan, self._label_map, self.logits = windows, plan, label_map, []

  def confusion(self, num_classes: int) -> Int[np.ndarray, "G G"]:
    return segmentation.confusion(self._label_map, self._plan.classes(self.logits), num_classes)


def _anywhere(here: bool) -> bool:
  """Whether any process has something to do: all must call the model equally often."""
  if jax.process_count() == 1:
    return here
  return bool(multihost_utils.process_allgather(np.array(here)).any())


def _sum_over_processes(counts: Int[np.ndarray, "G G"]) -> Int[np.ndarray, "G G"]:
  """Of 64-bit integers, which travel as pairs of words: JAX would cut them to 32 bits."""
  if jax.process_count() == 1:
    return counts
  words = multihost_utils.process_allgather(counts.view(np.uint32))
  return np.ascontiguousarray(words).view(np.int64).sum(axis=0)
