"""From one model's parameters to another's first ones, on the host: to a classifier, segmenter, student."""

import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from dtm_jax.arrays import PyTree
from dtm_jax.models import positions

REL_POS = ("both", "own", "shared")
SEGMENTER_PARTS = ("pyramid", "decoder", "auxiliary", "norm")
"""Of a segmenter, what other models need not have."""


def to_finetune(
  params: PyTree,
  fresh: PyTree,
  *,
  grid: tuple[int, int],
  rel_pos: str = "both",
  resize: str = "geometric",
  old_grid: tuple[int, int] | None = None,
) -> PyTree:
  """A classifier's or segmenter's parameters: the trunk of `params`, the rest as in `fresh`; NumPy float32.

  The student's head and mask token are left behind, and its final LayerNorm too where the classifier pools
  the mean. A classifier may also start from another one; a head for other classes stays fresh. So do those
  parts of a segmenter that `params` has not.

  Args:
    params: of a student, a classifier or a segmenter.
    fresh: the initial parameters, which say what is wanted.
    grid: its grid of patches.
    rel_pos: which biases each block starts with: "both", the sum of its own and the shared ones, which keeps
      what the student computes; "own" or "shared" alone (the latter is the released code's default).
    resize: of the tables of relative biases, see `positions.resize_bias_table`. Position embeddings are
      resized by the plain bicubic rule.
    old_grid: of `params`, where it is not square.

  Raises:
    ValueError: an unknown option, tables that `rel_pos` asks for and `params` has not, or shapes that do not
      fit; lists all of them.
  """
  if rel_pos not in REL_POS:
    raise ValueError(f"Unknown rel_pos {rel_pos!r}. Available: {', '.join(REL_POS)}.")
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
  given = flatten_dict(resize_positions(_choose_tables(params, rel_pos), grid, old_grid, resize), sep="/")
  if "mask_token" in params:
    given = {name: leaf for name, leaf in given.items() if not name.startswith("head/")}

  if "decoder" in fresh:
    return _start_from(given, fresh, may_be_fresh=SEGMENTER_PARTS, model="segmenter")
  return _start_from(given, fresh, may_be_fresh=("norm", "fc_norm", "head"), model="classifier")


def to_student(
  params: PyTree,
  fresh: PyTree,
  *,
  grid: tuple[int, int],
  resize: str = "geometric",
  old_grid: tuple[int, int] | None = None,
) -> PyTree:
  """A student's parameters to go on from: all of `params` that it has, the rest as in `fresh`.

  Fresh may be the mask token, the head (of another width, or a classifier's) and tables of biases that
  `params` has not: a student with both kinds of table starts from a shared one with its own at zero.

  Args:
    params: of a student or of a classifier.
    fresh, grid, resize, old_grid: as in `to_finetune`.

  Raises:
    ValueError: shapes that do not fit, or tables in `params` that the student has not; lists all of them.
  """
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
  given = flatten_dict(resize_positions(params, grid, old_grid, resize), sep="/")
  if "mask_token" not in params:
    given = {name: leaf for name, leaf in given.items() if not name.startswith("head/")}
  wanted = flatten_dict(fresh, sep="/")
  if lost := [name for name in given if name.endswith("rel_pos_bias/table") and name not in wanted]:
    raise ValueError(f"The student has no place for {', '.join(lost)}: set its rel_pos_bias accordingly.")
  may_be_fresh = ("mask_token", "head", "norm", "rel_pos_bias", "blocks/attn/rel_pos_bias")
  return _start_from(given, fresh, may_be_fresh=may_be_fresh, model="student")


def _start_from(
  given: dict[str, np.ndarray], fresh: PyTree, *, may_be_fresh: tuple[str, ...], model: str
) -> PyTree:
  wanted = {name: np.asarray(leaf, np.float32) for name, leaf in flatten_dict(fresh, sep="/").items()}
  taken = {
    name: given[name] for name, leaf in wanted.items() if name in given and given[name].shape == leaf.shape
  }
  prefixes = tuple(f"{name}/" for name in may_be_fresh)
  problems = [
    f"{name}: {given[name].shape if name in given else 'nothing'}, the {model} wants {leaf.shape}"
    for name, leaf in wanted.items()
    if name not in taken and not f"{name}/".startswith(prefixes)
  ]
  if problems:
    raise ValueError(f"The parameters do not fit the {model}:\n  " + "\n  ".join(problems))
  logging.info(
    "The %s starts from %d parameters. Fresh: %s. Left behind: %s.",
    model,
    len(taken),
    ", ".join(sorted(wanted.keys() - taken.keys())) or "none",
    ", ".join(sorted(given.keys() - taken.keys())) or "none",
  )
  return unflatten_dict(wanted | taken, sep="/")


def sum_tables(params: PyTree) -> PyTree:
  """The same model with one table of relative biases for each block: its own plus the shared one.

  Biases add up before the softmax, so no output changes. Where there is no shared table nothing happens.
  """
  params = dict(params)
  shared = params.pop("rel_pos_bias", None)
  if shared is None:
    return params
  own = _own_tables(params)
  depth = params["blocks"]["ln1"]["scale"].shape[0]
  tables = np.repeat(shared["table"][None], depth, axis=0) if own is None else own + shared["table"][None]
  return _with_tables(params, tables)


def _choose_tables(params: PyTree, rel_pos: str) -> PyTree:
  """The parameters without a shared table."""
  if rel_pos == "both":
    return sum_tables(params)
  missing = {"own": _own_tables(params) is None, "shared": "rel_pos_bias" not in params}[rel_pos]
  if missing:
    raise ValueError(f"rel_pos={rel_pos!r}: the parameters have no such table of relative position biases.")
  own_only = {name: part for name, part in params.items() if name != "rel_pos_bias"}
  if rel_pos == "own":
    return own_only
  attention = {name: part for name, part in params["blocks"]["attn"].items() if name != "rel_pos_bias"}
  return sum_tables(params | {"blocks": params["blocks"] | {"attn": attention}})


def resize_positions(
  params: PyTree, grid: tuple[int, int], old_grid: tuple[int, int] | None = None, method: str = "geometric"
) -> PyTree:
  """Return the parameters with absolute and relative positions of another grid of patches.

  Args:
    params: of a student or classifier.
    old_grid: of `params`, where it is not square.
    method: of the tables of relative biases, see `positions.resize_bias_table`. Position embeddings are
      resized by the plain bicubic rule.
  """

  def resized(table: np.ndarray) -> np.ndarray:
    old = old_grid or positions.square_grid(table_rows=table.shape[-2])
    return positions.resize_bias_table(table, old, grid, method=method)

  if (tables := _own_tables(params)) is not None:
    params = _with_tables(params, resized(tables))
  if "rel_pos_bias" in params:
    params = params | {"rel_pos_bias": {"table": resized(params["rel_pos_bias"]["table"])}}
  if "pos_embed" in params:
    table = positions.resize_positions(jax.numpy.asarray(params["pos_embed"]), grid, slack=0.0)
    params = params | {"pos_embed": np.asarray(table)}
  return params


def _own_tables(params: PyTree) -> np.ndarray | None:
  return params["blocks"]["attn"].get("rel_pos_bias", {}).get("table")


def _with_tables(params: PyTree, tables: np.ndarray) -> PyTree:
  attention = params["blocks"]["attn"] | {"rel_pos_bias": {"table": tables}}
  return params | {"blocks": params["blocks"] | {"attn": attention}}
