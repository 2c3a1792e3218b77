"""The student and its classifier under other people's names, in both directions, and from one to the other.

    params = load(folder)                               # the authors', BEiT's, timm's or transformers'
    save(folder, params, "timm")                        # timm.create_model("local-dir:...", pretrained=True)
    params = to_finetune(params, fresh, grid=(14, 14))

"authors" are the names of BEiT v2, which the released implementation of the paper and its fine-tuning use,
and of which timm knows a part: no mask token, no head to the teacher's width, and one table of relative
position biases for each block. There the shared table is added to the others, which changes no output.
`transformers` has both kinds of table and the mask token. Whatever has no place is named in the log.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from safetensors.numpy import save_file

from dtm_jax.arrays import PyTree
from dtm_jax.errors import NotThereError, OptionError
from dtm_jax.models.files import weight_files, weight_names
from dtm_jax.models.files.file_checks import blaming
from dtm_jax.models.files.weight_files import CONFIG, PREPROCESSOR, Found
from dtm_jax.models.files.weight_names import (
  CONVOLUTION,
  LINEAR,
  NORM,
  SAME,
  TRANSPOSED,
  Layout,
  Rules,
  layers,
)
from dtm_jax.models.vit import config as vit_config
from dtm_jax.models.vit.config import Grid
from dtm_jax.models.vit.transfer import sum_tables
from dtm_jax.models.vit.transfer import to_finetune as to_finetune
from dtm_jax.normalizations import NORMALIZATIONS, Triple

TOKEN = Layout(lambda tensor: tensor.reshape(-1), lambda token: token[None, None])
POSITIONS = Layout(lambda tensor: tensor[0], lambda table: table[None])

TRUNK: Rules = {
  "cls_token": ("cls_token", TOKEN),
  "mask_token": ("mask_token", TOKEN),
  "pos_embed": ("pos_embed", POSITIONS),
  "patch_embed/proj/kernel": ("patch_embed.proj.weight", CONVOLUTION),
  "patch_embed/proj/bias": ("patch_embed.proj.bias", SAME),
  "rel_pos_bias/table": ("rel_pos_bias.relative_position_bias_table", SAME),
  "blocks/layer_scale1": ("blocks.{layer}.gamma_1", SAME),
  "blocks/layer_scale2": ("blocks.{layer}.gamma_2", SAME),
  "blocks/attn/q_bias": ("blocks.{layer}.attn.q_bias", SAME),
  "blocks/attn/v_bias": ("blocks.{layer}.attn.v_bias", SAME),
  "blocks/attn/qkv/kernel": ("blocks.{layer}.attn.qkv.weight", TRANSPOSED),
  "blocks/attn/rel_pos_bias/table": ("blocks.{layer}.attn.relative_position_bias_table", SAME),
  **layers("blocks", "blocks.{layer}", {
    "ln1": ("norm1", NORM), "attn/proj": ("attn.proj", LINEAR),
    "ln2": ("norm2", NORM), "mlp/fc1": ("mlp.fc1", LINEAR), "mlp/fc2": ("mlp.fc2", LINEAR),
  }),
  "norm/scale": ("norm.weight", SAME),
  "norm/bias": ("norm.bias", SAME),
  "fc_norm/scale": ("fc_norm.weight", SAME),
  "fc_norm/bias": ("fc_norm.bias", SAME),
}  # fmt: skip
_head = lambda name: {"head/kernel": (f"{name}.weight", TRANSPOSED), "head/bias": (f"{name}.bias", SAME)}
STUDENT, CLASSIFIER = TRUNK | _head("lm_head"), TRUNK | _head("head")

# Their attention has query, key and value apart: see `_split_qkv`.
_LAYER = "encoder.layer.{layer}"
_ATTENTION = f"{_LAYER}.attention.attention"
TRANSFORMERS: Rules = {
  "cls_token": ("embeddings.cls_token", TOKEN),
  "mask_token": ("embeddings.mask_token", TOKEN),
  "pos_embed": ("embeddings.position_embeddings", POSITIONS),
  "patch_embed/proj/kernel": ("embeddings.patch_embeddings.projection.weight", CONVOLUTION),
  "patch_embed/proj/bias": ("embeddings.patch_embeddings.projection.bias", SAME),
  "rel_pos_bias/table": ("encoder.relative_position_bias.relative_position_bias_table", SAME),
  "blocks/layer_scale1": (f"{_LAYER}.lambda_1", SAME),
  "blocks/layer_scale2": (f"{_LAYER}.lambda_2", SAME),
  "blocks/attn/rel_pos_bias/table": (
    f"{_ATTENTION}.relative_position_bias.relative_position_bias_table", SAME,
  ),
  **layers("blocks/attn", _ATTENTION, {name: (name, LINEAR) for name in ("query", "key", "value")}),
  **layers("blocks", _LAYER, {
    "ln1": ("layernorm_before", NORM), "attn/proj": ("attention.output.dense", LINEAR),
    "ln2": ("layernorm_after", NORM), "mlp/fc1": ("intermediate.dense", LINEAR),
    "mlp/fc2": ("output.dense", LINEAR),
  }),
  "norm/scale": ("layernorm.weight", SAME),
  "norm/bias": ("layernorm.bias", SAME),
  "fc_norm/scale": ("pooler.layernorm.weight", SAME),
  "fc_norm/bias": ("pooler.layernorm.bias", SAME),
}  # fmt: skip
TRANSFORMERS_STUDENT, TRANSFORMERS_CLASSIFIER = (
  TRANSFORMERS | _head("lm_head"),
  TRANSFORMERS | _head("classifier"),
)


# Files ---------------------------------------------------------------------------------------------------


def load(
  path_or_repo: str | Path | Found,
  *,
  revision: str | None = None,
  num_heads: int | None = None,
  grid: Grid | None = None,
  weights: str | None = None,
) -> PyTree:
  """Return the parameters, NumPy float32, of a student or classifier in a file, a folder or a repository.

  Args:
    num_heads, grid: only where neither the tensors nor config.json tell (see `vit_config.describe`).
    weights: the container of the model, for a file that holds several (see `checkpoint_contents`).

  Raises:
    NotThereError: a file is not there.
    OptionError: nothing tells the heads, or the file holds several models.
    UnreadableFileError: names or shapes do not match; lists all of them.
  """
  found = weight_files.find(path_or_repo, revision=revision, weights=weights)
  tensors, source = weight_files.read(found), str(found.file)
  content = found.json(CONFIG)
  if any(name.endswith("embeddings.cls_token") for name in tensors):
    if not content:
      raise NotThereError(f"No {CONFIG} beside {source}, whose names are those of transformers.")
    return from_transformers(tensors, content, source=source)
  with blaming(found.folder / CONFIG):
    told = content.get("num_heads") or content.get("model_args", {}).get("num_heads")  # ours, or timm's
  return from_authors(tensors, source=source, num_heads=num_heads or told, grid=grid)


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
  """Writes model.safetensors and config.json as one of LAYOUTS; a preprocessor_config.json for transformers.

  Args:
    params: of a student or a classifier.
    num_heads, grid: only where the parameters do not tell (see `vit_config.describe`).
    mean, std: the normalisation that the model was trained with.
    class_names: the names of a classifier's classes, by label; a student has no classes and ignores them.

  Raises:
    OptionError: an unknown layout, the parameters do not tell heads or grid, or the names are not as many as
      the classes.
  """
  if layout not in LAYOUTS:
    raise OptionError(f"Unknown layout {layout!r}. Available: {', '.join(LAYOUTS)}.")
  params = jax.device_get(params)
  shapes = {name: tensor.shape for name, tensor in to_authors(params).items()}
  model, grid = vit_config.describe(shapes, num_heads=num_heads, grid=grid)
  if grid is None:
    raise OptionError("The parameters have no positions that tell the grid of patches: give the grid.")
  image_size = grid[0] * model.patch_size, grid[1] * model.patch_size
  config = {
    "authors": lambda: vit_config.to_authors(model, image_size, mean, std),
    "timm": lambda: vit_config.to_timm(model, image_size, mean, std),
    "transformers": lambda: vit_config.to_transformers(model, image_size),
  }[layout]()
  if class_names is not None and isinstance(model, vit_config.Classifier):
    config |= vit_config.class_labels(layout, class_names, model.num_classes)
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  # safetensors writes the buffer as it lies in memory, so a transposed view must become an array.
  tensors = {
    name: np.array(tensor, np.float32, order="C") for name, tensor in LAYOUTS[layout](params).items()
  }
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
  if layout == "transformers":
    height, width = image_size
    preprocessor = {
      "image_processor_type": "BeitImageProcessor", "size": {"height": height, "width": width}, "resample": 3,
      "do_center_crop": False, "image_mean": list(mean), "image_std": list(std),
    }  # fmt: skip
    (folder / PREPROCESSOR).write_text(json.dumps(preprocessor, indent=2) + "\n")


# Names ---------------------------------------------------------------------------------------------------


def from_authors(
  tensors: dict[str, np.ndarray], *, source: str, num_heads: int | None = None, grid: Grid | None = None
) -> PyTree:
  """Return our parameters from tensors in the authors' names, or timm's; the tensors tell the sizes.

  What is computed from sizes (relative_position_index) is ignored, and so are, named in the log, the layers
  that BEiT v2 pre-trains beside the blocks (cls_pt_layers) and MAE's decoder. A student without a mask token,
  as timm has it, gets zeros. The plain vision transformer's bias of keys is left out: it adds the same number
  to all scores of a query, which the softmax ignores.

  Raises:
    UnreadableFileError: lists every missing, unexpected and mis-shaped name; `source` says of what.
    OptionError: the tensors do not tell heads or grid.
  """
  tensors = _without_plain_parts(_without_unused(tensors, source))
  shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
  with blaming(source):
    model, grid = vit_config.describe(shapes, num_heads=num_heads, grid=grid)
    expected = vit_config.param_shapes(model, grid)
  if _is_student(expected) and "mask_token" not in tensors:
    logging.warning("%s has no mask token: it starts from zero.", source)
    tensors["mask_token"] = np.zeros((1, 1, model.width), np.float32)
  return weight_names.to_ours(tensors, expected, _authors_rules(expected), source=source)


def _without_unused(tensors: dict[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
  beside = [name for name in tensors if name.startswith("cls_pt_layers.")]
  if beside:
    logging.info("Left out of %s: BEiT v2's %d tensors %s, ...", source, len(beside), beside[0])
  decoder = [name for name in tensors if name.startswith("decoder_")]
  if decoder:  # its mask token belongs to the decoder, too
    decoder += ["mask_token"]
    logging.info("Left out of %s: MAE's %d tensors of the decoder, %s, ...", source, len(decoder), decoder[0])
  ignored = {*beside, *decoder, *(name for name in tensors if name.endswith("relative_position_index"))}
  return {name: tensor for name, tensor in tensors.items() if name not in ignored}


def _without_plain_parts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The plain vision transformer's fused bias as the two that count, and its layer scales by BEiT's names."""
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
  """Tensors in the authors' names; the inverse of `from_authors`."""
  return weight_names.to_theirs(params, _authors_rules(params))


