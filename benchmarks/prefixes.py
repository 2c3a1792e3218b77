"""Cut the train step into parts: run ever longer prefixes of the step and subtract their times.

Each prefix calls the boxes of the task (`augment`, `teach`, `mask`, `predict`, `group`, `compare`) with the
random keys of the step.
"""

from collections.abc import Callable

import jax
import optax

from dtm_jax.tasks import StepKeys
from dtm_jax.tasks.pretrain import Pretraining

PARTS = ("augmentation", "teacher", "student forward", "loss", "backward", "optimiser")
"""The parts of the step. The last one is what remains after the longest prefix."""


def prefix_functions(task: Pretraining) -> dict[str, Callable]:
  """Return the prefixes by the part with which they end: functions (params, step, frozen, batch, key).

  Each returns the arrays that the next part needs, so the compiler can leave nothing out.
  """

  def augmented(params, frozen, image, keys):
    return task.augment(image, keys)

  def taught(params, frozen, image, keys):
    image = augmented(params, frozen, image, keys)
    return image, task.teach(frozen, image)

  def predicted(params, frozen, image, keys):
    image, target_BNC = taught(params, frozen, image, keys)
    return image, target_BNC, task.predict(params, image, task.mask(keys), keys)["prediction"]

  def compared(params, frozen, image, keys):
    image, target_BNC, prediction_BNC = predicted(params, frozen, image, keys)
    return task.compare(prediction_BNC, target_BNC, task.group(target_BNC, image, keys))[0]

  def differentiated(params, frozen, image, keys):
    loss, grads = jax.value_and_grad(compared)(params, frozen, image, keys)
    return loss, optax.tree.norm(grads)  # the step does not return the gradient either

  def with_keys(function):
    def prefix(params, step, frozen, batch, key):
      return function(params, frozen, batch["image"], StepKeys(key, step, len(batch["image"])))

    return prefix

  functions = (augmented, taught, predicted, compared, differentiated)
  return {name: with_keys(function) for name, function in zip(PARTS, functions, strict=False)}


def morph_and_loss(task: Pretraining) -> Callable:
  """Return the function (key, prediction, target, image) -> the loss over all morphers."""

  def loss(key, prediction_BNC, target_BNC, image):
    label_SBN = task.group(target_BNC, image, StepKeys(key, 0, len(image)))
    return task.compare(prediction_BNC, target_BNC, label_SBN)[0]

  return loss
