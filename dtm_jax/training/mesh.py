"""Decide which axis of which array lies on which devices, on one mesh for everything.

The mesh has two axes. "data" splits the batch and copies the parameters. "fsdp" splits the batch, and also
the parameters and their optimiser moments, array by array. The train step mentions neither.

Several TPU slices can train together. The network between slices is slower than the links inside a slice, so
"data" goes across slices and each "fsdp" group stays inside one.
"""

import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dtm_jax.arrays import Batch, PyTree, named_leaves, path_name
from dtm_jax.errors import OptionError

AXES = ("data", "fsdp")
TACTICS = ("replicated", "fsdp")
STACKED = r"(.*/)?blocks/.*"
MIN_SIZE = 2**12


def make_mesh(data: int = -1, fsdp: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Return a mesh of shape (data, fsdp) over all devices. A size of -1 takes the devices that remain.

  The devices are sorted by process. So process p holds the rows [p*b, (p+1)*b) of a batch, which its input
  pipeline reads, and an fsdp group stays inside one host if it fits.

  Raises:
    OptionError: the sizes do not multiply to the number of devices, or an fsdp group would cross TPU slices.
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
  grid = np.asarray(devices).reshape(shape)
  _check_slices(grid)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_of(device: jax.Device) -> int:
  """Return the TPU slice of a device. Other kinds of devices all count as one slice."""
  return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def _check_slices(grid: np.ndarray) -> None:
  """Raise an OptionError if an fsdp group, a row of the grid, has devices of several TPU slices."""
  slices = np.vectorize(slice_of, otypes=[int])(grid)
  if (slices == slices[:, :1]).all():
    return
  smallest = min(np.unique(slices, return_counts=True)[1])
  raise OptionError(
    f"mesh.fsdp={grid.shape[1]} would split the parameters across {len(np.unique(slices))} TPU slices of "
    f"{smallest} devices, over the slow network between them. Each fsdp group has to stay inside a slice: "
    f"choose --config.mesh.fsdp from the divisors of {smallest}, and --config.mesh.data=-1."
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Return the sharding with a copy on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Return the sharding that splits one axis, by default the leading one, over all devices."""
  return NamedSharding(mesh, P(*(None,) * axis, AXES))


def to_device(batch: Batch, mesh: Mesh, axis: int = 0) -> Batch:
  """Return the global batch on the devices. Every process passes its own rows, on this axis of NumPy arrays.

  Raises:
    OptionError: the rows do not divide evenly among the devices of this process.
  """
  sharding = batch_sharding(mesh, axis)
  devices = len(sharding.addressable_devices)
  uneven = {name: array.shape for name, array in batch.items() if array.shape[axis] % devices}
  if uneven:
    raise OptionError(f"The rows of a batch must divide evenly among {devices} local devices, got {uneven}.")
  return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def place(arrays: PyTree, shardings: PyTree) -> PyTree:
  """Return host arrays, which are the same on every process, laid out by `shardings`."""
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
  """Return the sharding of every array of a parameter tree, or of a state with "params" and "opt_state".

  An optimiser moment has the shape of its parameter, and the parameter's path is the end of its path. It gets
  the sharding of the parameter. All other state, such as counters, is copied.

  Args:
    rules: pairs (pattern, tactic). The first pattern that matches the whole "/"-joined path of a parameter
      decides. "replicated" copies. "fsdp" splits the largest axis that the fsdp size divides.
    stacked: a pattern. A parameter with a matching path has the layers on axis 0. A scan slices this axis, so
      it is split only if no other axis can be.
    min_size: smaller arrays, counted in elements, are copied.

  Raises:
    OptionError: a parameter matches no rule, or a tactic is unknown.
  """
  for pattern, tactic in rules:
    if tactic not in TACTICS:
      raise OptionError(f"Unknown tactic {tactic!r} for {pattern!r}. Available: {', '.join(TACTICS)}.")
  whole_state = isinstance(shapes, Mapping) and "params" in shapes and "opt_state" in shapes
  params = named_leaves(shapes["params"] if whole_state else shapes)
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
    owner = _owner(path_name(path), params)
    if owner is None or x.shape != params[owner].shape:
      return replicated(mesh)
    return NamedSharding(mesh, specs[owner])

  return jax.tree_util.tree_map_with_path(sharding, shapes)


def _tactic(name: str, rules: Sequence[Sequence[str]]) -> str | None:
  return next((tactic for pattern, tactic in rules if re.fullmatch(pattern, name)), None)


def _owner(name: str, params: Mapping) -> str | None:
  """Return the parameter with the longest path that `name` ends with."""
  parts = name.split("/")
  ends = ("/".join(parts[i:]) for i in range(len(parts)))
  return next((end for end in ends if end in params), None)


def _fsdp_spec(shape: tuple[int, ...], fsdp: int, stacked: bool, min_size: int) -> P:
  fits = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
  if fsdp == 1 or not fits or np.prod(shape) < min_size:
    return P()
  axis = max(fits, key=lambda axis: (axis > 0 or not stacked, shape[axis], axis))
  return P(*(None,) * axis, "fsdp")
