"""The features of a teacher or an earlier run, for evaluators of features such as kNN. Nothing is learned."""

import dataclasses
from typing import Any

from dtm_jax.arrays import Array, Batch, Float, PyTree
from dtm_jax.augment import to_float
from dtm_jax.tasks import Output, Run, State, build_teacher
from dtm_jax.tasks._untrained import Untrained, require_no_steps
from dtm_jax.teachers import Teacher


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FrozenTeacher(Untrained):
  """The outputs are "features", "tokens", and "cls" if the teacher has a class token."""

  teacher: Teacher

  @property
  def outputs(self) -> dict[str, Output]:
    functions: dict[str, Output] = {"features": self.features, "tokens": self.tokens}
    return functions | ({"cls": self.cls} if self.teacher.cls else {})

  def features(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B C"]:
    """Return the mean of the teacher's patch tokens."""
    return self.tokens(state, frozen, batch).mean(axis=1)

  def tokens(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B N C"]:
    """Return the teacher's patch tokens."""
    return self.teacher.apply(frozen, self._pixels(batch))

  def cls(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B _"]:
    """Return the output of the teacher's class token."""
    assert self.teacher.cls is not None  # otherwise it is no output
    return self.teacher.cls(frozen, self._pixels(batch))

  def _pixels(self, batch: Batch) -> Float[Array, "B H W 3"]:
    return self.teacher.prepare(to_float(batch["image"]))


def build(config: Any, run: Run) -> FrozenTeacher:
  """Build the task from the section teacher and from data.image_size.

  The teacher "checkpoint" is the student of an earlier run.

  Raises:
    OptionError: the run has steps to train.
  """
  teacher = build_teacher(config)
  require_no_steps(run, teacher.name)
  return FrozenTeacher(frozen=teacher.params, teacher=teacher)
