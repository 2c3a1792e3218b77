"""The train step cut off ever later, for the time of its parts: what lies between one cut and the next."""

import jax
import optax

from dtm_jax import masking, morphing, plugins, rngs
from dtm_jax.augment import augment, normalize
from dtm_jax.models.vit import model as vit
from dtm_jax.normalizations import mean_and_std
from dtm_jax.tasks import pretrain

PARTS = ("augmentation", "teacher", "student forward", "loss", "backward", "optimiser")


def of(config):
  """{what it ends with: function (params, step, frozen, batch)}; and the teacher, the student and the grid.

  Each function gives what the next part would need, so that nothing is left out. The order, and every random
  draw, is that of tasks/pretrain.py.
  """
  teacher = plugins.build("teachers", config.teacher)
  student = vit.build(**config.student, out_dim=teacher.width)
  mean, std = mean_and_std(config.augment.normalization)
  grid = (config.data.image_size // student.patch_size,) * 2
  loss_of = morph_and_loss(config)
  key = jax.random.key(config.seed)

  def augmented(params, step, frozen, batch):
    keys_B = rngs.per_example(rngs.stream(key, "augment", step), len(batch["image"]))
    options = dict(flip=config.augment.flip, color_jitter=config.augment.color_jitter)
    return augment(keys_B, batch["image"], **options)

  def taught(params, step, frozen, batch):
    image = augmented(params, step, frozen, batch)
    return image, teacher.tokens(frozen, normalize(image, teacher.mean, teacher.std))

  def predicted(params, step, frozen, batch):
    image, target_BNC = taught(params, step, frozen, batch)
    keys_B = rngs.per_example(rngs.stream(key, "mask", step), len(image))
    mask_BN = masking.masks(keys_B=keys_B, grid=grid, **config.mask)
    output = student.apply(
      {"params": params}, normalize(image, mean, std), mask_BN, train=True,
      rngs={"drop_path": rngs.stream(key, "drop_path", step)},
    )  # fmt: skip
    return image, jax.lax.stop_gradient(target_BNC), output["prediction"]

  def compared(params, step, frozen, batch):
    image, target_BNC, prediction_BNC = predicted(params, step, frozen, batch)
    return loss_of(rngs.stream(key, "morph", step), prediction_BNC, target_BNC, image)

  def differentiated(params, step, frozen, batch):
    loss, grads = jax.value_and_grad(compared)(params, step, frozen, batch)
    return loss, optax.tree.norm(grads)  # not the gradient: the step does not hand it out

  functions = (augmented, taught, predicted, compared, differentiated)
  return dict(zip(PARTS, functions, strict=False)), teacher, student, grid


def morph_and_loss(config):
  """(key, prediction, target, image) -> the loss over all morphers of the config."""
  labels = pretrain._labels(config.morphers, config.loss.schedules)
  distance = dict(distance=config.loss.distance, normalize_target=config.loss.normalize_target)

  def loss(key, prediction_BNC, target_BNC, image):
    label_SBN = labels(key, target_BNC, image)
    return sum(
      config.morphers[name].weight * morphing.dtm_loss(prediction_BNC, target_BNC, label, **distance)
      for name, label in label_SBN.items()
    )

  return loss
