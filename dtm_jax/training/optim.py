"""Durations, learning-rate schedules, and the optimiser with its rules by parameter name.

Names, not ranks, decide about weight decay and layer decay: a parameter of scanned blocks is stacked
[L, ...], so that a bias has two axes and "no decay if ndim <= 1" would be wrong.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from dtm_jax.arrays import PyTree
from dtm_jax.errors import OptionError

NO_DECAY = (
  r"(.*/)?(bias|q_bias|k_bias|v_bias|scale|layer_scale1|layer_scale2)",
  r"(.*/)?(cls_token|pos_embed|class_embedding|position_embedding|logit_scale)",
)
"""LayerNorms, biases, layer scales, class token and absolute positions. Decayed are hence: every kernel, the
mask token and every table of relative positions."""

BLOCKS = r"(.*/)?blocks/.*"
STEM = r"(.*/)?(cls_token|mask_token|pos_embed|patch_embed/.*)"
"""For layer decay: the stacked blocks, and what lies below them."""

MUON_KERNELS = r"(.*/)?blocks/.*kernel"

OPTIMIZERS = ("adamw", "muon", "sgd")
DECAYS = ("cosine", "linear")
LR_SCALINGS = {
  "none": lambda batch: 1.0,
  "sqrt": lambda batch: (batch / 2048) ** 0.5,
  "linear": lambda batch: batch / 256,
}


def duration(
  name: str,
  config: Any,
  *,
  steps_per_epoch: int | float | None,
  batch_size: int,
  default: int | None = None,
) -> int:
  """Steps of the duration that `config` gives as `{name}_steps`, `{name}_examples` or `{name}_epochs`.

  The finest that is given (present and not None) wins, in this order. A duration above zero is at least
  one step. `config` is anything with `get`: a dict or a section of the config.

  Raises:
    OptionError: none is given and there is no default; or it is negative, or epochs of an unknown length.
  """
  per_unit = {"steps": 1, "examples": 1 / batch_size, "epochs": steps_per_epoch}
  for unit, factor in per_unit.items():
    value = config.get(f"{name}_{unit}")
    if value is None:
      continue
    if factor is None:
      raise OptionError(f"{name}_epochs={value} needs a data set of known size; give {name}_steps instead.")
    if value < 0:
      raise OptionError(f"{name}_{unit} must not be negative, got {value}.")
    return max(round(value * factor), int(value > 0))
  if default is None:
    choices = " or ".join(f"{name}_{unit}" for unit in per_unit)
    raise OptionError(f"No duration is given for {name!r}: set {choices}.")
  return default


def make_schedule(
  *, peak: float, total_steps: int, warmup_steps: int, final: float, decay: str = "cosine"
) -> optax.Schedule:
  """Linear warm-up over W steps, then a cosine, or a straight line for decay="linear", over T = total - W.

      lr(t) = peak · t / (W-1)                              t < W: from 0 to peak, both included
      lr(t) = final + (peak-final)/2 · (1 + cos(π i/T))     i = t - W: the peak once more, then down
      lr(t) = final + (peak-final) · (1 - i/T)              "linear"

  The first step of a run with a warm-up therefore has a rate of zero, and the last step lies just above
  `final`, which the rate keeps from `total_steps` on.

  Raises:
    OptionError: an unknown `decay`.
  """
  if decay not in DECAYS:
    raise OptionError(f"Unknown decay {decay!r}. Available: {', '.join(DECAYS)}.")
  if warmup_steps >= total_steps:
    logging.warning("The warm-up (%d steps) is as long as the run (%d steps).", warmup_steps, total_steps)
  cosine_steps = max(total_steps - warmup_steps, 1)

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    warmup = peak * (step / max(warmup_steps - 1, 1))
    # (1 + cos x)/2 as sin²((π-x)/2), which does not cancel at the end of the run.
    remaining = jnp.clip(total_steps - step, 0, cosine_steps) / cosine_steps
    share = remaining if decay == "linear" else jnp.sin(0.5 * jnp.pi * remaining) ** 2
    return jnp.where(step < warmup_steps, warmup, final + (peak - final) * share)

  return schedule


def scale_by_batch(lr: float, total_batch: int, rule: str = "sqrt") -> float:
  """lr · sqrt(total_batch/2048) for "sqrt", lr · total_batch/256 for "linear", lr for "none"."""
  if rule not in LR_SCALINGS:
    raise OptionError(f"Unknown lr_scaling {rule!r}. Available: {', '.join(LR_SCALINGS)}.")
  return lr * LR_SCALINGS[rule](total_batch)


def decayed(name: str, no_decay: Sequence[str] = NO_DECAY) -> bool:
  """Whether weight decay applies to the parameter with this "/"-joined path: no pattern matches all of it."""
  return not _matches(name, no_decay)


def make_optimizer(
  shapes: PyTree,
  *,
  total_steps: int,
  warmup_steps: int,
  batch_size: int,
  name: str = "adamw",
  lr: float = 1.5e-3,
  final_lr: float = 1e-5,
  lr_scaling: str = "sqrt",
  decay: str = "cosine",
  betas: Sequence[float] = (0.9, 0.999),
  eps: float = 1e-8,
  weight_decay: float = 0.05,
  no_decay: Sequence[str] = NO_DECAY,
  clip_norm: float | None = None,
  accumulate: int = 1,
  layer_decay: float | None = None,
  frozen: Sequence[str] = (),
  scale: float = 1.0,
  shift: float = 0.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimiser for parameters of these shapes, and the learning rate in force at a training step.

      p ← p·(1 - lr·s·wd) - lr·s·d          s: layer decay, wd: zero where `no_decay` matches

  with d = m̂ / (sqrt(v̂) + eps) for "adamw", the momentum (betas[0]) for "sgd", and for "muon" the
  orthogonalised momentum of the blocks' kernels, scaled to the size of an Adam update, with "adamw" for
  everything else. Gradients are first clipped to the global norm `clip_norm`.

  A training step sees `batch_size` images. `accumulate` steps make one update from the mean of their
  gradients; `lr` is meant for, and scaled by, their joint batch (`final_lr` is not scaled). Total and
  warm-up are counted in training steps like everything else, and the schedule advances once an update.

  The schedule is evaluated at scale · t + shift for step t: a run that goes on with another batch size stays
  at the same place of its schedule.

  `layer_decay` multiplies the rate by ld^(L+1-i): i = 0 for patch embedding, tokens and positions, b+1 for
  block b of L, L+1 for the rest. Parameters that match `frozen` do not move and have no moments.

  Raises:
    OptionError: an unknown `name`, `lr_scaling` or `decay`, or a `frozen` pattern that matches no parameter.
  """
  if name not in OPTIMIZERS:
    raise OptionError(f"Unknown optimizer {name!r}. Available: {', '.join(OPTIMIZERS)}.")
  names = [_join(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
  unmatched = [pattern for pattern in frozen if not any(re.fullmatch(pattern, n) for n in names)]
  if unmatched:
    raise OptionError(
      f"No parameter matches the frozen pattern(s) {unmatched}. Parameters: {', '.join(names)}."
    )

  course = make_schedule(
    peak=scale_by_batch(lr, batch_size * accumulate, lr_scaling),
    total_steps=total_steps // accumulate,
    warmup_steps=warmup_steps // accumulate,
    final=final_lr,
    decay=decay,
  )
  moved = (scale, shift) != (1.0, 0.0)
  schedule = (lambda count: course(scale * count + shift / accumulate)) if moved else course
  optimizer = make_update(
    shapes, schedule, name=name, betas=betas, eps=eps, weight_decay=weight_decay, no_decay=no_decay,
    clip_norm=clip_norm, layer_decay=layer_decay,
  )  # fmt: skip
  if frozen:
    label = _by_name(lambda n, x: "frozen" if _matches(n, frozen) else "trained")
    optimizer = optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, label)
  if accumulate > 1:
    optimizer = optax.MultiSteps(optimizer, accumulate).gradient_transformation()
  return optimizer, lambda step: schedule(step // accumulate)


def make_update(
  shapes: PyTree,
  lr: optax.ScalarOrSchedule,
  *,
  name: str = "adamw",
  betas: Sequence[float] = (0.9, 0.999),
  eps: float = 1e-8,
  weight_decay: optax.ScalarOrSchedule = 0.05,
  no_decay: Sequence[str] = NO_DECAY,
  clip_norm: float | None = None,
  layer_decay: float | None = None,
) -> optax.GradientTransformation:
  """One update of `make_optimizer`, at a rate and a weight decay that may be functions of the count."""
  return optax.chain(
    optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
    _direction(name, betas, eps),
    optax.add_decayed_weights(weight_decay, mask=_by_name(lambda n, x: decayed(n, no_decay))),
    _scale_by_layer(shapes, layer_decay) if layer_decay else optax.identity(),
    optax.scale_by_learning_rate(lr),
  )


def layer_decay_scales(params: PyTree, layer_decay: float) -> PyTree:
  """For every parameter the factor of its learning rate, ld^(L+1-i): see `layer_scales`."""
  depth = _depth(params)
  return _by_name(lambda n, x: layer_scales(n, x.ndim, depth, layer_decay))(params)


def layer_scales(name: str, ndim: int, layers: int, layer_decay: float) -> np.ndarray | float:
  """ld^(L+1-i) for one parameter; for stacked blocks one number a layer, of shape [L, 1, ...]."""
  if re.fullmatch(STEM, name):
    return layer_decay ** (layers + 1)
  if re.fullmatch(BLOCKS, name):
    scales = np.float32(layer_decay) ** np.arange(layers, 0, -1)
    return scales.astype(np.float32).reshape((layers,) + (1,) * (ndim - 1))
  return 1.0


def _direction(name: str, betas: Sequence[float], eps: float) -> optax.GradientTransformation:
  if name == "sgd":
    return optax.trace(decay=betas[0])
  adam = optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps)
  if name == "adamw":
    return adam
  muon = optax.chain(
    optax.contrib.scale_by_muon(
      # The last two axes are the matrix, and every one before (the layers) is a batch of matrices.
      weight_dimension_numbers=_by_name(lambda n, x: optax.contrib.MuonDimensionNumbers(-2, -1))
    ),
    # Orthogonal matrices of any shape get the root mean square of an Adam update (arXiv 2502.16982), so
    # that one learning rate serves both halves.
    optax.stateless(lambda updates, _: jax.tree.map(lambda u: 0.2 * max(u.shape[-2:]) ** 0.5 * u, updates)),
  )
  label = _by_name(lambda n, x: "muon" if re.fullmatch(MUON_KERNELS, n) else "adam")
  return optax.partition({"muon": muon, "adam": adam}, label)


def _scale_by_layer(shapes: PyTree, layer_decay: float) -> optax.GradientTransformation:
  depth = _depth(shapes)
  # By the updates' own names: where parameters are frozen, theirs are not among them.
  scale = _by_name(lambda n, u: layer_scales(n, u.ndim, depth, layer_decay) * u)
  return optax.stateless(lambda updates, _: scale(updates))


def _depth(params: PyTree) -> int:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return max((x.shape[0] for path, x in leaves if re.fullmatch(BLOCKS, _join(path))), default=0)


def _matches(name: str, patterns: Sequence[str]) -> bool:
  return any(re.fullmatch(pattern, name) for pattern in patterns)


def _by_name(function: Callable[[str, Any], Any]) -> Callable[[PyTree], PyTree]:
  """Maps function(name, leaf) over a tree; of a partitioned tree it sees the present leaves only."""
  return lambda tree: jax.tree_util.tree_map_with_path(lambda path, x: function(_join(path), x), tree)


def _join(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
