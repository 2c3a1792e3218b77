"""Saving and restoring the training state: the only importer of Orbax.

Orbax notices a file that is missing or cut short, but restores a flipped bit silently. We store a checksum
of every array beside it, verify on restore, move a step that fails aside, and go on with the one before.
"""

import datetime
import json
import signal
import threading
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from dtm_jax.arrays import Array, PyTree, Shaped

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
_NOT_CORRUPTION = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)


class CorruptCheckpointError(Exception):
  """What was read is not what was written."""


class Checkpoints:
  """The checkpoints of one run, in `folder`/<step>.

  When to save is the loop's decision. Keeps the newest `keep`, and besides them those at multiples of
  `keep_every_steps`.

  Preemption: under `jax.distributed` JAX's own service watches for SIGTERM and all processes agree on a
  step. In a lone process SIGTERM would simply kill, so a handler is installed until `close`; a second
  SIGTERM kills as ever.
  """

  def __init__(self, folder: str, *, keep: int = 2, keep_every_steps: int | None = None):
    preserve = [policies.LatestN(keep)]
    if keep_every_steps:
      preserve.append(policies.EveryNSteps(keep_every_steps))
    self._folder = epath.Path(folder).absolute()
    self._manager = ocp.CheckpointManager(
      self._folder,
      item_names=("state", "meta"),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(preserve),
        cleanup_tmp_directories=True,
      ),
    )
    self._terminated = threading.Event()
    self._previous_handler = None
    alone = not jax.distributed.is_initialized()
    if alone and threading.current_thread() is threading.main_thread():
      self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)

  @property
  def all_steps(self) -> list[int]:
    """The steps that are saved or being saved, ascending."""
    return sorted(self._manager.all_steps())

  @property
  def latest_step(self) -> int | None:
    """The newest of them."""
    return self._manager.latest_step()

  def reached_preemption(self, step: int) -> bool:
    """Whether to save now and leave. Every process must ask at every step; all get the same answer."""
    return self._terminated.is_set() or self._manager.reached_preemption(step)

  def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> bool:
    """Saves in the background; returns False where `step` is there already, which is left as it is.

    `meta` is small and JSON. The arrays are copied to the host before this returns, so the caller may donate
    them.
    """
    if step in self._manager.all_steps():
      return False
    contents = json.loads(json.dumps({"meta": meta, "arrays": _describe(state)}))  # as it will be read
    return self._manager.save(
      step,
      force=True,  # when to save is the caller's decision
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        meta=ocp.args.JsonSave(contents | {"crc32": _crc32(contents)}),
      ),
    )

  def restore(self, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any], int] | None:
    """(state, meta, step) of the newest step that restores and verifies; None if there is none.

    `abstract_state` holds `jax.ShapeDtypeStruct` with the shardings wanted now, on whatever mesh. A step
    that cannot be read, or whose checksums differ, is moved to `corrupt/` and the one before is tried.

    Raises:
      ValueError: a checkpoint is sound but holds other arrays than `abstract_state`. It stays where it is.
    """
    _check_shardings(abstract_state)
    self._manager.reload()  # another process may have written since
    steps = sorted(self.all_steps, reverse=True)
    for step in steps:
      try:
        state, meta = self._read(step, abstract_state)
      except (*_NOT_CORRUPTION, _MismatchError):
        raise
      except Exception as error:  # Orbax, TensorStore and the JSON reader fail in many ways
        failure = f"{type(error).__name__}: {error}"
      else:
        return state, meta, step
      self._move_aside(step, failure)
    if steps:
      logging.error("None of the checkpoints %s in %s could be restored.", steps, self._folder)
    return None

  def wait(self) -> None:
    """Until the save under way is on disk; raises what went wrong in it."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and gives SIGTERM back its meaning."""
    self._manager.close()
    if self._previous_handler is not None:
      signal.signal(signal.SIGTERM, self._previous_handler)
      self._previous_handler = None

  def _read(self, step: int, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
    meta, arrays = _read_meta(self._folder / str(step))
    _check_same_arrays(arrays, abstract_state, f"{self._folder}/{step}")
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
    state = self._manager.restore(step, args=args).state
    _verify(state, arrays)
    return state, meta

  def _move_aside(self, step: int, failure: str) -> None:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
    target = self._folder / "corrupt" / f"{step}-{stamp}"
    logging.error("Checkpoint %s/%d is corrupt and moves to %s: %s", self._folder, step, target, failure)
    if jax.process_index() == 0:
      target.parent.mkdir(exist_ok=True)
      (self._folder / str(step)).rename(target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"checkpoints:move_aside:{step}")
    self._manager.reload()

  def _on_sigterm(self, signum: int, frame: Any) -> None:
    logging.warning("SIGTERM: saving and leaving at the end of this step; a second one kills.")
    self._terminated.set()
    signal.signal(signum, self._previous_handler)


def load_params(folder: str, *, step: int | None = None) -> PyTree:
  """Only the parameters of a run's newest (or the given) step, as numpy arrays.

  Raises:
    FileNotFoundError: no such checkpoint; the message lists the steps that exist.
    CorruptCheckpointError: it cannot be read, or its checksums differ.
  """
  path = epath.Path(folder).absolute()
  steps = sorted(int(child.name) for child in path.iterdir() if child.name.isdigit()) if path.exists() else []
  chosen = step if step is not None else max(steps, default=None)
  if chosen not in steps:
    raise FileNotFoundError(f"No checkpoint {'' if step is None else f'{step} '}in {path}. Steps: {steps}.")
  try:
    _, arrays = _read_meta(path / str(chosen))
    params = {name: entry for name, entry in arrays.items() if name.startswith("params/")}
    abstract = _nest({name: jax.ShapeDtypeStruct(e["shape"], e["dtype"]) for name, e in params.items()})
    restored = ocp.PyTreeCheckpointer().restore(
      path / str(chosen) / "state",
      args=ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), abstract),
        partial_restore=True,
      ),
    )
    _verify(restored, params)
  except _NOT_CORRUPTION:
    raise
  except Exception as error:
    raise CorruptCheckpointError(f"Cannot load {path}/{chosen} (steps: {steps}): {error}") from error
  return restored["params"]


