"""Tasks: what is learned from what. `build(config, run) -> Task`, one file each."""

import dataclasses
from collections.abc import Callable, Mapping

import optax
from absl import logging

from dtm_jax import plugins
from dtm_jax.arrays import Array, Batch, Float, PyTree, RandomKey
from dtm_jax.augment import normalize, resize_to
from dtm_jax.errors import OptionError, concerning
from dtm_jax.teachers import Teacher
from dtm_jax.training import finiteness, optim

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


def build_teacher(config, patch_size: int | None = None) -> Teacher:
  """The teacher of the config, at the image size that fits the run unless `teacher.image_size` gives one.

  With the student's `patch_size`, that is the size at which both have one grid of patches: a DINOv2 with
  patches of 14 pixels sees 196 pixels beside a student with patches of 16 that sees 224. Without a student it
  is data.image_size, in whole patches. A teacher that knows only its own size keeps it. The weights are read
  once.

  Raises:
    OptionError: an option is missing that the teacher's files do not tell.
  """
  with concerning(teacher__name=config.teacher.name, teacher__path=config.teacher.get("path")):
    teacher = plugins.build("teachers", config.teacher)
  if teacher.missing:
    raise OptionError(teacher.missing)
  if config.teacher.get("image_size") is not None:
    return teacher
  rows = max(round(config.data.image_size / (patch_size or teacher.patch_size)), 1)
  size, own = rows * teacher.patch_size, teacher.image_size
  if size == own or teacher.resized is None:
    return teacher
  logging.warning(
    "Teacher %r was made for images of %d pixels and sees %d: its positions are resized. "
    "--config.teacher.image_size gives another size.", teacher.name, own, size,
  )  # fmt: skip
  return teacher.resized(size)


def teacher_input(teacher: Teacher, image: Float[Array, "B H W 3"]) -> Float[Array, "B side side 3"]:
  """Images with values in [0, 1], resized and normalised as the teacher expects them."""
  return normalize(resize_to(image, teacher.image_size), teacher.mean, teacher.std)


def count_classes(config, run: Run) -> int:
  """Of the training set; an OptionError that names it where it has none."""
  if run.class_names is None:
    name, place = config.data.dataset.name, config.data.dataset.get("data_dir") or "its usual place"
    raise OptionError(
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
