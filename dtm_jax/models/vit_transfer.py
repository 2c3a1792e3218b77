"""From a pre-trained student's parameters to a classifier's, on the host."""

import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from dtm_jax.arrays import PyTree
from dtm_jax.models import positions

REL_POS = ("both", "own", "shared")
FRESH = ("norm", "fc_norm", "head")
"""What may start from its initial values."""


def to_finetune(
  params: PyTree,
  fresh: PyTree,
  *,
  grid: tuple[int, int],
  rel_pos: str = "both",
  resize: str = "geometric",
  old_grid: tuple[int, int] | None = None,
) -> PyTree:
  """The classifier's parameters: the trunk of `params`, the rest as in `fresh`; NumPy float32.

  The student's head and mask token are left behind, and its final LayerNorm too where the classifier pools
  the mean. A classifier may also start from another one; a head for other classes stays fresh.

  Args:
    params: of a student or of a classifier.
    fresh: the classifier's initial parameters, which say what it wants.
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
  student = "mask_token" in params
  given = flatten_dict(_resize(_choose_tables(params, rel_pos), grid, old_grid, resize), sep="/")
  if student:
    given = {name: leaf for name, leaf in given.items() if not name.startswith("head/")}

  wanted = {name: np.asarray(leaf, np.float32) for name, leaf in flatten_dict(fresh, sep="/").items()}
  taken = {
    name: given[name] for name, leaf in wanted.items() if name in given and given[name].shape == leaf.shape
  }
  problems = [
    f"{name}: {given[name].shape if name in given else 'nothing'}, the classifier wants {leaf.shape}"
    for name, leaf in wanted.items()
    if name not in taken and name.split("/")[0] not in FRESH
  ]
  if problems:
    raise ValueError("The parameters do not fit the classifier:\n  " + "\n  ".join(problems))
  logging.info(
    "Fine-tuning starts from %d pre-trained parameters. Fresh: %s. Left behind: %s.",
    len(taken),
    ", ".join(sorted(wanted.keys() - taken.keys())) or "none",
    ", ".join(sorted(set(flatten_dict(params, sep="/")) - taken.keys())) or "none",
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


def _resize(params: PyTree, grid: tuple[int, int], old_grid: tuple[int, int] | None, method: str) -> PyTree:
  tables = _own_tables(params)
  if tables is not None:
    old = old_grid or positions.square_grid(table_rows=tables.shape[-2])
    params = _with_tables(params, positions.resize_bias_table(tables, old, grid, method=method))
  if "pos_embed" in params:
    resized = positions.resize_positions(jax.numpy.asarray(params["pos_embed"]), grid, slack=0.0)
    params = params | {"pos_embed": np.asarray(resized)}
  return params


def _own_tables(params: PyTree) -> np.ndarray | None:
  return params["blocks"]["attn"].get("rel_pos_bias", {}).get("table")


def _with_tables(params: PyTree, tables: np.ndarray) -> PyTree:
  attention = params["blocks"]["attn"] | {"rel_pos_bias": {"table": tables}}
  return params | {"blocks": params["blocks"] | {"attn": attention}}