@jax.jit
def checksums(arrays: list[Shaped[Array, "..."]]) -> list[Shaped[Array, ""]]:
  """One uint32 for each array: Σ_i bits_i · (2i+1) modulo 2^32, i the place in row-major order.

  Flipping bit b of element i changes the sum by ±2^b·(2i+1). An odd factor cannot make a multiple of 2^32
  of 2^b, b < 32, so every single flip is seen; most other damage is too, since moved elements meet other
  weights. Integer sums modulo 2^32 do not depend on the order of addition: the number is the same on one
  device or on many hosts, and nothing is gathered.
  """
  return [_checksum(array) for array in arrays]


def _checksum(array: Shaped[Array, "..."]) -> Shaped[Array, ""]:
  if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    array = jax.random.key_data(array)
  if array.dtype == jnp.bool_:
    array = array.astype(jnp.uint8)
  # Eight bytes become two words in a new last axis.
  bits = jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize]).astype(jnp.uint32)
  place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
  for axis in reversed(range(bits.ndim)):  # by axis: a reshape would gather a sharded array
    iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place += iota * np.uint32(stride % 2**32)
    stride *= bits.shape[axis]
  return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


class _MismatchError(ValueError):
  """A sound checkpoint of something else."""


def _named(tree: PyTree) -> dict[str, Any]:
  """Arrays by their "/"-joined paths."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _nest(named: dict[str, Any]) -> PyTree:
  tree = {}
  for name, leaf in named.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def _kind(leaf: Any) -> dict[str, Any]:
  return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _describe(state: PyTree) -> dict[str, dict[str, Any]]:
  named = _named(state)
  sums = jax.device_get(checksums(list(named.values())))
  return {
    name: _kind(leaf) | {"checksum": int(value)}
    for (name, leaf), value in zip(named.items(), sums, strict=True)
  }


def _crc32(contents: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(contents, sort_keys=True).encode())


def _read_meta(path: epath.Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
  """The user's meta and the table of arrays, proven unchanged: a shape read wrong would accuse the config."""
  contents = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(path / "meta")
  crc32 = contents.pop("crc32")
  if crc32 != _crc32(contents):
    raise CorruptCheckpointError(f"the checksum of {path}/meta differs: {_crc32(contents)}, saved {crc32}")
  return contents["meta"], contents["arrays"]


def _verify(state: PyTree, arrays: dict[str, dict[str, Any]]) -> None:
  found = _describe(state)
  bad = [f"{n} ({found[n]['checksum']}, saved {e['checksum']})" for n, e in arrays.items() if found[n] != e]
  if bad:
    raise CorruptCheckpointError(f"the checksum differs for {', '.join(bad)}")


def _check_same_arrays(arrays: dict[str, dict[str, Any]], abstract_state: PyTree, where: str) -> None:
  saved = {name: (tuple(e["shape"]), e["dtype"]) for name, e in arrays.items()}
  wanted = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in _named(abstract_state).items()}
  differing = [
    f"  {name}: saved {saved.get(name, 'nothing')}, the config wants {wanted.get(name, 'nothing')}"
    for name in sorted(saved | wanted)
    if saved.get(name) != wanted.get(name)
  ]
  if differing:
    raise _MismatchError(
      f"The checkpoint {where} holds another state than this config makes:\n" + "\n".join(differing)
    )


def _check_shardings(abstract_state: PyTree) -> None:
  """An impossible sharding is the caller's mistake: found before it can be taken for a corrupt file."""
  for leaf in jax.tree.leaves(abstract_state):
    if leaf.sharding is not None:
      leaf.sharding.shard_shape(leaf.shape)
