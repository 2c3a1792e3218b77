"""Parameters under other people's names: one table of rules a model, strict in both directions.

A rule says which of their tensors is one of our parameters, and how its axes lie. Ours are stacked [L, ...]
under `nn.scan` where theirs are numbered: there the name has a `{layer}`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from dtm_jax.arrays import PyTree
from dtm_jax.models.files.file_checks import UnreadableFileError


class Layout(NamedTuple):
  """How a tensor of theirs becomes one of ours, and back."""

  to_ours: Callable
  to_theirs: Callable


SAME = Layout(lambda tensor: tensor, lambda tensor: tensor)
TRANSPOSED = Layout(lambda weight: weight.T, lambda kernel: kernel.T)
CONVOLUTION = Layout(
  lambda weight: rearrange(weight, "d rgb y x -> (y x rgb) d"),
  lambda kernel: rearrange(kernel, "(y x rgb) d -> d rgb y x", rgb=3, y=math.isqrt(kernel.shape[0] // 3)),
)


Rules = dict[str, tuple[str, Layout]]
"""Our path, "a/b/kernel", -> their name and the layout of its tensor."""

LINEAR: Rules = {"kernel": ("weight", TRANSPOSED), "bias": ("bias", SAME)}
NORM: Rules = {"scale": ("weight", SAME), "bias": ("bias", SAME)}


def layers(ours: str, theirs: str, members: dict[str, tuple[str, Rules]]) -> Rules:
  """The rules of several layers below the paths `ours` and `theirs`: {our name: (their name, its leaves)}."""
  return {
    f"{ours}/{layer}/{leaf}": (f"{theirs}.{name}.{their_leaf}", layout)
    for layer, (name, leaves) in members.items()
    for leaf, (their_leaf, layout) in leaves.items()
  }


def to_ours(tensors: dict[str, np.ndarray], expected: PyTree, rules: Rules, *, source: str) -> PyTree:
  """Return our parameters, NumPy float32, of the shapes in `expected`, from their named tensors.

  Floating-point tensors of any width become float32.

  Raises:
    UnreadableFileError: lists every missing, unexpected and mis-shaped name, or every tensor whose values are
      integers, NaN, infinite or too large for float32; `source` says of what.
  """
  theirs = jax.eval_shape(lambda params: to_theirs(params, rules), _checked_depth(expected, source))
  problems = [f"missing: {name} {tensor.shape}" for name, tensor in theirs.items() if name not in tensors]
  problems += [f"unexpected: {name} {tensor.shape}" for name, tensor in tensors.items() if name not in theirs]
  problems += [
    f"shape of {name}: {tensors[name].shape}, expected {tensor.shape}"
    for name, tensor in theirs.items()
    if name in tensors and tensors[name].shape != tensor.shape
  ]
  if problems:
    raise UnreadableFileError(f"{source} does not match its configuration:\n  " + "\n  ".join(problems))
  tensors = _float32({name: tensors[name] for name in theirs}, source)

  def ours_of(path, shape):
    name, layout = rules[path]
    if "{layer}" not in name:
      return layout.to_ours(tensors[name])
    return np.stack([layout.to_ours(tensors[name.format(layer=layer)]) for layer in range(shape[0])])

  flat = {path: ours_of(path, leaf.shape) for path, leaf in flatten_dict(expected, sep="/").items()}
  return unflatten_dict(flat, sep="/")


def _float32(tensors: dict[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
  """The tensors as float32, all of them finite."""
  problems, converted = [], {}
  for name, tensor in tensors.items():
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
      problems.append(f"{name} has the type {tensor.dtype}; weights are floating-point numbers")
      continue
    with np.errstate(over="ignore"):  # what overflows is reported below
      values = np.asarray(tensor, np.float32)
    if not np.isfinite(values.sum(dtype=np.float64)):
      wrong = int(np.size(values) - np.isfinite(values).sum())
      problems.append(f"{name} has {wrong} of {values.size} values that are NaN or infinite as float32")
    converted[name] = values
  if problems:
    rest = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise UnreadableFileError(f"{source} has bad values:\n  " + "\n  ".join(problems[:_SHOWN]) + rest)
  return converted


def _checked_depth(expected: PyTree, source: str) -> PyTree:
  towers = [
    tower for tower in (expected, *expected.values()) if isinstance(tower, dict) and "blocks" in tower
  ]
  deepest = max(leaf.shape[0] for tower in towers for leaf in jax.tree.leaves(tower["blocks"]))
  if deepest > _DEEPEST:
    raise UnreadableFileError(
      f"{source}: its configuration asks for {deepest} layers; at most {_DEEPEST} are read."
    )
  return expected


_SHOWN, _DEEPEST = 10, 1000


def to_theirs(params: PyTree, rules: Rules) -> dict[str, Any]:
  """Their named tensors from our parameters; the inverse of `to_ours`."""
  tensors = {}
  for path, leaf in flatten_dict(params, sep="/").items():
    name, layout = rules[path]
    if "{layer}" in name:
      tensors |= {name.format(layer=i): layout.to_theirs(leaf[i]) for i in range(leaf.shape[0])}
    else:
      tensors[name] = layout.to_theirs(leaf)
  return tensors
