"""Chooses the best of several classifiers on held-out images and measures it on the test images."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from dtm_jax import evaluators
from dtm_jax.arrays import Float, PyTree
from dtm_jax.data import Dataset
from dtm_jax.evaluators import Context, Section
from dtm_jax.evaluators._label_rank import label_rank


class Evaluator:
  """Measures the accuracy of the head that is best on the held-out split.

  The labels of the test split have no part in the choice.

  Args:
    context: needs the predict functions "logits" [B, R, G] of R heads and "rates" [R], their learning rates.
    dataset: options of the data set, with its "name". It must have class names.
    held_out: the split that chooses the head. Training must not see it.
    split: the split to measure. Default: val or test, by any of their usual names.
    image_size: pixels of a side that the model sees.
    crop_pct: the shorter side is resized to image_size / crop_pct pixels before the central crop.
    batch_size: images in a batch, of all devices together.

  Raises:
    OptionError: there is no such split, or its classes are not those of the training set.
  """

  def __init__(
    self,
    context: Context,
    *,
    dataset: Section,
    held_out: str,
    split: str | None = None,
    image_size: int,
    crop_pct: float = 0.875,
    batch_size: int = 512,
  ):
    self._logits = context.function("logits")
    self._rates = context.function("rates")
    self._mesh = context.mesh
    self._held_out, self._test = (evaluators.open_dataset(dataset, name) for name in (held_out, split))
    for each in (self._held_out, self._test):
      evaluators.require_same_classes(each, context.training)
    self._view: dict[str, Any] = dict(
      batch_size=batch_size, image_size=image_size, resize=int(image_size / crop_pct)
    )

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yield learning_rate, held_out_accuracy and accuracy of the best head. The first of equals is chosen.

    Raises:
      OptionError: a label is not a class, or the heads have another number of classes than the data set.
    """
    held_out_R = self._accuracies(state, self._held_out)
    best = int(np.argmax(held_out_R))
    yield "learning_rate", float(np.asarray(self._rates(state, {}))[best])
    yield "held_out_accuracy", float(held_out_R[best])
    yield "accuracy", float(self._accuracies(state, self._test)[best])

  def _accuracies(self, state: PyTree, dataset: Dataset) -> Float[np.ndarray, " R"]:
    """Return the accuracy of each head. Right answers are counted in integers."""
    count, right_R = 0, np.zeros((), np.int64)
    for logits_BRG, label_B in evaluators.labelled_outputs(
      self._logits, state, dataset, self._mesh, **self._view
    ):
      evaluators.require_classes(logits_BRG.shape[-1], dataset)
      count += len(label_B)
      right_RB = np.stack([label_rank(logits_BG, label_B) < 1 for logits_BG in logits_BRG.swapaxes(0, 1)])
      right_R = right_R + right_RB.sum(axis=1)
    return right_R / count
