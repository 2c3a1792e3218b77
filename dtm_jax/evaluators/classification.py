"""Accuracy of a classifier: top-1, top-5 and mean cross-entropy over every image of a split, each once."""

from collections.abc import Iterator

import numpy as np

from dtm_jax import evaluators
from dtm_jax.arrays import Float, Int, PyTree
from dtm_jax.evaluators import Context

OUTPUTS = ("logits", "logits_ema")


class Evaluator:
  """Right answers are counted in integers and losses added in float64: no batching changes the result.

  Args:
    context: what the run gives.
    outputs: names of those that give logits [B, G]; None: all of "logits" and "logits_ema" that there are.
    dataset: options of the data set, `name` among them; it must know its classes.
    split: None: val or test, by any of their names, whichever there is first.
    crop_pct: the shorter side is resized to image_size / crop_pct, then the centre is cropped. By default
      0.875, and 1 from 384 pixels on.
  """

  def __init__(
    self,
    context: Context,
    *,
    dataset,
    outputs: tuple[str, ...] | None = OUTPUTS[:1],
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
    self._options = dict(batch_size=batch_size, image_size=image_size, resize=int(image_size / crop_pct))

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yields top1, top5 and loss; with several outputs ("<output>_top1", ...).

    Raises:
      ValueError: a label is none of the data set's classes, or these are not as many as the classifier's.
    """
    for name, predict in self._predict.items():
      count, right1, right5, loss = 0, 0, 0, 0.0
      batches = evaluators.labelled_outputs(predict, state, self._dataset, self._mesh, **self._options)
      for logits, label in batches:
        evaluators.require_classes(logits.shape[-1], self._dataset)
        rank = label_rank(logits, label)
        count += len(label)
        right1 += int(np.sum(rank < 1))
        right5 += int(np.sum(rank < 5))
        loss += float(np.sum(cross_entropy(logits, label)))
      prefix = f"{name}_" if len(self._predict) > 1 else ""
      yield f"{prefix}top1", right1 / count
      yield f"{prefix}top5", right5 / count
      yield f"{prefix}loss", loss / count


def label_rank(logits: Float[np.ndarray, "B G"], label: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
  """How many classes come before the label: those that score more, and of equals the earlier ones.

  Scores that are not numbers come before every other: they are never right.
  """
  own = np.take_along_axis(logits, label[:, None], axis=1)
  before = np.where(np.arange(logits.shape[1])[None] < label[:, None], ~(logits < own), ~(logits <= own))
  np.put_along_axis(before, label[:, None], np.isnan(own), axis=1)
  return before.sum(axis=1)


def cross_entropy(logits: Float[np.ndarray, "B G"], label: Int[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
  """-log softmax(logits)[label] in float64."""
  logits = logits.astype(np.float64)
  logits -= logits.max(axis=1, keepdims=True)
  own = np.take_along_axis(logits, label[:, None], axis=1)[:, 0]
  return np.log(np.exp(logits).sum(axis=1)) - own
