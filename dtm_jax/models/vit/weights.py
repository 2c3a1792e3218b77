"""Load a student or a classifier from the files of other libraries, and save it for them.

    params = load(folder)                               # the authors', BEiT's, timm's or transformers' names
    save(folder, params, "timm")                        # timm.create_model("local-dir:...", pretrained=True)

`vit.layouts` describes the names. timm has one table of relative position biases for each block, so the
shared table is added to each of them, which changes no output. The log names every parameter that the other
library has no place for.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from dtm_jax.arrays import PyTree
from dtm_jax.errors import NotThereError, OptionError, check_choice
from dtm_jax.models.files import weight_files, weight_formats, weight_names
from dtm_jax.models.files.file_checks import blaming
from dtm_jax.models.files.weight_files import CONFIG, PREPROCESSOR, Found
from dtm_jax.models.vit import config as vit_config
from dtm_jax.models.vit.classifier import Classifier
from dtm_jax.models.vit.config import Grid
from dtm_jax.models.vit.layouts import (
  TRANSFORMERS_CLASSIFIER,
  TRANSFORMERS_STUDENT,
  authors_rules,
  fuse_qkv,
  is_student,
  split_qkv,
)
from dtm_jax.models.vit.transfer import sum_tables
from dtm_jax.normalizations import NORMALIZATIONS, Triple


def load(
  path_or_repo: str | Path | Found,
  *,
  revision: str | None = None,
  num_heads: int | None = None,
  grid: Grid | None = None,
  weights: str | None = None,
) -> PyTree:
  """Return the parameters (NumPy float32) of a student or classifier in a file, folder or repository.

  Args:
    path_or_repo: a file, a folder, a repository of the hub, or the result of `weight_files.find`.
    revision: branch, tag or commit of the repository.
    num_heads, grid: needed only if neither the tensors nor config.json give them (see `vit.config.describe`).
    weights: the container of the model, if the file holds several models (see `checkpoint_contents`).

  Raises:
    NotThereError: a file is missing.
    OptionError: the number of heads is unknown, or the file holds several models.
    UnreadableFileError: names or shapes do not match; the message lists all of them.
  """
  found = weight_files.find(path_or_repo, revision=revision, weights=weights)
  tensors, source = weight_files.read(found), str(found.file)
  content = found.json(CONFIG)
  if any(name.endswith("embeddings.cls_token") for name in tensors):
    if not content:
      raise NotThereError(f"No {CONFIG} beside {source}, which the tensor names of transformers need.")
    return from_transformers(tensors, content, source=source)
  with blaming(found.folder / CONFIG):  # ours, or timm's
    configured = content.get("num_heads") or content.get("model_args", {}).get("num_heads")
  return from_authors(tensors, source=source, num_heads=num_heads or configured, grid=grid)


def save(
  folder: str | Path,
  params: PyTree,
  layout: str,
  *,
  num_heads: int | None = None,
  grid: Grid | None = None,
  mean: Triple = NORMALIZATIONS["imagenet"][0],
  std: Triple = NORMALIZATIONS["imagenet"][1],
  class_names: Sequence[str] | None = None,
) -> None:
  """Write model.safetensors and config.json, and preprocessor_config.json for "transformers".

  Args:
    params: parameters of a student or a classifier.
    layout: one of LAYOUTS.
    num_heads, grid: needed only if the parameters do not give them (see `vit.config.describe`).
    mean, std: normalisation of RGB values in [0, 1] in training.
    class_names: names of a classifier's classes in the order of the labels. Ignored for a student.

  Raises:
    OptionError: the layout is unknown, the parameters do not give heads or grid, or the number of names is
      not the number of classes.
  """
  check_choice("layout", layout, LAYOUTS)
  params = jax.device_get(params)
  shapes = {name: tensor.shape for name, tensor in to_authors(params).items()}
  model, grid = vit_config.describe(shapes, num_heads=num_heads, grid=grid)
  if grid is None:
    raise OptionError("The parameters have no positions, so the grid of patches is unknown: give the grid.")
  image_size = grid[0] * model.patch_size, grid[1] * model.patch_size
  config = {
    "authors": lambda: vit_config.to_authors(model, image_size, mean, std),
    "timm": lambda: vit_config.to_timm(model, image_size, mean, std),
    "transformers": lambda: vit_config.to_transformers(model, image_size),
  }[layout]()
  if class_names is not None and isinstance(model, Classifier):
    config |= vit_config.class_labels(layout, class_names, model.num_classes)
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  weight_formats.write_safetensors(folder / "model.safetensors", LAYOUTS[layout](params))
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
  if layout == "transformers":
    height, width = image_size
    preprocessor = {
      "image_processor_type": "BeitImageProcessor", "size": {"height": height, "width": width}, "resample": 3,
      "do_center_crop": False, "image_mean": list(mean), "image_std": list(std),
    }  # fmt: skip
    (folder / PREPROCESSOR).write_text(json.dumps(preprocessor, indent=2) + "\n")


def from_authors(
  tensors: dict[str, np.ndarray], *, source: str, num_heads: int | None = None, grid: Grid | None = None
) -> PyTree:
  """Return our parameters from tensors with the authors' or timm's names. The tensors give the sizes.

  Ignores relative_position_index, which the sizes determine, and with a line in the log MAE's decoder and the
  extra layers of BEiT v2's pre-training (cls_pt_layers). A student without a mask token, as timm writes it,
  gets zeros. The key bias of a plain vision transformer is dropped, because it adds the same number to all
  scores of a query, which the softmax ignores.

  Args:
    source: the file of the tensors, for messages.
    num_heads, grid: needed only if the tensors do not give them (see `vit.config.describe`).

  Raises:
    UnreadableFileError: names or shapes do not match; the message lists all of them.
    OptionError: the tensors do not give heads or grid.
  """
  tensors = _without_plain_parts(_without_unused(tensors, source))
  shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
  with blaming(source):
    model, grid = vit_config.describe(shapes, num_heads=num_heads, grid=grid)
    expected = vit_config.param_shapes(model, grid)
  if is_student(expected) and "mask_token" not in tensors:
    logging.warning("%s has no mask token. Using zeros.", source)
    tensors["mask_token"] = np.zeros((1, 1, model.width), np.float32)
  return weight_names.to_ours(tensors, expected, authors_rules(expected), source=source)


def _without_unused(tensors: dict[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
  """Return the tensors without extra layers, decoder and buffers."""
  extra = [name for name in tensors if name.startswith("cls_pt_layers.")]
  if extra:
    logging.info("Ignoring %d tensors of BEiT v2's extra layers in %s: %s, ...", len(extra), source, extra[0])
  decoder = [name for name in tensors if name.startswith("decoder_")]
  if decoder:
    decoder += ["mask_token"]  # MAE's mask token belongs to its decoder
    logging.info("Ignoring %d tensors of MAE's decoder in %s: %s, ...", len(decoder), source, decoder[0])
  ignored = {*extra, *decoder, *(name for name in tensors if name.endswith("relative_position_index"))}
  return {name: tensor for name, tensor in tensors.items() if name not in ignored}


def _without_plain_parts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return a plain vision transformer's tensors as BEiT's: biases of queries and values, layer scales."""
  renamed = {}
  for name, tensor in tensors.items():
    if name.endswith("attn.qkv.bias") and tensor.ndim == 1 and len(tensor) % 3 == 0:
      renamed[name.replace("qkv.bias", "q_bias")], _, renamed[name.replace("qkv.bias", "v_bias")] = np.split(
        tensor, 3
      )
    elif name.endswith((".ls1.gamma", ".ls2.gamma")):
      renamed[name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = tensor
    else:
      renamed[name] = tensor
  if "mask_token" in renamed and renamed["mask_token"].ndim == 2:
    renamed["mask_token"] = renamed["mask_token"][None]
  return renamed


def to_authors(params: PyTree) -> dict[str, Any]:
  """Return the tensors under the authors' names; the inverse of `from_authors`."""
  return weight_names.to_theirs(params, authors_rules(params))


def to_timm(params: PyTree) -> dict[str, Any]:
  """Return the tensors under timm's names: one table for each block, no mask token, no student's head."""
  without = ("mask_token", "head") if is_student(params) else ()
  _log_left_out("timm", [name for name in without if name in params])
  return to_authors({name: part for name, part in sum_tables(params).items() if name not in without})


def from_transformers(tensors: dict[str, np.ndarray], config: dict[str, Any], *, source: str) -> PyTree:
  """Return our parameters from the tensors of transformers' BEiT.

  Args:
    tensors: of a BeitModel, a BeitForImageClassification or a BeitForMaskedImageModeling.
    config: the content of config.json.
    source: the file of the tensors, for messages.

  Raises:
    UnreadableFileError: the model is no BEiT, or names or shapes do not match; the message lists them.
  """
  tensors = {
    name.removeprefix("beit."): tensor
    for name, tensor in tensors.items()
    if not name.endswith("relative_position_index")
  }
  with blaming(f"{CONFIG} of {source}"):
    model, grid = vit_config.from_transformers(config, tensors)
    expected = jax.eval_shape(split_qkv, vit_config.param_shapes(model, grid))
  rules = TRANSFORMERS_STUDENT if is_student(expected) else TRANSFORMERS_CLASSIFIER
  return fuse_qkv(weight_names.to_ours(tensors, expected, rules, source=source))


def to_transformers(params: PyTree) -> dict[str, Any]:
  """Return the tensors of a BeitModel, without the student's head, or of a BeitForImageClassification."""
  if is_student(params):
    _log_left_out("transformers", [name for name in ("head",) if name in params])
    params = {name: part for name, part in params.items() if name != "head"}
    return weight_names.to_theirs(split_qkv(params), TRANSFORMERS_STUDENT)
  tensors = weight_names.to_theirs(split_qkv(params), TRANSFORMERS_CLASSIFIER)
  return {name if name.startswith("classifier.") else f"beit.{name}": t for name, t in tensors.items()}


LAYOUTS: dict[str, Callable[[PyTree], dict[str, Any]]] = {
  "authors": to_authors, "timm": to_timm, "transformers": to_transformers,
}  # fmt: skip


def _log_left_out(where: str, names: list[str]) -> None:
  if names:
    logging.info("Leaving out for %s, which has no place for them: %s.", where, ", ".join(names))
