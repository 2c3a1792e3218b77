"""Find the numbers of a train step that are not finite, by module, parameter and layer.

    with Watch() as watch:
      state, measurements = jax.jit(train_step)(...)  # must be traced here, so use a jit that has not run yet
    watch.first_module()

The watch needs no change to the step. It intercepts modules while the step is traced, and callbacks report
from the device. It works under `jit`, `grad`, `nn.scan`, `nn.remat` and any sharding.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dtm_jax.arrays import Array, Bool, PyTree, named_leaves

_STACKED = "blocks"  # the name of modules that a scan stacks; axis 0 of their arrays is the layer


@dataclass(frozen=True)
class Place:
  """A module or an array, and its layer if layers are stacked.

  Attributes:
    name: the "/"-joined path. A module's path starts with the class of its network.
    layer: counted from 0. It is None outside stacked layers.
    input_finite: whether the input of the module was finite. It is None for an array.
  """

  name: str
  layer: int | None = None
  input_finite: bool | None = None

  def __str__(self) -> str:
    return self.name if self.layer is None else f"{self.name}, layer {self.layer}"


class Watch:
  """A context. Steps that are traced inside it report on their modules and gradients."""

  def __init__(self):
    self._modules: dict[tuple[str, ...], list[tuple[bool, bool]]] = {}
    self._gradients: list[Mapping[str, np.ndarray]] = []
    self._networks: list[str] = []  # classes of the networks called so far
    self._depth = 0

  def __enter__(self) -> "Watch":
    global _active
    self._interception = nn.intercept_methods(self._intercept)
    self._interception.__enter__()
    _active = self
    return self

  def __exit__(self, *exception) -> None:
    global _active
    _active = None
    self._interception.__exit__(*exception)
    jax.effects_barrier()

  def clear(self) -> None:
    """Forget all reports. Call it before each further step."""
    jax.effects_barrier()
    for reports in self._modules.values():
      reports.clear()
    self._gradients.clear()

  def first_module(self) -> Place | None:
    """Return the first module, in the order of the forward pass, with an output that is not finite."""
    jax.effects_barrier()
    order = {place: number for number, place in enumerate(self._modules)}
    start: dict[tuple[str, ...], int] = {}  # when a whole stack starts, as its layers follow each other
    for place, number in order.items():
      start.setdefault(_stack(place), number)
    bad = []
    for place, reports in self._modules.items():
      # The forward pass reports first. Remat computes parts of it again later.
      index = next((i for i, (_, output) in enumerate(reports) if not output), None)
      if index is not None:
        layer = index if _STACKED in place else None
        bad.append((start[_stack(place)], layer or 0, order[place], layer, place, reports[index][0]))
    if not bad:
      return None
    *_, layer, place, input_finite = min(bad)
    return Place("/".join(place), layer, input_finite)

  def gradients(self) -> list[Place]:
    """Return the parameters with a gradient that is not finite, in the order of the backward pass."""
    jax.effects_barrier()
    found = [place for flags in self._gradients for place in _places(flags)]
    return sorted(found, key=self._forward_order, reverse=True)

  def _forward_order(self, parameter: Place) -> tuple[int, int, int]:
    """Return a key that sorts parameters by the time at which their module runs.

    The parameters of the network itself belong to its start.
    """
    path = tuple(parameter.name.split("/")[:-1])
    order = {place[1:]: number for number, place in enumerate(self._modules) if place[1:]}
    number = order.get(path, -1)
    in_stack = [n for place, n in order.items() if _STACKED in path and _STACKED in place]
    return (min(in_stack, default=number), parameter.layer or 0, number)

  def _intercept(self, call, args, kwargs, context):
    root = self._depth == 0
    if root:
      self._networks.append(type(context.module).__name__)
    self._depth += 1
    try:
      output = call(*args, **kwargs)
    finally:
      self._depth -= 1
    if root or context.method_name == "__call__":
      same = self._networks.count(self._networks[-1])
      network = self._networks[-1] if same == 1 else f"{self._networks[-1]}#{same}"
      place = (network, *context.module.path)
      self._modules.setdefault(place, [])
      report = lambda entered, left: self._modules[place].append((bool(entered), bool(left)))
      jax.debug.callback(report, _all_finite((args, kwargs)), _all_finite(output))
    return output


_active: Watch | None = None


def watch_gradients(grads: PyTree) -> PyTree:
  """Return the gradients unchanged. A `Watch` that is entered learns which of them are not finite."""
  if _active is not None:
    jax.debug.callback(_active._gradients.append, finite_by_layer(grads))
  return grads


def finite_by_layer(tree: PyTree) -> dict[str, Bool[Array, "*L"]]:
  """Return whether each floating-point array is finite, by path. Stacked arrays [L, ...] have L answers."""
  return {
    name: jnp.isfinite(x).all(axis=tuple(range(int(_is_stacked(name, x)), x.ndim)))
    for name, x in named_leaves(tree).items()
    if jnp.issubdtype(x.dtype, jnp.floating)
  }


def nonfinite(tree: PyTree, *, but: str | None = None) -> list[Place]:
  """Return the arrays that are not finite, except those with a path that the pattern `but` matches whole.

  One reduction on the devices finds them, even if the arrays are sharded over processes.
  """
  places = _places(jax.device_get(_jitted_finite_by_layer(tree)))
  return [place for place in places if but is None or not re.fullmatch(but, place.name)]


@jax.jit
def _jitted_finite_by_layer(tree: PyTree) -> dict[str, Array]:
  return finite_by_layer(tree)


def _places(flags: Mapping[str, Any]) -> list[Place]:
  places = []
  for name, flag in flags.items():
    if np.ndim(flag):
      places += [Place(name, int(layer)) for layer in np.flatnonzero(~np.asarray(flag))]
    elif not flag:
      places.append(Place(name))
  return places


def _stack(place: tuple[str, ...]) -> tuple[str, ...]:
  """Return the stack that contains the module, or the module itself."""
  return place[: place.index(_STACKED) + 1] if _STACKED in place else (*place, "")


def _is_stacked(name: str, array: Array) -> bool:
  return _STACKED in name.split("/")[:-1] and array.ndim > 0


def _all_finite(tree: PyTree) -> Array | bool:
  arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array | np.ndarray)]
  finite = [jnp.isfinite(x).all() for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
  result: Array | bool = True
  for each in finite:
    result = jnp.logical_and(result, each)
  return result
