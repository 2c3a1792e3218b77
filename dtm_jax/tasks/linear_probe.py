"""Linear classifiers on the frozen features of any teacher or earlier run, several learning rates at once."""

import jax
import jax.numpy as jnp
import optax

from dtm_jax import rngs
from dtm_jax.arrays import Array, Batch, Float, PyTree, RandomKey
from dtm_jax.augment import augment, to_float
from dtm_jax.errors import OptionError
from dtm_jax.tasks import (
  Run,
  Scalars,
  State,
  Task,
  build_optimizer,
  build_teacher,
  count_classes,
  teacher_input,
)

EPS = 1e-6


def build(config, run: Run) -> Task:
  """Sections read: data, augment, teacher, probe, optim.

  Features are the mean of the teacher's patch tokens (the teacher "checkpoint" is an earlier run's student),
  computed once a batch for all R heads. They are standardised by running statistics over batches, like a
  BatchNorm without parameters, as the linear probes of masked image models do: their features' scales differ
  much. Head r learns with `optim`'s schedule times `probe.rates[r]`; what one head learns does not
  depend on the others. `evaluators.best_head` chooses among them.

  Raises:
    OptionError: the data set has no class names; no rates; or a gradient clipping or weight decay, which
      would tie the heads together or is not part of a probe.
  """
  num_classes = count_classes(config, run)
  if config.optim.clip_norm or config.optim.weight_decay:
    raise OptionError(
      f"A linear probe has no clip_norm ({config.optim.clip_norm}) and no weight_decay "
      f"({config.optim.weight_decay}): set both to 0."
    )
  teacher = build_teacher(config)
  if not config.probe.rates:
    raise OptionError(f"probe.rates={config.probe.rates} names no learning rate.")
  rate_R = jnp.asarray(config.probe.rates, jnp.float32)
  num_heads, momentum = len(rate_R), config.probe.statistics_momentum
  shapes = {
    "kernel": jax.ShapeDtypeStruct((num_heads, teacher.width, num_classes), jnp.float32),
    "bias": jax.ShapeDtypeStruct((num_heads, num_classes), jnp.float32),
  }
  optimizer, learning_rate = build_optimizer(config.optim, shapes, run)

  def init(key: RandomKey, params: PyTree | None = None) -> State:
    heads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes) if params is None else params
    statistics = {"mean": jnp.zeros(teacher.width), "var": jnp.ones(teacher.width)}
    return {
      "params": heads, "opt_state": optimizer.init(heads), "statistics": statistics, "step": jnp.int32(0)
    }  # fmt: skip

  def features(frozen: PyTree, image: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
    tokens = teacher.tokens(frozen, teacher_input(teacher, image))
    return jax.lax.stop_gradient(tokens.mean(axis=1))

  def train_step(state: State, frozen: PyTree, batch: Batch, key: RandomKey) -> tuple[State, Scalars]:
    """One update of all heads."""
    step, batch_size = state["step"], len(batch["label"])
    keys = rngs.per_example(rngs.stream(key, "augment", step), batch_size)
    feature_BD = features(frozen, augment(keys, batch["image"], flip=config.augment.flip, color_jitter=0.0))
    now = {"mean": feature_BD.mean(axis=0), "var": feature_BD.var(axis=0)}
    # The first batch's statistics replace the initial ones.
    statistics = optax.incremental_update(now, state["statistics"], jnp.where(step, 1 - momentum, 1.0))
    feature_BD = standardize(feature_BD, now)

    def loss_fn(heads: PyTree) -> tuple[Array, Array]:
      label_BR = jnp.broadcast_to(batch["label"][:, None], (batch_size, num_heads))
      loss_BR = optax.softmax_cross_entropy_with_integer_labels(scores(heads, feature_BD), label_BR)
      return loss_BR.mean(axis=0).sum(), loss_BR.mean(axis=0)

    grads, loss_R = jax.grad(loss_fn, has_aux=True)(state["params"])
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    updates = jax.tree.map(lambda x: x * rate_R.reshape((-1,) + (1,) * (x.ndim - 1)), updates)
    after = {
      "params": optax.apply_updates(state["params"], updates), "opt_state": opt_state,
      "statistics": statistics, "step": step + 1,
    }  # fmt: skip
    # A head whose rate is too high may diverge: that is what the others are for.
    return after, {"loss": jnp.nanmin(loss_R), "learning_rate": learning_rate(step)}

  def logits(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B R G"]:
    feature_BD = features(frozen, to_float(batch["image"]))
    return scores(state["params"], standardize(feature_BD, state["statistics"]))

  def rates(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "R"]:
    return rate_R

  return Task(
    init=init,
    train_step=train_step,
    frozen=teacher.params,
    predict={"logits": logits, "rates": rates},
    needs_labels=True,
    may_diverge=r"(params|opt_state)/.*",  # a head whose rate is too high
  )


def standardize(feature_BD: Float[Array, "B D"], statistics: PyTree) -> Float[Array, "B D"]:
  """To mean zero and variance one, channel by channel."""
  return (feature_BD - statistics["mean"][None]) * jax.lax.rsqrt(statistics["var"] + EPS)[None]


def scores(heads: PyTree, feature_BD: Float[Array, "B D"]) -> Float[Array, "B R G"]:
  """Of every head."""
  return jnp.einsum("bd,rdg->brg", feature_BD, heads["kernel"]) + heads["bias"][None]
