"""Make the optimiser with its rules by parameter name.

Names decide about weight decay and layer decay, not ranks. The parameters of scanned blocks are stacked to
[L, ...], so a bias has two axes, and the rule "no decay if ndim <= 1" would be wrong.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from dtm_jax.arrays import PyTree, named_leaves, path_name
from dtm_jax.errors import OptionError, check_choice
from dtm_jax.training.schedules import make_schedule, scale_by_batch

NO_DECAY = (
  r"(.*/)?(bias|q_bias|k_bias|v_bias|scale|layer_scale1|layer_scale2)",
  r"(.*/)?(cls_token|pos_embed|class_embedding|position_embedding|logit_scale)",
)
"""Weight decay applies to all kernels, the mask token and the relative position tables. It skips LayerNorms,
biases, layer scales, the class token and absolute positions."""

BLOCKS = r"(.*/)?blocks/.*"
STEM = r"(.*/)?(cls_token|mask_token|pos_embed|patch_embed/.*)"
"""Layer decay distinguishes the stacked blocks and the parameters below them."""

MUON_KERNELS = r"(.*/)?blocks/.*kernel"

OPTIMIZERS = ("adamw", "muon", "sgd")


def decayed(name: str, no_decay: Sequence[str] = NO_DECAY) -> bool:
  """Return whether weight decay applies to the parameter with this "/"-joined path.

  It does unless a pattern matches the whole path.
  """
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
  fixed: Sequence[str] = (),
  scale: float = 1.0,
  shift: float = 0.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Return the optimiser for parameters of these shapes, and the learning rate as a function of the step.

      p ← p·(1 - lr·s·wd) - lr·s·d          s: layer decay, wd: zero where `no_decay` matches

  The direction d is m̂ / (sqrt(v̂) + eps) for "adamw" and the momentum (betas[0]) for "sgd". For "muon" it is
  the orthogonalised momentum of the blocks' kernels, scaled to the size of an Adam update; all other
  parameters use "adamw". Gradients are first clipped to the global norm `clip_norm`.

  Args:
    total_steps, warmup_steps: counted in training steps. The schedule advances once per update.
    batch_size: the images that one training step sees.
    lr: the peak. `lr_scaling` scales it by the joint batch of an update; `final_lr` is not scaled.
    accumulate: the steps that make one update from the mean of their gradients.
    layer_decay: multiplies the rate by ld^(L+1-i): i = 0 for patch embedding, tokens and positions, b+1 for
      block b of L, and L+1 for the rest.
    fixed: patterns of the paths of parameters that are not trained and have no moments.
    scale, shift: step t evaluates the schedule at scale · t + shift. So a run that goes on with another batch
      size stays at the same place of its schedule.

  Raises:
    OptionError: `name`, `lr_scaling` or `decay` is unknown, or a pattern of `fixed` matches no parameter.
  """
  check_choice("optimizer", name, OPTIMIZERS)
  _check_fixed(shapes, fixed)
  course = make_schedule(
    peak=scale_by_batch(lr, batch_size * accumulate, lr_scaling), final=final_lr, decay=decay,
    total_steps=total_steps // accumulate, warmup_steps=warmup_steps // accumulate,
  )  # fmt: skip
  moved = (scale, shift) != (1.0, 0.0)
  schedule = (lambda count: course(scale * count + shift / accumulate)) if moved else course
  optimizer = make_update(
    shapes, schedule, name=name, betas=betas, eps=eps, weight_decay=weight_decay, no_decay=no_decay,
    clip_norm=clip_norm, layer_decay=layer_decay,
  )  # fmt: skip
  if fixed:  # the labels are names in the tree of the state
    label = _by_name(lambda n, x: "frozen" if _matches(n, fixed) else "trained")
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
  """Return one update of `make_optimizer`. Rate and weight decay may be functions of the update's count."""
  return optax.chain(
    optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
    _direction(name, betas, eps),
    optax.add_decayed_weights(weight_decay, mask=_by_name(lambda n, x: decayed(n, no_decay))),
    _scale_by_layer(shapes, layer_decay) if layer_decay else optax.identity(),
    optax.scale_by_learning_rate(lr),
  )


def layer_decay_scales(params: PyTree, layer_decay: float) -> PyTree:
  """Return the factor of the learning rate of every parameter; see `layer_scales`."""
  depth = _depth(params)
  return _by_name(lambda n, x: layer_scales(n, x.ndim, depth, layer_decay))(params)


def layer_scales(name: str, ndim: int, layers: int, layer_decay: float) -> np.ndarray | float:
  """Return ld^(L+1-i) for one parameter. Stacked blocks have one number per layer, of shape [L, 1, ...]."""
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
      # The last two axes are the matrix. The axis before them (the layers) is a batch of matrices.
      weight_dimension_numbers=_by_name(lambda n, x: optax.contrib.MuonDimensionNumbers(-2, -1))
    ),
    # Orthogonal matrices of any shape get the root mean square of an Adam update (arXiv 2502.16982), so
    # one learning rate serves both halves.
    optax.stateless(lambda updates, _: jax.tree.map(lambda u: 0.2 * max(u.shape[-2:]) ** 0.5 * u, updates)),
  )
  label = _by_name(lambda n, x: "muon" if re.fullmatch(MUON_KERNELS, n) else "adam")
  return optax.partition({"muon": muon, "adam": adam}, label)


def _scale_by_layer(shapes: PyTree, layer_decay: float) -> optax.GradientTransformation:
  depth = _depth(shapes)
  # Matches the names of the updates. Fixed parameters have no updates, so no rule needs to cover them.
  scale = _by_name(lambda n, u: layer_scales(n, u.ndim, depth, layer_decay) * u)
  return optax.stateless(lambda updates, _: scale(updates))


def _check_fixed(shapes: PyTree, fixed: Sequence[str]) -> None:
  names = list(named_leaves(shapes))
  unmatched = [pattern for pattern in fixed if not any(re.fullmatch(pattern, n) for n in names)]
  if unmatched:
    raise OptionError(
      f"No parameter matches these patterns of optim.fixed, {unmatched}. Parameters: {', '.join(names)}."
    )


def _depth(params: PyTree) -> int:
  return max((x.shape[0] for n, x in named_leaves(params).items() if re.fullmatch(BLOCKS, n)), default=0)


def _matches(name: str, patterns: Sequence[str]) -> bool:
  return any(re.fullmatch(pattern, name) for pattern in patterns)


def _by_name(function: Callable[[str, Any], Any]) -> Callable[[PyTree], PyTree]:
  """Map function(name, leaf) over a tree. A partitioned tree shows it only the leaves that are present."""
  return lambda tree: jax.tree_util.tree_map_with_path(lambda path, x: function(path_name(path), x), tree)