def to_timm(params: PyTree) -> dict[str, Any]:
  """Tensors in timm's names: the authors', with one table a block, no mask token and no student's head."""
  without = ("mask_token", "head") if _is_student(params) else ()
  _log_left_out("timm", [name for name in without if name in params])
  return to_authors({name: part for name, part in sum_tables(params).items() if name not in without})


def from_transformers(tensors: dict[str, np.ndarray], config: dict[str, Any], *, source: str) -> PyTree:
  """Our parameters from the tensors of a BeitModel, BeitForImageClassification or BeitForMaskedImageModeling.

  Raises:
    ValueError: lists every missing, unexpected and mis-shaped name; `source` says of what.
  """
  tensors = {
    name.removeprefix("beit."): tensor
    for name, tensor in tensors.items()
    if not name.endswith("relative_position_index")
  }
  with blaming(f"{CONFIG} of {source}"):
    model, grid = vit_config.from_transformers(config, tensors)
    expected = jax.eval_shape(_split_qkv, vit_config.param_shapes(model, grid))
  rules = TRANSFORMERS_STUDENT if _is_student(expected) else TRANSFORMERS_CLASSIFIER
  return _join_qkv(weight_names.to_ours(tensors, expected, rules, source=source))


def to_transformers(params: PyTree) -> dict[str, Any]:
  """Tensors of a BeitModel (from a student, whose head has no place) or of a BeitForImageClassification."""
  if _is_student(params):
    _log_left_out("transformers", [name for name in ("head",) if name in params])
    params = {name: part for name, part in params.items() if name != "head"}
    return weight_names.to_theirs(_split_qkv(params), TRANSFORMERS_STUDENT)
  tensors = weight_names.to_theirs(_split_qkv(params), TRANSFORMERS_CLASSIFIER)
  return {name if name.startswith("classifier.") else f"beit.{name}": t for name, t in tensors.items()}


