"""Convert parameters from and to the tensor names of other libraries, by a table of rules for each model.

A rule gives the name of the tensor that holds a parameter, and the layout of its axes. Our parameters of all
layers are stacked [L, ...], because the blocks run under `nn.scan`. Other libraries number the layers, so
their names contain `{layer}`. "ours" and "theirs" are the two sides here.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from dtm_jax.arrays import PyTree
from dtm_jax.models.files.file_checks import UnreadableFileError

_MAX_SHOWN, _MAX_DEPTH = 10, 1000


class Layout(NamedTuple):
  """The change of axes between a tensor of another library and a parameter of this project."""

  to_ours: Callable
  to_theirs: Callable


SAME = Layout(lambda tensor: tensor, lambda tensor: tensor)
TRANSPOSED = Layout(lambda weight: weight.T, lambda kernel: kernel.T)
CONVOLUTION = Layout(
  lambda weight: rearrange(weight, "d rgb y x -> (y x rgb) d"),
  lambda kernel: rearrange(kernel, "(y x rgb) d -> d rgb y x", rgb=3, y=math.isqrt(kernel.shape[0] // 3)),
)


Rules = dict[str, tuple[str, Layout]]
"""From our path, such as "a/b/kernel", to their name and the layout of the tensor."""

LINEAR: Rules = {"kernel": ("weight", TRANSPOSED), "bias": ("bias", SAME)}
NORM: Rules = {"scale": ("weight", SAME), "bias": ("bias", SAME)}


def layers(ours: str, theirs: str, members: dict[str, tuple[str, Rules]]) -> Rules:
  """Return the rules of layers below `ours` and `theirs`; members map our name to their name and leaves."""
  return {
    f"{ours}/{layer}/{leaf}": (f"{theirs}.{name}.{their_leaf}", layout)
    for layer, (name, leaves) in members.items()
    for leaf, (their_leaf, layout) in leaves.items()
  }


def to_ours(tensors: dict[str, np.ndarray], expected: PyTree, rules: Rules, *, source: str) -> PyTree:
  """Return our parameters, NumPy float32, from their named tensors of any floating-point type.

  Args:
    expected: the shapes of our parameters.
    source: the file of the tensors, for messages.

  Raises:
    UnreadableFileError: names are missing or unexpected, or shapes differ; or values are integers, NaN,
      infinite or too large for float32. The message lists all of them.
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

  def parameter(path: str, shape: tuple[int, ...]) -> np.ndarray:
    name, layout = rules[path]
    if "{layer}" not in name:
      return layout.to_ours(tensors[name])
    return np.stack([layout.to_ours(tensors[name.format(layer=layer)]) for layer in range(shape[0])])

  flat = {path: parameter(path, leaf.shape) for path, leaf in flatten_dict(expected, sep="/").items()}
  return unflatten_dict(flat, sep="/")


def to_theirs(params: PyTree, rules: Rules) -> dict[str, Any]:
  """Return their named tensors from our parameters; the inverse of `to_ours`."""
  tensors: dict[str, Any] = {}
  for path, leaf in flatten_dict(params, sep="/").items():
    name, layout = rules[path]
    if "{layer}" in name:
      tensors |= {name.format(layer=i): layout.to_theirs(leaf[i]) for i in range(leaf.shape[0])}
    else:
      tensors[name] = layout.to_theirs(leaf)
  return tensors


def check_ranks(
  shapes: dict[str, tuple[int, ...]], ranks: dict[str, int], *, source: str, hint: str = ""
) -> None:
  """Check that the tensors that give the sizes of a model exist and have these ranks.

  Raises:
    UnreadableFileError: lists those that are missing or have another rank.
  """
  wrong = [
    f"{name} {shapes.get(name, '')}" for name, rank in ranks.items() if len(shapes.get(name, ())) != rank
  ]
  if wrong:
    raise UnreadableFileError(
      f"{source} does not give its sizes. Missing or of a wrong rank: {', '.join(wrong)}.{hint}"
    )


def without_unused(
  tensors: dict[str, np.ndarray], prefixes: tuple[str, ...], source: str
) -> dict[str, np.ndarray]:
  """Return the tensors without those whose names start with one of the prefixes. Log what is left out."""
  unused = sorted(name for name in tensors if name.startswith(prefixes))
  if unused:
    logging.info("Not used of %s: %s.", source, ", ".join(unused))
  return {name: tensor for name, tensor in tensors.items() if name not in unused}


def with_attention(params: PyTree, change: Callable[[PyTree], PyTree]) -> PyTree:
  """Return the parameters of a tower with `change` applied to those of its attention."""
  blocks = params["blocks"]
  return params | {"blocks": blocks | {"attn": change(blocks["attn"])}}


def fuse_qkv(params: PyTree) -> PyTree:
  """Return a tower's parameters with query, key and value of its attention joined to one linear map "qkv"."""

  def fuse(attention: PyTree) -> PyTree:
    maps = [attention[name] for name in ("query", "key", "value")]
    join = np.concatenate if isinstance(maps[0]["kernel"], np.ndarray) else jnp.concatenate
    fused = {leaf: join([linear[leaf] for linear in maps], axis=-1) for leaf in ("kernel", "bias")}
    return {"out": attention["out"], "qkv": fused}

  return with_attention(params, fuse)


def split_qkv(params: PyTree) -> PyTree:
  """Return the inverse of `fuse_qkv` for NumPy arrays."""

  def split(attention: PyTree) -> PyTree:
    parts = {leaf: np.split(tensor, 3, axis=-1) for leaf, tensor in attention["qkv"].items()}
    maps = {
      name: {leaf: parts[leaf][i] for leaf in parts} for i, name in enumerate(("query", "key", "value"))
    }
    return {"out": attention["out"]} | maps

  return with_attention(params, split)


def _float32(tensors: dict[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
  """Return the tensors as float32 after a check that all values are finite."""
  problems, converted = [], {}
  for name, tensor in tensors.items():
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
      problems.append(f"{name} has the type {tensor.dtype}, but weights must be floating-point numbers")
      continue
    with np.errstate(over="ignore"):  # what overflows is reported below
      values = np.asarray(tensor, np.float32)
    if not np.isfinite(values.sum(dtype=np.float64)):
      wrong = int(np.size(values) - np.isfinite(values).sum())
      problems.append(f"{name} has {wrong} of {values.size} values that are NaN or infinite as float32")
    converted[name] = values
  if problems:
    rest = f"\n  and {len(problems) - _MAX_SHOWN} more" if len(problems) > _MAX_SHOWN else ""
    raise UnreadableFileError(f"{source} has bad values:\n  " + "\n  ".join(problems[:_MAX_SHOWN]) + rest)
  return converted


def _checked_depth(expected: PyTree, source: str) -> PyTree:
  """Return `expected` if its depth is plausible, because an absurd depth would exhaust the memory."""
  towers = [
    tower for tower in (expected, *expected.values()) if isinstance(tower, dict) and "blocks" in tower
  ]
  deepest = max(leaf.shape[0] for tower in towers for leaf in jax.tree.leaves(tower["blocks"]))
  if deepest > _MAX_DEPTH:
    raise UnreadableFileError(
      f"{source}: its configuration has {deepest} layers, but at most {_MAX_DEPTH} are supported."
    )
  return expected
