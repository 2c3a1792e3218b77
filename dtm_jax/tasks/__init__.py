"""A task defines the inputs, the targets and the loss of a run. Each file has `build(config, run) -> Task`.

A task is a frozen dataclass. The boxes of its figure are methods with names, and `train_step` puts them
together, so a benchmark or a test can call each box:

    task = pretrain.build(config, Run(total_steps=100, steps_per_epoch=10.0, batch_size=16))
    state = task.init(jax.random.key(0))
    state, measurements = task.train_step(state, task.frozen, batch, jax.random.key(seed))
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from dtm_jax import plugins, rngs
from dtm_jax.arrays import Array, Batch, Float, Int, Key, PyTree, RandomKey, UInt8
from dtm_jax.errors import OptionError, concerning
from dtm_jax.teachers import Teacher
from dtm_jax.training import finiteness, optim, schedules

State = dict[str, PyTree]
"""What a checkpoint holds: "params", "opt_state", "step" (an int32 scalar), and entries of single tasks."""

Scalars = dict[str, Array]
"""The measurements of a step, by name."""

Pixels = UInt8[Array | np.ndarray, "B H W 3"]
"""The images of a batch."""

Labels = Int[Array | np.ndarray, " B"]
"""The class of each image of a batch."""

Output = Callable[[State, PyTree, Batch], Array]
"""A function (state, frozen, batch) -> array that evaluators use."""


@dataclasses.dataclass(frozen=True)
class Run:
  """The facts of a run that a task needs, once data and durations are resolved.

  Attributes:
    total_steps, steps_per_epoch: counted in steps of the first batch size, for which schedules are made.
    batch_size: the global batch of this start.
    class_names: the classes of the training set; None if it has none.
    first_batch_size: the global batch of the run's first start; None means `batch_size`.
    scale, shift: step t evaluates a schedule at scale · t + shift, because the batch size has changed.
  """

  total_steps: int
  steps_per_epoch: float
  batch_size: int
  class_names: tuple[str, ...] | None = None
  first_batch_size: int | None = None
  scale: float = 1.0
  shift: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Task(abc.ABC):
  """Pure functions over one `State`. All of them can be traced, except `pretrained`.

  Attributes:
    frozen: arrays that every step reads. They are never trained and never saved.
    tokenize: captions -> int32 [n, T], for tasks that know text.
    needs_labels: whether every training image must have a label of the data set's classes.
    may_diverge: a pattern. Arrays of the state with a matching path may be infinite or NaN; None means none.
  """

  frozen: PyTree = dataclasses.field(default_factory=dict)
  tokenize: Callable[..., Any] | None = None
  needs_labels: bool = False
  may_diverge: str | None = None

  @abc.abstractmethod
  def init(self, key: RandomKey, params: PyTree | None = None) -> State:
    """Return the initial state. `params` replace the random parameters."""

  @abc.abstractmethod
  def train_step(self, state: State, frozen: PyTree, batch: Batch, key: RandomKey) -> tuple[State, Scalars]:
    """Make one update and return the next state and the measurements. `key` belongs to the whole run."""

  @property
  @abc.abstractmethod
  def outputs(self) -> Mapping[str, Output]:
    """The functions among which evaluators choose, by name."""

  def pretrained(self, key: RandomKey) -> PyTree | None:
    """Read the parameters to start from, NumPy arrays on the host, or return None to start at random.

    `key` draws the parameters that the weights lack.
    """
    return None


@dataclasses.dataclass(frozen=True)
class StepKeys:
  """The random keys of one training step.

  Attributes:
    run: the key of the whole run.
    step: the number of the step.
    batch_size: the global batch.
  """

  run: RandomKey
  step: int | Int[Array, ""]
  batch_size: int

  def stream(self, name: str) -> RandomKey:
    """Return one key for the whole batch."""
    return rngs.stream(self.run, name, self.step)

  def per_example(self, name: str) -> Key[Array, " B"]:
    """Return one key for each image of the batch."""
    return rngs.per_example(self.stream(name), self.batch_size)


@dataclasses.dataclass(frozen=True)
class Learner:
  """The update that all tasks share: the gradient, the optimiser, and the common measurements.

  Attributes:
    optimizer: updates the parameters.
    learning_rate: step -> the learning rate of this step, to be measured.
  """

  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule

  def init(self, params: PyTree) -> State:
    """Return the state at step 0."""
    return {"params": params, "opt_state": self.optimizer.init(params), "step": jnp.int32(0)}

  def update(
    self, state: State, loss_fn: Callable[[PyTree], tuple[Float[Array, ""], Any]]
  ) -> tuple[State, Scalars, Any]:
    """Make one update along the gradient of `loss_fn`.

    Args:
      loss_fn: params -> (loss, more). `more` is anything that the caller wants back.

    Returns:
      The next state, in which other entries than parameters, optimiser state and step are as before; the
      measurements "loss", "learning_rate" and "grad_norm" (before clipping); and `more`.
    """
    params, step = state["params"], state["step"]
    (loss, more), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    with jax.named_scope("optimiser"):
      updates, opt_state = self.optimizer.update(grads, state["opt_state"], params)
      params = optax.apply_updates(params, updates)
    after = {"params": params, "opt_state": opt_state, "step": step + 1}
    measurements = {
      "loss": loss,
      "learning_rate": self.learning_rate(step),
      "grad_norm": optax.tree.norm(grads),
    }
    return state | after, measurements, more


def build_learner(options: Any, shapes: PyTree, run: Run) -> Learner:
  """Return the learner that the config's section `optim` describes, for parameters of these shapes.

  Raises:
    OptionError: see `optim.make_optimizer`.
  """
  durations = {"warmup_steps", "warmup_epochs", "warmup_examples"}
  warmup_steps = schedules.duration(
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
  return Learner(optax.GradientTransformation(optimizer.init, update), schedule)


def build_teacher(config: Any, patch_size: int | None = None) -> Teacher:
  """Return the teacher of the config, at the image size that fits the run. Its weights are read once.

  `teacher.image_size` decides where it is given. Otherwise a student's `patch_size` decides: both see one
  grid of patches. A DINOv2 with patches of 14 pixels sees 196 pixels beside a student with patches of 16 that
  sees 224. Without a student the size is data.image_size, in whole patches. A teacher that knows only its own
  size keeps it.

  Raises:
    OptionError: an option is missing that the teacher's files do not give.
  """
  with concerning(teacher__name=config.teacher.name, teacher__path=config.teacher.get("path")):
    options = {name: value for name, value in config.teacher.items() if name != "noise"}
    teacher: Teacher = plugins.build("teachers", options)
  if teacher.missing:
    raise OptionError(teacher.missing)
  if config.teacher.get("image_size") is not None:
    return teacher
  rows = max(round(config.data.image_size / (patch_size or teacher.patch_size)), 1)
  if rows == teacher.grid[0] or teacher.resized is None:
    return teacher
  size, own = rows * teacher.patch_size, teacher.image_size
  logging.warning(
    "Teacher %r was made for images of %d pixels and sees %d: its positions are resized. "
    "--config.teacher.image_size gives another size.", teacher.name, own, size,
  )  # fmt: skip
  return teacher.resized(size)


def require_class_names(config: Any, run: Run, purpose: str) -> tuple[str, ...]:
  """Return the class names of the training set.

  Raises:
    OptionError: it has none. The message names the set, its place, and the `purpose` ("classify").
  """
  if run.class_names is None:
    name, place = config.data.dataset.name, config.data.dataset.get("data_dir") or "its usual place"
    hint = " In a folder of images each class is a folder below the split." if purpose == "classify" else ""
    raise OptionError(
      f"Data set {name!r} has no class names in {place}: there is nothing to {purpose}.{hint}"
    )
  return run.class_names
