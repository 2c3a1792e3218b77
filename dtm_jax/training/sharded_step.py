"""Jit a task's train step with its shardings. This module needs neither CLU nor TensorFlow.

    mesh = make_mesh(data=-1, fsdp=1)
    state = init_state(task, jax.random.key(0), mesh, rules)
    frozen = place_frozen(task, mesh, rules)
    step = jit_train_step(task, state, frozen, mesh)
    state, measurements = step(state, frozen, to_device(batch, mesh), jax.random.key(seed))

The key is an argument of the compiled step, so one program serves every seed.
"""

import functools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from dtm_jax.arrays import Array, Batch, PyTree, RandomKey
from dtm_jax.training.mesh import batch_sharding, param_shardings, place, replicated

Rules = Sequence[Sequence[str]]
"""The pairs (pattern, tactic) of `config.mesh.rules`; see `mesh.param_shardings`."""


@runtime_checkable
class Trainable(Protocol):
  """The part of a `tasks.Task` that this module uses."""

  @property
  def frozen(self) -> PyTree: ...

  def init(self, key: RandomKey, params: PyTree | None = None) -> PyTree: ...

  def train_step(
    self, state: PyTree, frozen: PyTree, batch: Batch, key: RandomKey
  ) -> tuple[PyTree, dict[str, Array]]: ...


def abstract_state(task: Trainable, mesh: Mesh, rules: Rules) -> PyTree:
  """Return the shape, type and sharding of every array of the task's state."""
  return with_shardings(jax.eval_shape(task.init, jax.random.key(0)), mesh, rules)


def with_shardings(arrays: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
  """Return a `jax.ShapeDtypeStruct` with its sharding for every array of a tree."""
  describe = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(describe, arrays, param_shardings(mesh, arrays, rules))


def init_state(
  task: Trainable, key: RandomKey, mesh: Mesh, rules: Rules, params: PyTree | None = None
) -> PyTree:
  """Return the initial state on the mesh. `params` are host arrays that replace the random ones."""
  shardings = _shardings(abstract_state(task, mesh, rules))
  params = place(params, shardings["params"]) if params is not None else None
  return jax.jit(task.init, out_shardings=shardings)(key, params)


def place_frozen(task: Trainable, mesh: Mesh, rules: Rules) -> PyTree:
  """Return the task's frozen arrays on the mesh."""
  return place(task.frozen, param_shardings(mesh, task.frozen, rules))


def jit_train_step(task: Trainable, state: PyTree, frozen: PyTree, mesh: Mesh) -> jax.stages.Wrapped:
  """Return the task's train step under `jax.jit`.

  The state keeps its shardings and its memory: the argument is donated. All devices split the batch.
  Split parameters are gathered when the step begins. Otherwise XLA would keep them split and gather the
  activations of every layer, which grow with the batch.

  Args:
    state, frozen: arrays on the mesh, or shapes with shardings (see `with_shardings`).

  Returns:
    (state, frozen, batch, key) -> (state, measurements).
  """

  def train_step(state: PyTree, frozen: PyTree, batch: Batch, key: RandomKey):
    gather = lambda tree: jax.lax.with_sharding_constraint(tree, replicated(mesh))
    state = state | {"params": gather(state["params"])}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # code per device (matching) looks the mesh up
      return task.train_step(state, gather(frozen), batch, key)

  return jax.jit(
    train_step,
    in_shardings=(_shardings(state), _shardings(frozen), batch_sharding(mesh), None),
    out_shardings=(_shardings(state), replicated(mesh)),
    donate_argnums=0,
  )


_shardings = functools.partial(jax.tree.map, lambda x: x.sharding)
