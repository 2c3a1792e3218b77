"""Jit a task's train step with its shardings. This module needs neither CLU nor TensorFlow.

    mesh = make_mesh(data=-1, fsdp=1)
    state = init_state(task, jax.random.key(0), mesh, rules)
    frozen = place_frozen(task, mesh, rules)
    step = jit_train_step(task, state, frozen, mesh)
    state, measurements = step(state, frozen, to_device(batch, mesh), jax.random.key(seed))

The key is an argument of the compiled step, so one program serves every seed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh, NamedSharding

from dtm_jax.arrays import Array, Batch, PyTree, RandomKey
from dtm_jax.training.mesh import batch_sharding, param_shardings, place, replicated

Rules = Sequence[Sequence[str]]
"""The pairs (pattern, tactic) of `config.mesh.rules`; see `mesh.param_shardings`."""

Step = Callable[[PyTree, PyTree, Batch, RandomKey], tuple[PyTree, dict[str, Array]]]
"""(state, frozen, batch, key) -> (state, measurements)."""

Prepare = Callable[[PyTree, Batch, RandomKey], Batch]
"""(arrays on the devices, the rows of one step, the key of the run) -> the batch of this step."""


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

  def run(state: PyTree, frozen: PyTree, batch: Batch, key: RandomKey):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # code per device (matching) looks the mesh up
      return task.train_step(_gather_params(state, mesh), _gather(frozen, mesh), batch, key)

  return _jit(run, state, frozen, mesh, batch_sharding(mesh))


def jit_calls(
  task: Trainable, prepare: Prepare, state: PyTree, frozen: PyTree, mesh: Mesh, *, several: bool
) -> jax.stages.Wrapped:
  """Return a function that makes one step, or `several` by `scan_steps`, under `jax.jit`.

  It differs from `jit_train_step` in that the step makes its batch. Every device holds all `arrays`.

  Returns:
    (state, frozen, arrays, rows, key) -> (state, measurements). With `several`, the rows and the measurements
    have a leading axis of steps.
  """
  shardings = _shardings(state)

  def step(state: PyTree, frozen: PyTree, batch: Batch, key: RandomKey):
    return task.train_step(_gather_params(state, mesh), frozen, batch, key)

  def step_of_several(*args: Any):
    state, measurements = step(*args)
    return jax.lax.with_sharding_constraint(state, shardings), measurements

  def run(state: PyTree, frozen: PyTree, arrays: PyTree, rows: Batch, key: RandomKey):
    frozen = _gather(frozen, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      if several:
        return scan_steps(step_of_several, prepare, state, frozen, arrays, rows, key)
      return step(state, frozen, prepare(arrays, rows, key), key)

  return _jit(run, state, frozen, mesh, replicated(mesh), batch_sharding(mesh, axis=int(several)))


def scan_steps(
  train_step: Step,
  prepare: Prepare,
  state: PyTree,
  frozen: PyTree,
  arrays: PyTree,
  rows: Batch,
  key: RandomKey,
) -> tuple[PyTree, dict[str, Array]]:
  """Make several train steps by one `jax.lax.scan`; return the state and the measurements of every step.

  This is a pure function. `jax.vmap` over state, rows and key trains several seeds at once:

      steps = functools.partial(scan_steps, task.train_step, feed.prepare)
      states, measurements = jax.vmap(steps, (0, None, None, 0, 0))(states, frozen, feed.arrays, rows, keys)

  Args:
    train_step: that of a task.
    prepare: makes the batch of a step from `arrays`, the rows of the step, and the key.
    arrays: what all steps share, such as the images of a data set that is on the devices.
    rows: arrays with the leading axes [steps, B].
    key: of the whole run.
  """

  def step(state: PyTree, rows: Batch) -> tuple[PyTree, dict[str, Array]]:
    return train_step(state, frozen, prepare(arrays, rows, key), key)

  return jax.lax.scan(step, state, rows)


def _jit(
  run: Callable[..., Any], state: PyTree, frozen: PyTree, mesh: Mesh, *others: NamedSharding
) -> jax.stages.Wrapped:
  """Jit a function of (state, frozen, *others, key). `others` are the shardings of these arguments."""
  return jax.jit(
    run,
    in_shardings=(_shardings(state), _shardings(frozen), *others, None),
    out_shardings=(_shardings(state), replicated(mesh)),
    donate_argnums=0,
  )


def _gather(tree: PyTree, mesh: Mesh) -> PyTree:
  return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def _gather_params(state: PyTree, mesh: Mesh) -> PyTree:
  return state | {"params": _gather(state["params"], mesh)}


_shardings = functools.partial(jax.tree.map, lambda x: x.sharding)
