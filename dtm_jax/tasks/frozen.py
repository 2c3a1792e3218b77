"""The features of any teacher or earlier run as they are, for evaluators of features such as kNN.

Nothing is learned: the run has no steps and only evaluates.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from dtm_jax.arrays import Array, Batch, Float, PyTree, RandomKey
from dtm_jax.augment import to_float
from dtm_jax.errors import OptionError
from dtm_jax.tasks import Run, Scalars, State, Task, build_teacher, teacher_input


def build(config, run: Run) -> Task:
  """Sections read: teacher, and data.image_size.

  `predict` has "features", the mean of the teacher's patch tokens (the teacher "checkpoint" is an earlier
  run's student), "tokens" themselves, and "cls", the class token's output, of a teacher that has one.

  Raises:
    OptionError: the run has steps to train.
  """
  teacher = build_teacher(config)

  def pixels(batch: Batch) -> Float[Array, "B H W 3"]:
    return teacher_input(teacher, to_float(batch["image"]))

  def tokens(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B N C"]:
    return teacher.tokens(frozen, pixels(batch))

  def features(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B C"]:
    return tokens(state, frozen, batch).mean(axis=1)

  def cls(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B _"]:
    return teacher.cls(frozen, pixels(batch))

  predict = {"features": features, "tokens": tokens} | ({"cls": cls} if teacher.cls else {})
  return untrained(run, teacher.name, teacher.params, predict)


def untrained(
  run: Run,
  name: str,
  frozen: PyTree,
  predict: Mapping[str, Callable[[State, PyTree, Batch], Array]],
  tokenize: Callable | None = None,
) -> Task:
  """A task whose state is empty and whose `frozen` parameters are those of `name`.

  Raises:
    OptionError: the run has steps to train.
  """
  if run.total_steps:
    raise OptionError(f"{name} is frozen and learns nothing: total_steps must be 0, not {run.total_steps}.")

  def init(key: RandomKey, params: PyTree | None = None) -> State:
    return {"params": {}, "opt_state": {}, "step": jnp.int32(0)}

  def train_step(state: State, frozen: PyTree, batch: Batch, key: RandomKey) -> tuple[State, Scalars]:
    return state, {"loss": jnp.float32(0)}

  return Task(init=init, train_step=train_step, frozen=frozen, predict=predict, tokenize=tokenize)
