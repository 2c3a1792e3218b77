"""Compute checksums of arrays on their devices, and the table of all arrays of a state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dtm_jax.arrays import Array, PyTree, Shaped, named_leaves

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


@jax.jit
def checksums(arrays: list[Shaped[Array, "..."]]) -> list[Shaped[Array, ""]]:
  """Return one uint32 for each array: Σ_i bits_i · (2i+1) modulo 2^32. i is the place in row-major order.

  A flip of bit b in element i changes the sum by ±2^b·(2i+1). This is not a multiple of 2^32, because b < 32
  and the second factor is odd. So every single flip changes the checksum. Most other damage does too, because
  a moved element gets another weight. The order of the additions does not matter, so the checksum is the same
  on one device and on many hosts. No array is gathered.
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
  for axis in reversed(range(bits.ndim)):  # axis by axis, because a reshape would gather a sharded array
    iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place += iota * np.uint32(stride % 2**32)
    stride *= bits.shape[axis]
  return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def nest(leaves: dict[str, Any]) -> PyTree:
  """Return the nested dicts of which `named_leaves` makes this dict."""
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def describe(state: PyTree) -> dict[str, dict[str, Any]]:
  """Return shape, dtype and checksum of every array by name. All processes must call this together."""
  leaves = named_leaves(state)
  sums = jax.device_get(checksums(list(leaves.values())))
  return {
    name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "checksum": int(value)}
    for (name, leaf), value in zip(leaves.items(), sums, strict=True)
  }


def differing_checksums(state: PyTree, arrays: dict[str, dict[str, Any]]) -> str | None:
  """Return which checksums differ from the table, or None. All processes must call this together."""
  found = describe(state)
  bad = [
    f"{name} ({found[name]['checksum']}, saved {entry['checksum']})"
    for name, entry in arrays.items()
    if found[name] != entry
  ]
  return f"the checksum differs for {', '.join(bad)}" if bad else None


def differing_shapes(state: PyTree, arrays: dict[str, dict[str, Any]]) -> list[str]:
  """Return one line for every array whose shape or dtype differs between the table and the wanted state."""
  saved = {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in arrays.items()}
  wanted = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in named_leaves(state).items()}
  return [
    f"  {name}: saved {saved.get(name, 'nothing')}, the config wants {wanted.get(name, 'nothing')}"
    for name in sorted(saved | wanted)
    if saved.get(name) != wanted.get(name)
  ]
