"""Supervised training of a segmenter, from a pre-trained student or from scratch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dtm_jax import augment, device_options
from dtm_jax.arrays import Array, Batch, Float, Key, PyTree, RandomKey, UInt8
from dtm_jax.data.label_maps import IGNORE
from dtm_jax.errors import OptionError
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import segmenter
from dtm_jax.models.vit.upernet import upsample
from dtm_jax.normalizations import mean_and_std
from dtm_jax.tasks import Output, Pixels, Run, Scalars, State, StepKeys, build_learner, require_class_names
from dtm_jax.tasks._supervised import Supervised


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Segmentation(Supervised):
  """The boxes of a step: `augment`, `predict`, `compare`.

  Attributes:
    auxiliary_weight: the weight of the auxiliary head's loss.
  """

  model: segmenter.Segmenter
  auxiliary_weight: float

  def init(self, key: RandomKey, params: PyTree | None = None) -> State:
    state = self.learner.init(self._init_params(key) if params is None else params)
    return state | {"batch_stats": segmenter.fresh_statistics(self.model, self.image_size)}

  def train_step(self, state: State, frozen: PyTree, batch: Batch, key: RandomKey) -> tuple[State, Scalars]:
    """Make one update: augment, segment, cross-entropy at the size of the crop."""
    keys = StepKeys(key, state["step"], len(batch["image"]))
    image, label_map = self.augment(batch["image"], batch["map"], keys)

    def loss_fn(params: PyTree) -> tuple[Array, tuple[Array, PyTree]]:
      outputs, statistics = self.predict(params, state["batch_stats"], image, keys)
      loss, accuracy = self.compare(outputs, label_map)
      return loss, (accuracy, statistics)

    after, measurements, (accuracy, statistics) = self.learner.update(state, loss_fn)
    return after | {"batch_stats": statistics}, measurements | {"batch_accuracy": accuracy}

  def augment(
    self, image: Pixels, label_map: UInt8[Array | np.ndarray, "B H W"], keys: StepKeys
  ) -> tuple[Float[Array, "B H W 3"], UInt8[Array, "B H W"]]:
    """Return the jittered and normalised images and their maps, both flipped alike."""
    options = self.augmentation
    image = augment.augment(
      keys.per_example("augment"), image, flip=0.0, color_jitter=options["color_jitter"]
    )
    image, label_map = flip_together(keys.per_example("flip"), image, label_map, options["flip"])
    return augment.normalize(image, *self.normalization), label_map

  def predict(
    self, params: PyTree, statistics: PyTree, image: Float[Array, "B H W 3"], keys: StepKeys
  ) -> tuple[dict[str, Array], PyTree]:
    """Return the heads' logits of normalised images and the next running statistics."""
    outputs, updated = self.model.apply(
      {"params": params, "batch_stats": statistics}, image, train=True, mutable=["batch_stats"],
      rngs={name: keys.stream(name) for name in ("drop_path", "dropout")},
    )  # fmt: skip
    return outputs, updated["batch_stats"]

  def compare(
    self, outputs: dict[str, Array], label_map: UInt8[Array | np.ndarray, "B H W"]
  ) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the loss of all heads and the accuracy of the main head."""
    loss, accuracy = cross_entropy(outputs["logits"], label_map)
    if "auxiliary" in outputs:
      loss += self.auxiliary_weight * cross_entropy(outputs["auxiliary"], label_map)[0]
    return loss, accuracy

  @property
  def outputs(self) -> dict[str, Output]:
    return {"logits": self.logits}

  def logits(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B h w G"]:
    """Return the class scores, on a grid coarser than the image."""
    variables = {"params": state["params"], "batch_stats": state["batch_stats"]}
    return self.model.apply(variables, self._pixels(batch))["logits"]


def build(config: Any, run: Run) -> Segmentation:
  """Build the task from the sections data, augment, model, init_from, loss and optim.

  `init_from.path` names a run's workdir or weights, of a student, a classifier or a segmenter. The state has
  "batch_stats", the running statistics of the heads' BatchNorms. For a linear probe of the linear head set
  `optim.fixed` = (patch_embed/.*, blocks/.*, cls_token, norm/.*).

  Raises:
    OptionError: the data set has no class names, or data.view.crop is not "joint".
  """
  config, _ = device_options.resolve(config)
  num_classes, image_size = len(require_class_names(config, run, "segment")), config.data.image_size
  if config.data.view.get("crop") != "joint":
    raise OptionError(f"data.view.crop={config.data.view.get('crop')!r}, but segmentation needs 'joint'.")
  model = segmenter.build(**config.model, num_classes=num_classes)
  return Segmentation(
    model=model,
    image_size=image_size,
    num_classes=num_classes,
    augmentation=dict(config.augment),
    normalization=mean_and_std(config.augment.normalization),
    learner=build_learner(config.optim, vit.init_shapes(model, image_size), run),
    init_from=dict(config.init_from),
    auxiliary_weight=config.loss.auxiliary,
  )


def flip_together(
  keys_B: Key[Array, " B"],
  image: Float[Array, "B H W 3"],
  label_map: UInt8[Array | np.ndarray, "B H W"],
  prob: float,
) -> tuple[Float[Array, "B H W 3"], UInt8[Array, "B H W"]]:
  """Mirror each image and its map left to right with probability `prob`."""
  flip_B = jax.vmap(lambda key: jax.random.bernoulli(key, prob))(keys_B)
  mirror = lambda x: jnp.where(flip_B.reshape((-1,) + (1,) * (x.ndim - 1)), x[:, :, ::-1], x)
  return mirror(image), mirror(label_map)


def cross_entropy(
  logits: Float[Array, "B h w G"], label_map: UInt8[Array | np.ndarray, "B H W"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Return the mean of -log softmax(scores)[label] over the labelled pixels of the batch, and the accuracy.

  The scores are the logits, resized to the map bilinearly.
  """
  _, height, width = label_map.shape
  scores = upsample(logits, (height, width))
  valid = label_map != IGNORE
  label = jnp.where(valid, label_map, 0).astype(jnp.int32)
  count = jnp.maximum(valid.sum(), 1)
  loss = jnp.where(valid, optax.softmax_cross_entropy_with_integer_labels(scores, label), 0.0)
  right = valid & (jnp.argmax(scores, axis=-1) == label)
  return loss.sum() / count, right.sum() / count
