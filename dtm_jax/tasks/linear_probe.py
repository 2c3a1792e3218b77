"""Linear classifiers on the frozen features of any teacher or earlier run, several learning rates at once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dtm_jax import augment
from dtm_jax.arrays import Array, Batch, Float, PyTree, RandomKey
from dtm_jax.errors import OptionError
from dtm_jax.tasks import (
  Labels,
  Learner,
  Output,
  Pixels,
  Run,
  Scalars,
  State,
  StepKeys,
  Task,
  build_learner,
  build_teacher,
  require_class_names,
)
from dtm_jax.teachers import Teacher

EPS = 1e-6

Statistics = dict[str, Float[Array, " C"]]
"""The "mean" and "var" of every channel of the features."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LinearProbe(Task):
  """The boxes of a step: `augment`, `teach`, `standardize`, `predict`, `compare`.

  The R heads share the features of a batch, which are computed once. What one head learns does not depend on
  the others.

  Attributes:
    shapes: the shapes of the heads' parameters.
    flip: the probability of a flip.
    rate_R: the factor of each head's learning rate.
    momentum: the share of the running statistics that stays in each step.
  """

  teacher: Teacher
  shapes: dict[str, jax.ShapeDtypeStruct]
  flip: float
  rate_R: Float[Array, " R"]
  momentum: float
  learner: Learner

  def init(self, key: RandomKey, params: PyTree | None = None) -> State:
    heads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.shapes) if params is None else params
    statistics = {"mean": jnp.zeros(self.teacher.width), "var": jnp.ones(self.teacher.width)}
    return self.learner.init(heads) | {"statistics": statistics}

  def train_step(self, state: State, frozen: PyTree, batch: Batch, key: RandomKey) -> tuple[State, Scalars]:
    """Make one update of all heads."""
    keys = StepKeys(key, state["step"], len(batch["label"]))
    feature_BC = self.teach(frozen, self.augment(batch["image"], keys))
    now = {"mean": feature_BC.mean(axis=0), "var": feature_BC.var(axis=0)}
    feature_BC = standardize(feature_BC, now)

    def loss_fn(heads: PyTree) -> tuple[Array, Array]:
      loss_R = self.compare(self.predict(heads, feature_BC), batch["label"])
      return loss_R.sum(), loss_R

    after, measurements, loss_R = self.learner.update(state, loss_fn)
    # The statistics of the first batch replace the initial ones.
    share = jnp.where(state["step"], 1 - self.momentum, 1.0)
    after["statistics"] = optax.incremental_update(now, state["statistics"], share)
    # A head with too high a rate may diverge. Its loss and gradient are not measured.
    return after, {"loss": jnp.nanmin(loss_R), "learning_rate": measurements["learning_rate"]}

  def augment(self, image: Pixels, keys: StepKeys) -> Float[Array, "B H W 3"]:
    """Return the flipped images, values in [0, 1]."""
    return augment.augment(keys.per_example("augment"), image, flip=self.flip, color_jitter=0.0)

  def teach(self, frozen: PyTree, image: Float[Array, "B H W 3"]) -> Float[Array, "B C"]:
    """Return the features: the mean of the teacher's patch tokens."""
    tokens = self.teacher.apply(frozen, self.teacher.prepare(image))
    return jax.lax.stop_gradient(tokens.mean(axis=1))

  def predict(self, heads: PyTree, feature_BC: Float[Array, "B C"]) -> Float[Array, "B R G"]:
    """Return the logits of every head."""
    return jnp.einsum("bd,rdg->brg", feature_BC, heads["kernel"]) + heads["bias"][None]

  def compare(self, logits_BRG: Float[Array, "B R G"], label_B: Labels) -> Float[Array, " R"]:
    """Return the mean cross-entropy of every head."""
    label_BR = jnp.broadcast_to(label_B[:, None], logits_BRG.shape[:2])
    return optax.softmax_cross_entropy_with_integer_labels(logits_BRG, label_BR).mean(axis=0)

  @property
  def outputs(self) -> dict[str, Output]:
    return {"logits": self.logits, "rates": self.rates}

  def logits(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B R G"]:
    """Return the logits of every head. The running statistics standardise the features."""
    feature_BC = self.teach(frozen, augment.to_float(batch["image"]))
    return self.predict(state["params"], standardize(feature_BC, state["statistics"]))

  def rates(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, " R"]:
    """Return the factor of each head's learning rate."""
    return self.rate_R


def build(config: Any, run: Run) -> LinearProbe:
  """Build the task from the sections data, augment, teacher, probe and optim.

  The features are the mean of the teacher's patch tokens; the teacher "checkpoint" is the student of an
  earlier run. Running statistics over batches standardise the features, like a BatchNorm without parameters.
  The linear probes of masked image models do this because the scales of their features differ much. Head r
  learns with the schedule of `optim` times `probe.rates[r]`. The evaluator `best_head` chooses among them.

  Raises:
    OptionError: the data set has no class names; there are no rates; or there is gradient clipping, which
      would tie the heads together, or weight decay, which a probe does not have.
  """
  num_classes = len(require_class_names(config, run, "classify"))
  if config.optim.clip_norm or config.optim.weight_decay:
    raise OptionError(
      f"A linear probe has no clip_norm ({config.optim.clip_norm}) and no weight_decay "
      f"({config.optim.weight_decay}): set both to 0."
    )
  teacher = build_teacher(config)
  if not config.probe.rates:
    raise OptionError(f"probe.rates={config.probe.rates} names no learning rate.")
  rate_R = jnp.asarray(config.probe.rates, jnp.float32)
  shapes = {
    "kernel": jax.ShapeDtypeStruct((len(rate_R), teacher.width, num_classes), jnp.float32),
    "bias": jax.ShapeDtypeStruct((len(rate_R), num_classes), jnp.float32),
  }
  return LinearProbe(
    frozen=teacher.params,
    needs_labels=True,
    may_diverge=r"(params|opt_state)/.*",  # a head with too high a rate may, and the others go on
    teacher=teacher,
    shapes=shapes,
    flip=config.augment.flip,
    rate_R=rate_R,
    momentum=config.probe.statistics_momentum,
    learner=_with_rates(build_learner(config.optim, shapes, run), rate_R),
  )


def _with_rates(learner: Learner, rate_R: Float[Array, " R"]) -> Learner:
  """Return a learner that multiplies the updates of head r by its rate."""

  def update(grads: PyTree, opt_state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
    updates, opt_state = learner.optimizer.update(grads, opt_state, params)
    return jax.tree.map(lambda x: x * rate_R.reshape((-1,) + (1,) * (x.ndim - 1)), updates), opt_state

  optimizer = optax.GradientTransformation(learner.optimizer.init, update)
  return dataclasses.replace(learner, optimizer=optimizer)


def standardize(feature_BC: Float[Array, "B C"], statistics: Statistics) -> Float[Array, "B C"]:
  """Scale every channel to mean zero and variance one."""
  return (feature_BC - statistics["mean"][None]) * jax.lax.rsqrt(statistics["var"] + EPS)[None]