LAYOUTS: dict[str, Callable[[PyTree], dict[str, Any]]] = {
  "authors": to_authors, "timm": to_timm, "transformers": to_transformers,
}  # fmt: skip


def _is_student(params: PyTree) -> bool:
  return "mask_token" in params


def _authors_rules(params: PyTree) -> Rules:
  return STUDENT if _is_student(params) else CLASSIFIER


def _split_qkv(params: PyTree) -> PyTree:
  """The fused kernel and the two biases as three linear maps."""
  attention = dict(params["blocks"]["attn"])
  kernels = np.split if isinstance(attention["qkv"]["kernel"], np.ndarray) else jax.numpy.split
  query, key, value = kernels(attention.pop("qkv")["kernel"], 3, axis=-1)
  attention |= {
    "query": {"kernel": query, "bias": attention.pop("q_bias")},
    "key": {"kernel": key},
    "value": {"kernel": value, "bias": attention.pop("v_bias")},
  }
  return params | {"blocks": params["blocks"] | {"attn": attention}}


def _join_qkv(params: PyTree) -> PyTree:
  attention = dict(params["blocks"]["attn"])
  query, key, value = (attention.pop(name) for name in ("query", "key", "value"))
  kernel = np.concatenate([query["kernel"], key["kernel"], value["kernel"]], axis=-1)
  attention |= {"qkv": {"kernel": kernel}, "q_bias": query["bias"], "v_bias": value["bias"]}
  return params | {"blocks": params["blocks"] | {"attn": attention}}


def _log_left_out(where: str, names: list[str]) -> None:
  if names:
    logging.info("Left out for %s, which has no place for it: %s.", where, ", ".join(names))
