"""Measures frozen features by a linear probe in closed form: ridge regression of the one-hot class."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from dtm_jax import evaluators
from dtm_jax.arrays import Float, PyTree
from dtm_jax.data import Dataset
from dtm_jax.evaluators import Context, PredictFunction, Section
from dtm_jax.evaluators._least_squares import LeastSquares, classify


class Evaluator:
  """Chooses the ridge strength that is best on held-out images and measures it on the test images.

  The probe has no learning rate, no augmentation and no randomness. It costs one pass over the images, so
  it suits a comparison of many runs. The task `linear_probe` trains softmax heads on augmented images
  instead.

  Args:
    context: needs the predict functions `features`, [B, D] each.
    dataset: options of the data set, with its "name". It must have class names.
    features: names of the features to measure, with one accuracy each.
    fit: the split that the probe is fitted on, or a part of one such as "train[:90%]".
    held_out: the split that chooses the strength.
    split: the split to measure. Default: val or test, by any of their usual names.
    ridges: the strengths to choose from, relative to the mean square of a feature.
    image_size: pixels of a side that the model sees.
    resize: pixels of the shorter side before the central crop. Default: `image_size`.
    batch_size: images in a batch, of all devices together.

  Raises:
    OptionError: there is no such split or function, or the splits have different classes.
  """

  def __init__(
    self,
    context: Context,
    *,
    dataset: Section,
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
    self._view: dict[str, Any] = dict(batch_size=batch_size, image_size=image_size, resize=resize)

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yield "<features>_ridge", "_held_out_accuracy" and "_accuracy" of the best strength, or the first.

    Raises:
      OptionError: a label is not one of the data set's classes.
    """
    for name, predict in self._predict.items():
      probe = None
      for feature_BD, label_B in self._batches(predict, state, self._fit):
        probe = probe or LeastSquares(feature_BD.shape[1], len(self._fit.class_names or ()))
        probe.add(feature_BD[:, None, :], label_B)  # an image of one token
      assert probe is not None  # a data set without readable images has raised an error
      weights = [probe.solve(ridge) for ridge in self._ridges]
      held_out = self._accuracies(predict, state, self._held_out, weights)
      best = int(np.argmax(held_out))
      yield f"{name}_ridge", self._ridges[best]
      yield f"{name}_held_out_accuracy", held_out[best]
      yield f"{name}_accuracy", self._accuracies(predict, state, self._test, [weights[best]])[0]

  def _accuracies(
    self,
    predict: PredictFunction,
    state: PyTree,
    dataset: Dataset,
    weights: list[Float[np.ndarray, "D G"]],
  ) -> list[float]:
    """Return the accuracy of each matrix of weights. Right answers are counted in integers."""
    count, right = 0, np.zeros(len(weights), np.int64)
    for feature_BD, label_B in self._batches(predict, state, dataset):
      count += len(label_B)
      for index, weights_DG in enumerate(weights):
        predicted_B1 = classify(feature_BD[:, None, :].astype(np.float64), weights_DG)
        right[index] += np.sum(predicted_B1[:, 0] == label_B)
    return (right / count).tolist()

  def _batches(
    self, predict: PredictFunction, state: PyTree, dataset: Dataset
  ) -> Iterator[tuple[Any, np.ndarray]]:
    return evaluators.labelled_outputs(predict, state, dataset, self._mesh, **self._view)
