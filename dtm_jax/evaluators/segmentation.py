"""Measures a segmenter: mIoU over all labelled pixels of a split, by sliding windows at one scale."""

import collections
import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils

from dtm_jax import data, evaluators
from dtm_jax.arrays import Float, Int, PyTree
from dtm_jax.data.label_maps import Map
from dtm_jax.data.resampling import Pixels
from dtm_jax.errors import OptionError
from dtm_jax.evaluators import Context, Section
from dtm_jax.evaluators._confusion_matrix import confusion_matrix, segmentation_scores
from dtm_jax.evaluators._sliding_windows import Layout, SlidingWindows
from dtm_jax.training import mesh as meshes


class Evaluator:
  """Counts all pixels of a data set in one confusion matrix of integers.

  Every process reads its own part of the images and puts their scores together. A device always sees
  `windows` windows at a time, so the numbers do not depend on the number of devices.

  Args:
    context: needs the predict function `output`, logits [B, h, w, G].
    dataset: options of the data set, with its "name". It must have label maps.
    output: name of the predict function.
    split: the split to measure.
    image_size: pixels of the shorter side of a resized image.
    longer: most pixels of its longer side. Default: four times `image_size`.
    crop: pixels of a side of a window that the model takes. Default: `image_size`.
    stride: pixels from one window to the next. Default: two thirds of `crop` (341 of 512), as in BEiT.
    windows: windows that a device sees in one call.
    num_threads: threads of each process that read images and put scores together.

  Raises:
    OptionError: there is no such split or function, or the data set has no label maps.
    ValueError: `stride` is not between 1 and `crop`.
  """

  def __init__(
    self,
    context: Context,
    *,
    dataset: Section,
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
    self._dataset = evaluators.open_dataset(dataset, split)
    evaluators.require_same_classes(self._dataset, context.training)
    self._num_classes = data.require_maps(self._dataset).num_classes
    crop = crop or image_size
    self._windows = SlidingWindows(image_size, crop, stride or 2 * crop // 3, longer)
    self._batch_size = windows * len(self._mesh.local_devices)
    self._num_threads = num_threads

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yield miou, pixel_accuracy and mean_accuracy (`segmentation_scores`).

    Raises:
      ValueError: no pixel has a label, or the model has another number of classes than the data set.
    """
    total_GG = np.zeros((self._num_classes,) * 2, np.int64)
    with ThreadPoolExecutor(self._num_threads) as pool:
      pending: collections.deque[Future[np.ndarray]] = collections.deque()
      for image in self._images(state):
        pending.append(pool.submit(image.confusion_matrix, self._num_classes))
        if len(pending) > self._num_threads:
          total_GG += pending.popleft().result()
      total_GG += sum(each.result() for each in pending)
    yield from segmentation_scores(_sum_over_processes(total_GG)).items()

  def _images(self, state: PyTree) -> Iterator["_Image"]:
    """Yield each image of this process when the scores of all its windows are there."""
    examples = data.whole_examples(self._dataset, num_threads=self._num_threads)
    images = (_Image(*self._windows.cut(pixels), label_map) for pixels, label_map in examples)
    windows = ((image, window) for image in images for window in image.windows)
    while _on_any_process(bool(batch := list(itertools.islice(windows, self._batch_size)))):
      logits = self._logits(state, [window for _, window in batch])
      for (image, _), logits_hwG in zip(batch, logits, strict=False):
        image.logits.append(logits_hwG)
        if len(image.logits) == len(image.windows):
          yield image

  def _logits(self, state: PyTree, windows: list[Pixels]) -> Float[np.ndarray, "B h w G"]:
    """Return the scores of up to `_batch_size` windows. The batch is padded, so its shape never changes."""
    crop = self._windows.crop
    local = np.zeros((self._batch_size, crop, crop, 3), np.uint8)
    local[: len(windows)] = windows or 0
    logits = self._predict(state, meshes.to_device({"image": local}, self._mesh))
    if logits.shape[-1] != self._num_classes:
      raise OptionError(
        f"The model scores {logits.shape[-1]} classes, data set {self._dataset.name!r} has "
        f"{self._num_classes}."
      )
    first = jax.process_index() * self._batch_size
    return np.asarray(jax.device_get(logits))[first : first + len(windows)]


class _Image:
  """The windows and the label map of an image, and the scores of the windows so far."""

  def __init__(self, windows: list[Pixels], layout: Layout, label_map: Map):
    self.windows, self._layout, self._label_map = windows, layout, label_map
    self.logits: list[Float[np.ndarray, "h w G"]] = []

  def confusion_matrix(self, num_classes: int) -> Int[np.ndarray, "G G"]:
    return confusion_matrix(self._label_map, self._layout.classes(self.logits), num_classes)


def _on_any_process(here: bool) -> bool:
  """Return whether any process has windows left. All processes must call the model equally often."""
  if jax.process_count() == 1:
    return here
  return bool(multihost_utils.process_allgather(np.array(here)).any())


def _sum_over_processes(counts: Int[np.ndarray, "G G"]) -> Int[np.ndarray, "G G"]:
  """Return the sum over the processes.

  The 64-bit integers travel as pairs of words, because JAX would cut them to 32 bits.
  """
  if jax.process_count() == 1:
    return counts
  words = multihost_utils.process_allgather(counts.view(np.uint32))
  return np.ascontiguousarray(words).view(np.int64).sum(axis=0)
