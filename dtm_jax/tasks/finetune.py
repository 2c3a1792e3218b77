"""Supervised training of a classifier, from a pre-trained student or from scratch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dtm_jax import augment, device_options
from dtm_jax.arrays import Array, Batch, Float, PyTree, RandomKey
from dtm_jax.models.vit import classifier
from dtm_jax.models.vit import model as vit
from dtm_jax.normalizations import mean_and_std
from dtm_jax.tasks import (
  Labels,
  Output,
  Pixels,
  Run,
  Scalars,
  State,
  StepKeys,
  build_learner,
  require_class_names,
)
from dtm_jax.tasks._supervised import Supervised


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Finetuning(Supervised):
  """The boxes of a step: `augment`, `mix`, `predict`, `compare`.

  Attributes:
    mix_options: the options of `augment.mix`.
    label_smoothing: the share of the target that all classes divide.
    ema_decay: the decay of the parameters' exponential moving average; None or 0 means there is no average.
    accumulate: steps that make one update.
  """

  model: classifier.Classifier
  mix_options: Mapping[str, Any]
  label_smoothing: float
  ema_decay: float | None
  accumulate: int

  def init(self, key: RandomKey, params: PyTree | None = None) -> State:
    state = self.learner.init(self._init_params(key) if params is None else params)
    return state | ({"ema": jax.tree.map(jnp.copy, state["params"])} if self.ema_decay else {})

  def train_step(self, state: State, frozen: PyTree, batch: Batch, key: RandomKey) -> tuple[State, Scalars]:
    """Make one update: augment, mix, classify, soft cross-entropy."""
    keys = StepKeys(key, state["step"], len(batch["label"]))
    image, target_BG = self.mix(self.augment(batch["image"], keys), batch["label"], keys)

    def loss_fn(params: PyTree) -> tuple[Array, Array]:
      logits_BG = self.predict(params, image, keys)
      return self.compare(logits_BG, target_BG), logits_BG

    after, measurements, logits_BG = self.learner.update(state, loss_fn)
    if self.ema_decay:
      updated = after["step"] % self.accumulate == 0
      after["ema"] = optax.incremental_update(after["params"], state["ema"], (1 - self.ema_decay) * updated)
    right_B = jnp.argmax(logits_BG, axis=1) == jnp.argmax(target_BG, axis=1)
    return after, measurements | {"batch_accuracy": jnp.mean(right_B)}

  def augment(self, image: Pixels, keys: StepKeys) -> Float[Array, "B H W 3"]:
    """Return the flipped, jittered, normalised and partly erased images."""
    options = self.augmentation
    image = augment.augment(
      keys.per_example("augment"), image, flip=options["flip"], color_jitter=options["color_jitter"]
    )
    image = augment.normalize(image, *self.normalization)
    return augment.random_erase(keys.per_example("erase"), image, options["erase_prob"])

  def mix(
    self, image: Float[Array, "B H W 3"], label_B: Labels, keys: StepKeys
  ) -> tuple[Float[Array, "B H W 3"], Float[Array, "B G"]]:
    """Mix images and their smoothed one-hot labels by mixup or CutMix."""
    target_BG = optax.smooth_labels(jax.nn.one_hot(label_B, self.num_classes), self.label_smoothing)
    return augment.mix(keys.stream("mix"), image, target_BG, **self.mix_options)

  def predict(self, params: PyTree, image: Float[Array, "B H W 3"], keys: StepKeys) -> Float[Array, "B G"]:
    """Return the logits of normalised images, with stochastic depth."""
    rngs = {"drop_path": keys.stream("drop_path")}
    return self.model.apply({"params": params}, image, train=True, rngs=rngs)["logits"]

  def compare(self, logits_BG: Float[Array, "B G"], target_BG: Float[Array, "B G"]) -> Float[Array, ""]:
    """Return the mean cross-entropy."""
    return optax.softmax_cross_entropy(logits_BG, target_BG).mean()

  @property
  def outputs(self) -> dict[str, Output]:
    functions: dict[str, Output] = {"logits": self.logits, "features": self.features}
    return functions | ({"logits_ema": self.logits_ema} if self.ema_decay else {})

  def logits(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B G"]:
    """Return the class scores."""
    return self._apply(state["params"], batch)["logits"]

  def features(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B D"]:
    """Return the input of the classification head."""
    return self._apply(state["params"], batch)["features"]

  def logits_ema(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B G"]:
    """Return the class scores with the averaged parameters."""
    return self._apply(state["ema"], batch)["logits"]

  def _apply(self, params: PyTree, batch: Batch) -> dict[str, Array]:
    return self.model.apply({"params": params}, self._pixels(batch))


def build(config: Any, run: Run) -> Finetuning:
  """Build the task from the sections data, augment, model, init_from, mix, loss, optim and ema.

  `init_from.path` names a run's workdir or weights, of a student or a classifier. With `ema.decay` the state
  has "ema", the parameters' exponential moving average, and the output "logits_ema" uses it.

  Raises:
    OptionError: the data set has no class names, or the optimiser's options are wrong.
  """
  config, _ = device_options.resolve(config)
  num_classes, image_size = len(require_class_names(config, run, "classify")), config.data.image_size
  model = classifier.build(**config.model, num_classes=num_classes)
  return Finetuning(
    needs_labels=True,
    model=model,
    image_size=image_size,
    num_classes=num_classes,
    augmentation=dict(config.augment),
    normalization=mean_and_std(config.augment.normalization),
    learner=build_learner(config.optim, vit.init_shapes(model, image_size), run),
    init_from=dict(config.init_from),
    mix_options=dict(config.mix),
    label_smoothing=config.loss.label_smoothing,
    ema_decay=config.ema.decay,
    accumulate=config.optim.accumulate,
  )
