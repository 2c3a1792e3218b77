"""Measures a classifier: top-1 and top-5 accuracy and mean cross-entropy over all images of a split."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from dtm_jax import evaluators
from dtm_jax.arrays import Float, Int, PyTree
from dtm_jax.evaluators import Context, Section
from dtm_jax.evaluators._label_rank import label_rank

OUTPUTS = ("logits", "logits_ema")


class Evaluator:
  """Measures the accuracy and the loss of class scores.

  Right answers are counted in integers and losses are added in float64, so no batch size changes the result.

  Args:
    context: needs the predict functions `outputs`.
    dataset: options of the data set, with its "name". It must have class names.
    outputs: names of the predict functions that give logits. None: those of "logits" and "logits_ema" that
      the task has.
    split: the split to measure. Default: val or test, by any of their usual names.
    image_size: pixels of a side that the model sees.
    crop_pct: the shorter side is resized to image_size / crop_pct pixels before the central crop. Default:
      0.875, or 1 from 384 pixels on.
    batch_size: images in a batch, of all devices together.

  Raises:
    OptionError: there is no such split or function, or the classes are not those of the training set.
  """

  def __init__(
    self,
    context: Context,
    *,
    dataset: Section,
    outputs: tuple[str, ...] | None = ("logits",),
    split: str | None = None,
    image_size: int,
    crop_pct: float | None = None,
    batch_size: int = 512,
  ):
    outputs = outputs or tuple(name for name in OUTPUTS if name in context.predict) or OUTPUTS[:1]
    self._predict = {name: context.function(name) for name in outputs}
    self._mesh = context.mesh
    self._dataset = evaluators.open_dataset(dataset, split)
    evaluators.require_same_classes(self._dataset, context.training)
    crop_pct = crop_pct or (0.875 if image_size < 384 else 1.0)
    self._view: dict[str, Any] = dict(
      batch_size=batch_size, image_size=image_size, resize=int(image_size / crop_pct)
    )

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yield top1, top5 and loss. With several outputs the names start with "<output>_".

    Raises:
      OptionError: a label is not a class, or the classifier has another number of classes than the data set.
    """
    for name, predict in self._predict.items():
      count, right1, right5, loss = 0, 0, 0, 0.0
      for logits_BG, label_B in evaluators.labelled_outputs(
        predict, state, self._dataset, self._mesh, **self._view
      ):
        evaluators.require_classes(logits_BG.shape[-1], self._dataset)
        rank_B = label_rank(logits_BG, label_B)
        count += len(label_B)
        right1 += int(np.sum(rank_B < 1))
        right5 += int(np.sum(rank_B < 5))
        loss += float(np.sum(cross_entropy(logits_BG, label_B)))
      prefix = f"{name}_" if len(self._predict) > 1 else ""
      yield f"{prefix}top1", right1 / count
      yield f"{prefix}top5", right5 / count
      yield f"{prefix}loss", loss / count


def cross_entropy(
  logits_BG: Float[np.ndarray, "B G"], label_B: Int[np.ndarray, " B"]
) -> Float[np.ndarray, " B"]:
  """Return -log softmax(logits)[label] of each image, computed in float64."""
  logits_BG = logits_BG.astype(np.float64)
  logits_BG -= logits_BG.max(axis=1, keepdims=True)
  own_B = np.take_along_axis(logits_BG, label_B[:, None], axis=1)[:, 0]
  return np.log(np.exp(logits_BG).sum(axis=1)) - own_B
