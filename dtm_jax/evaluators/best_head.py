"""Of several classifiers the best on images held out from training, and its accuracy on the test set."""

from collections.abc import Iterator

import numpy as np

from dtm_jax import data, evaluators
from dtm_jax.arrays import PyTree
from dtm_jax.evaluators import Context
from dtm_jax.evaluators.classification import label_rank


class Evaluator:
  """The test set has no part in the choice: its labels are compared with the chosen head's answers only.

  Args:
    context: needs the predict functions "logits" [B, R, G] of R heads, and their learning "rates" [R].
    dataset: options of the data set, `name` among them; it must know its classes.
    held_out: the split that chooses; the part of the training split that training does not see.
    split: the split to report on; None: val or test, by any of their names, whichever there is first.
    crop_pct: the shorter side is resized to image_size / crop_pct, then the centre is cropped.
  """

  def __init__(
    self,
    context: Context,
    *,
    dataset,
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
    self._options = dict(batch_size=batch_size, image_size=image_size, resize=int(image_size / crop_pct))

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yields held_out_accuracy and learning_rate of the best head (of equals the first), and its accuracy.

    Raises:
      ValueError: a label is none of the data set's classes, or these are not as many as the heads'.
    """
    held_out_R = self._accuracy(state, self._held_out)
    best = int(np.argmax(held_out_R))
    yield "learning_rate", float(np.asarray(self._rates(state, {}))[best])
    yield "held_out_accuracy", float(held_out_R[best])
    yield "accuracy", float(self._accuracy(state, self._test)[best])

  def _accuracy(self, state: PyTree, dataset: data.Dataset) -> np.ndarray:
    """[R], counted in integers."""
    count, right_R = 0, 0
    batches = evaluators.labelled_outputs(self._logits, state, dataset, self._mesh, **self._options)
    for logits, label in batches:
      evaluators.require_classes(logits.shape[-1], dataset)
      count += len(label)
      right_R += np.stack([label_rank(x, label) < 1 for x in logits.swapaxes(0, 1)]).sum(axis=1)
    return right_R / count
