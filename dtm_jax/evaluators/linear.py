"""A linear probe in closed form: ridge regression of the class on frozen features, as they are."""

from collections.abc import Iterator

import numpy as np

from dtm_jax import data, evaluators
from dtm_jax.arrays import PyTree
from dtm_jax.evaluators import Context
from dtm_jax.evaluators._token_measures import LeastSquares, classify


class Evaluator:
  """Of several strengths the one that is best on held-out images, and its accuracy on the test images.

  It has no learning rate, no augmentation and no chance, and costs one pass over the images: what compares
  many runs. The task `linear_probe` trains softmax heads on augmented images instead.

  Args:
    context: what the run gives; `features` names those to probe, one accuracy each.
    dataset: options of the data set, `name` among them; it must know its classes.
    fit, held_out, split: the splits that fit, choose and are reported on; parts such as "train[:90%]". A
      `split` of None: val or test, by any of their names, whichever there is first.
    ridges: the strengths to choose from, relative to the mean square of a feature (`LeastSquares`).
  """

  def __init__(
    self,
    context: Context,
    *,
    dataset,
    features: tuple[str, ...] = ("student",),
    fit: str = "train[:90%]",
    held_out: str = "train[90%:]",
    split: str | None = None,
    ridges: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
    image_size: int,
    resize: int | None = None,
    batch_size: int = 512,
  ):
    self._predict = {name: context.function(name) for name in features}
    self._mesh, self._ridges = context.mesh, ridges
    self._fit, self._held_out, self._test = (
      evaluators.open_dataset(dataset, name) for name in (fit, held_out, split)
    )
    for each in (self._held_out, self._test):
      evaluators.require_same_classes(each, self._fit)
    self._options = dict(batch_size=batch_size, image_size=image_size, resize=resize)

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yields "<features>_accuracy", "_held_out_accuracy" and "_ridge", the strength (of equals the first).

    Raises:
      ValueError: a label is none of the data set's classes.
    """
    for name, predict in self._predict.items():
      probe = None
      for feature_BD, label_B in self._batches(predict, state, self._fit):
        probe = probe or LeastSquares(feature_BD.shape[1], len(self._fit.class_names))
        probe.add(feature_BD[:, None, :], label_B)  # an image of one token
      weights = [probe.solve(ridge) for ridge in self._ridges]
      held_out = self._accuracy(predict, state, self._held_out, weights)
      best = int(np.argmax(held_out))
      yield f"{name}_ridge", self._ridges[best]
      yield f"{name}_held_out_accuracy", held_out[best]
      yield f"{name}_accuracy", self._accuracy(predict, state, self._test, weights[best : best + 1])[0]

  def _accuracy(self, predict, state: PyTree, dataset: data.Dataset, weights: list) -> list[float]:
    """Of each set of weights, counted in integers."""
    count, right = 0, np.zeros(len(weights), np.int64)
    for feature_BD, label_B in self._batches(predict, state, dataset):
      count += len(label_B)
      for index, weights_DG in enumerate(weights):
        predicted_B1 = classify(feature_BD[:, None, :].astype(np.float64), weights_DG)
        right[index] += np.sum(predicted_B1[:, 0] == label_B)
    return (right / count).tolist()

  def _batches(self, predict, state: PyTree, dataset: data.Dataset):
    return evaluators.labelled_outputs(predict, state, dataset, self._mesh, **self._options)
