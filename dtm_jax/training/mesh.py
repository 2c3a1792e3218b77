"""One mesh for everything: which axis of which array lies on which devices.

The mesh has two axes. "data" splits the batch and copies the parameters; "fsdp" splits the batch and,
array by array, the parameters and their optimiser moments too. The train step never mentions either.
"""

import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dtm_jax.arrays import Batch, PyTree
from dtm_jax.errors import OptionError

AXES = ("data", "fsdp")
TACTICS = ("replicated", "fsdp")
STACKED = r"(.*/)?blocks/.*"
MIN_SIZE = 2**12


def make_mesh(data: int = -1, fsdp: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of shape (data, fsdp) over all devices; a size of -1 takes what the other leaves.

  Devices are sorted by process: process p then holds the rows [p*b, (p+1)*b) of a batch, which is what the
  input pipeline reads there, and an fsdp group stays inside a host where it fits.

  Raises:
    OptionError: the sizes do not multiply to the number of devices.
  """
  devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
  count = len(devices)
  sizes = (data, fsdp)
  known = -data * fsdp if -1 in sizes else data * fsdp
  if known <= 0 or count % known or (-1 not in sizes and known != count):
    raise OptionError(
      f"A mesh of data={data} by fsdp={fsdp} does not fit {count} devices: the sizes must multiply to "
      f"{count}, and at most one of them may be -1 (what is left)."
    )
  shape = tuple(count // known if size == -1 else size for size in sizes)
  return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """The leading axis, or another, over all devices: both mesh axes split the batch."""
  return NamedSharding(mesh, P(*(None,) * axis, AXES))


def to_device(batch: Batch, mesh: Mesh) -> Batch:
  """The global batch, of which every process passes its own rows as numpy arrays.

  Raises:
    OptionError: the rows cannot be dealt out evenly to this process's devices.
  """
  sharding = batch_sharding(mesh)
  devices = len(sharding.addressable_devices)
  uneven = {name: array.shape for name, array in batch.items() if array.shape[0] % devices}
  if uneven:
    raise OptionError(f"The rows of a batch must divide evenly among {devices} local devices, got {uneven}.")
  return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def place(arrays: PyTree, shardings: PyTree) -> PyTree:
  """Host arrays, the same on every process, laid out as `shardings` say."""
  return jax.tree.map(
    lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]),
    arrays,
    shardings,
  )


def param_shardings(
  mesh: Mesh,
  shapes: PyTree,
  rules: Sequence[Sequence[str]],
  *,
  stacked: str = STACKED,
  min_size: int = MIN_SIZE,
) -> PyTree:
  """The sharding of every array of a parameter tree, or of a whole state with "params" and "opt_state".

  `rules` are pairs (pattern, tactic); the first pattern that matches a parameter's whole "/"-joined path
  decides. "replicated" copies; "fsdp" splits the largest axis that the fsdp size divides, except for arrays
  of fewer than `min_size` elements. Arrays whose path matches `stacked` carry the layers on axis 0, which a
  scan slices: it is split only where no other axis can be. An optimiser moment has its parameter's path at
  the end of its own, and its shape, and goes where the parameter goes; all other state (counters) is copied.

  Raises:
    OptionError: a parameter matches no rule, or a tactic is unknown.
  """
  for pattern, tactic in rules:
    if tactic not in TACTICS:
      raise OptionError(f"Unknown tactic {tactic!r} for {pattern!r}. Available: {', '.join(TACTICS)}.")
  whole_state = isinstance(shapes, Mapping) and "params" in shapes and "opt_state" in shapes
  params = {_join(path): x for path, x in _leaves(shapes["params"] if whole_state else shapes)}
  uncovered = [name for name in params if _tactic(name, rules) is None]
  if uncovered:
    raise OptionError(
      f"No sharding rule covers {', '.join(uncovered)}. The rules are {[pattern for pattern, _ in rules]}."
    )
  specs = {
    name: _fsdp_spec(x.shape, mesh.shape["fsdp"], re.fullmatch(stacked, name) is not None, min_size)
    if _tactic(name, rules) == "fsdp"
    else P()
    for name, x in params.items()
  }

  def sharding(path, x):
    owner = _owner(_join(path), params)
    follows = owner is not None and x.shape == params[owner].shape
    return NamedSharding(mesh, specs[owner] if follows else P())

  return jax.tree_util.tree_map_with_path(sharding, shapes)


def _leaves(tree: PyTree) -> list:
  return jax.tree_util.tree_leaves_with_path(tree)


def _join(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _tactic(name: str, rules: Sequence[Sequence[str]]) -> str | None:
  return next((tactic for pattern, tactic in rules if re.fullmatch(pattern, name)), None)


def _owner(name: str, params: Mapping) -> str | None:
  """The parameter whose path is the longest end of `name`."""
  parts = name.split("/")
  ends = ("/".join(parts[i:]) for i in range(len(parts)))
  return next((end for end in ends if end in params), None)


def _fsdp_spec(shape: tuple[int, ...], fsdp: int, stacked: bool, min_size: int) -> P:
  fits = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
  if fsdp == 1 or not fits or np.prod(shape) < min_size:
    return P()
  axis = max(fits, key=lambda axis: (axis > 0 or not stacked, shape[axis], axis))
  return P(*(None,) * axis, "fsdp")
