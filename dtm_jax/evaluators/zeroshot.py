"""Measures zero-shot accuracy: an image gets the class with the most similar text embedding."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from dtm_jax import evaluators
from dtm_jax.arrays import PyTree
from dtm_jax.evaluators import Context, Section
from dtm_jax.evaluators._class_embeddings import ClassEmbeddings
from dtm_jax.evaluators._label_rank import label_rank


class Evaluator:
  """Compares each image with one embedding per class, the ensemble of its prompts (`ClassEmbeddings`).

  Args:
    context: needs the predict functions "image" and "text", which embed in one space, and a tokenizer.
    dataset: options of the data set, with its "name". It must have class names.
    prompts: the name of a set of templates, or a file with one template on each line.
    class_names: a file with one class name on each line. Default: those that come with the templates, or
      else the data set's.
    split: the split to measure. Default: val or test, by any of their usual names.
    image_size: pixels of a side that the model sees.
    resize: pixels of the shorter side before the central crop. Default: `image_size`.
    batch_size: images in a batch, of all devices together.
    text_batch_size: captions in a batch, of all devices together.

  Raises:
    OptionError: there is no such split, the task has no text tower, or the captions cannot be made.
  """

  def __init__(
    self,
    context: Context,
    *,
    dataset: Section,
    prompts: str,
    class_names: str | None = None,
    split: str | None = None,
    image_size: int,
    resize: int | None = None,
    batch_size: int = 512,
    text_batch_size: int = 512,
  ):
    self._image = context.function("image")
    self._mesh = context.mesh
    self._dataset = evaluators.open_dataset(dataset, split)
    self._class_embeddings = ClassEmbeddings(
      context, self._dataset, prompts, class_names=class_names, batch_size=text_batch_size
    )
    self._view: dict[str, Any] = dict(batch_size=batch_size, image_size=image_size, resize=resize)

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yield accuracy and top5, the shares of the images with a right answer, counted in integers.

    Raises:
      OptionError: a label is not one of the data set's classes, or no image can be read.
    """
    class_GE = self._class_embeddings(state)
    count, right1, right5 = 0, 0, 0
    for image_BE, label_B in evaluators.labelled_outputs(
      self._image, state, self._dataset, self._mesh, **self._view
    ):
      rank_B = label_rank(image_BE @ class_GE.T, label_B)
      count += len(label_B)
      right1 += int(np.sum(rank_B < 1))
      right5 += int(np.sum(rank_B < 5))
    yield "accuracy", right1 / count
    yield "top5", right5 / count
