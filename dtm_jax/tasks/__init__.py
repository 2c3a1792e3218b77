"""Tasks: what is learned from what. `build(config, run) -> Task`, one file each."""

import dataclasses
from collections.abc import Callable, Mapping

import optax

from dtm_jax import optim
from dtm_jax.arrays import Array, Batch, PyTree, RandomKey
from dtm_jax.models import finiteness

State = dict[str, PyTree]
"""{"params": ..., "opt_state": ..., "step": int32 scalar}, and what else a task needs: all that a checkpoint
holds."""

Scalars = dict[str, Array]
"""What a step measures, by name."""


@dataclasses.dataclass(frozen=True)
class Run:
  """What a task must know of the run, once data and durations are resolved.

  Attributes:
    total_steps, steps_per_epoch: in steps of the first batch size, which schedules are made for.
    batch_size: of this start.
    first_batch_size: of the run's first start; None: `batch_size`.
    scale, shift: a schedule is evaluated at scale · t + shift for step t, because the batch size has changed.
  """

  total_steps: int
  steps_per_epoch: float
  batch_size: int
  class_names: tuple[str, ...] | None = None
  first_batch_size: int | None = None
  scale: float = 1.0
  shift: float = 0.0


@dataclasses.dataclass(frozen=True)
class Task:
  """Pure functions over one `State`.

  Attributes:
    init: (key, params=None) -> State, traceable; `params` take the place of the initial ones.
    pretrained: key -> such params on the host, for a run that starts from others' weights; `key` is for what
      these lack.
    train_step: (state, frozen, batch, key of the run) -> (state, scalars), traceable.
    frozen: arrays that are read in every step, never trained and never saved.
    predict: functions (state, frozen, batch) -> arrays, by name; evaluators choose among them.
    tokenize: captions -> int32 [n, T], for tasks that know text.
    needs_labels: every training image must have a label of the data set's classes.
    may_diverge: pattern of the paths of the state's arrays that need not be finite; None: all must be.
  """

  init: Callable[..., State]
  train_step: Callable[[State, PyTree, Batch, RandomKey], tuple[State, Scalars]]
  frozen: PyTree
  predict: Mapping[str, Callable[[State, PyTree, Batch], Array]]
  tokenize: Callable | None = None
  pretrained: Callable[[RandomKey], PyTree] | None = None
  needs_labels: bool = False
  may_diverge: str | None = None


def count_classes(config, run: Run) -> int:
  """Of the training set; a ValueError that names it where it has none."""
  if run.class_names is None:
    name, place = config.data.dataset.name, config.data.dataset.get("data_dir") or "its usual place"
    raise ValueError(
      f"Data set {name!r} has no class names in {place}: there is nothing to classify. In a folder of images "
      "each class is a folder below the split."
    )
  return len(run.class_names)


def build_optimizer(options, shapes: PyTree, run: Run):
  """`optim.make_optimizer` from the config's section, its warm-up resolved to steps."""
  durations = {"warmup_steps", "warmup_epochs", "warmup_examples"}
  warmup_steps = optim.duration(
    "warmup", options, steps_per_epoch=run.steps_per_epoch, default=0,
    batch_size=run.first_batch_size or run.batch_size,
  )  # fmt: skip
  optimizer, schedule = optim.make_optimizer(
    shapes,
    total_steps=run.total_steps,
    warmup_steps=warmup_steps,
    batch_size=run.batch_size,
    scale=run.scale,
    shift=run.shift,
    **{name: value for name, value in options.items() if name not in durations},
  )
  update = lambda grads, *more: optimizer.update(finiteness.watch_gradients(grads), *more)
  return optax.GradientTransformation(optimizer.init, update), schedule
