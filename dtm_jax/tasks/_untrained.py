"""The common part of the tasks that learn nothing: an empty state and no steps."""

import dataclasses

import jax.numpy as jnp

from dtm_jax.arrays import Batch, PyTree, RandomKey
from dtm_jax.errors import OptionError
from dtm_jax.tasks import Run, Scalars, State, Task


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Untrained(Task):
  """A task whose state is empty. Its subclasses add `outputs` of the frozen arrays."""

  def init(self, key: RandomKey, params: PyTree | None = None) -> State:
    return {"params": {}, "opt_state": {}, "step": jnp.int32(0)}

  def train_step(self, state: State, frozen: PyTree, batch: Batch, key: RandomKey) -> tuple[State, Scalars]:
    return state, {"loss": jnp.float32(0)}


def require_no_steps(run: Run, name: str) -> None:
  """Raise an OptionError that names the model if the run has steps to train."""
  if run.total_steps:
    raise OptionError(f"{name} is frozen and learns nothing: total_steps must be 0, not {run.total_steps}.")
