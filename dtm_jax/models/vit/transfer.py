"""Make the initial parameters of a classifier, a segmenter or a student from another model's, on the host."""

import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from dtm_jax.arrays import PyTree
from dtm_jax.errors import check_choice
from dtm_jax.models import positions
from dtm_jax.models.files.weight_names import with_attention

REL_POS = ("both", "own", "shared")
SEGMENTER_PARTS = ("pyramid", "decoder", "auxiliary", "norm")
"""The parts of a segmenter that may be missing in another model."""


def to_finetune(
  params: PyTree,
  fresh: PyTree,
  *,
  grid: tuple[int, int],
  rel_pos: str = "both",
  resize: str = "geometric",
  old_grid: tuple[int, int] | None = None,
) -> PyTree:
  """Return a classifier's or segmenter's parameters (NumPy float32): trunk of `params`, rest of `fresh`.

  Drops the student's head and mask token, and its final LayerNorm if the classifier pools the mean. A
  classifier may also start from another classifier; a head for other classes is taken from `fresh`. So are
  the parts of a segmenter that `params` lacks.

  Args:
    params: parameters of a student, a classifier or a segmenter.
    fresh: initial parameters of the wanted model.
    grid: (rows, columns) of patches of the wanted model.
    rel_pos: the initial relative position biases of each block. "both" is the sum of the block's own
      table and the shared one, which keeps the student's outputs. "own" and "shared" use one of the two
      tables. "shared" is the default of the paper's released code (docs/method.md).
    resize: method for the tables of relative position biases, see `positions.resize_bias_table`. Position
      embeddings are always resized bicubically.
    old_grid: grid of `params`, if it is not square.

  Raises:
    OptionError: an option is unknown.
    ValueError: `params` lacks the tables that `rel_pos` needs, or shapes do not fit; the message lists them.
  """
  check_choice("rel_pos", rel_pos, REL_POS)
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
  """Return parameters with which a student continues: all of `params` that fit, the rest of `fresh`.

  The mask token, the head and tables of relative position biases may come from `fresh`. For example, a
  student with both kinds of table starts from a shared table, with its own tables at zero.

  Args:
    params: parameters of a student or a classifier.
    fresh, grid, resize, old_grid: as in `to_finetune`.

  Raises:
    ValueError: shapes do not fit, or the student lacks tables that `params` has; the message lists them.
  """
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
  given = flatten_dict(resize_positions(params, grid, old_grid, resize), sep="/")
  if "mask_token" not in params:
    given = {name: leaf for name, leaf in given.items() if not name.startswith("head/")}
  wanted = flatten_dict(fresh, sep="/")
  if lost := [name for name in given if name.endswith("rel_pos_bias/table") and name not in wanted]:
    raise ValueError(
      f"The student has no place for {', '.join(lost)}: set its rel_pos_bias or shared_rel_pos_bias to True."
    )
  may_be_fresh = ("mask_token", "head", "norm", "rel_pos_bias", "blocks/attn/rel_pos_bias")
  return _start_from(given, fresh, may_be_fresh=may_be_fresh, model="student")


def _start_from(
  given: dict[str, np.ndarray], fresh: PyTree, *, may_be_fresh: tuple[str, ...], model: str
) -> PyTree:
  """Return the parameters of `given` where they fit, and those of `fresh` where they may be missing."""
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
    "The %s starts from %d loaded parameters. Initialised: %s. Not used: %s.",
    model,
    len(taken),
    ", ".join(sorted(wanted.keys() - taken.keys())) or "none",
    ", ".join(sorted(given.keys() - taken.keys())) or "none",
  )
  return unflatten_dict(wanted | taken, sep="/")


def sum_tables(params: PyTree) -> PyTree:
  """Return the same model with one table of relative position biases for each block: its own plus the shared.

  No output changes, because the biases add up before the softmax. Without a shared table, nothing changes.
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
  """Return the parameters without a shared table, as `rel_pos` says."""
  if rel_pos == "both":
    return sum_tables(params)
  missing = {"own": _own_tables(params) is None, "shared": "rel_pos_bias" not in params}[rel_pos]
  if missing:
    raise ValueError(f"rel_pos={rel_pos!r}: the parameters have no such table of relative position biases.")
  without_table = lambda part: {name: leaf for name, leaf in part.items() if name != "rel_pos_bias"}
  if rel_pos == "own":
    return without_table(params)
  return sum_tables(with_attention(params, without_table))


def resize_positions(
  params: PyTree, grid: tuple[int, int], old_grid: tuple[int, int] | None = None, method: str = "geometric"
) -> PyTree:
  """Return the parameters with absolute and relative positions resized to another grid of patches.

  Args:
    params: parameters of a student, a classifier or a segmenter.
    grid: (rows, columns) of patches.
    old_grid: grid of `params`, if it is not square.
    method: method for the tables of relative position biases, see `positions.resize_bias_table`. Position
      embeddings are always resized bicubically.

  Raises:
    ValueError: the old grid is neither given nor square.
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
  return with_attention(params, lambda attention: attention | {"rel_pos_bias": {"table": tables}})
