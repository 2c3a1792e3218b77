"""Build a student or classifier from its tensors or its config.json, and write config.json in three layouts.

The attributes of a `vit.VisionTransformer` or a `Classifier` are its configuration.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from dtm_jax.arrays import PyTree
from dtm_jax.errors import OptionError
from dtm_jax.models import positions
from dtm_jax.models.files.file_checks import UnreadableFileError
from dtm_jax.models.layers import image_shape, variable_shapes
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit.classifier import Classifier
from dtm_jax.normalizations import Triple

Grid = tuple[int, int]


def describe(
  shapes: dict[str, tuple[int, ...]], *, num_heads: int | None = None, grid: Grid | None = None
) -> tuple[vit.Trunk, Grid | None]:
  """Return the model that has tensors of these shapes, and its grid of patches.

  A model with a `head` is a classifier. Every other model is a student.

  Args:
    shapes: the shape of each tensor, under the name that the authors use.
    num_heads: the number of attention heads. A relative position bias table gives this number too, so it is
      needed only for a model without one.
    grid: (rows, columns) of patches; by default a square grid.

  Returns:
    The model, and its grid, or None for a model without positions.

  Raises:
    UnreadableFileError: the tensors are not those of a student or classifier.
    OptionError: the model has no relative position bias table, and `num_heads` is None.
    ValueError: the number of positions does not fit a square grid.
  """
  if absent := {"patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} - shapes.keys():
    some = ", ".join(sorted(shapes)[:5])
    raise UnreadableFileError(
      f"No {' and no '.join(sorted(absent))} among {len(shapes)} tensors ({some}, ...)."
    )
  width, _, patch_size, _ = shapes["patch_embed.proj.weight"]
  tables = [shape for name, shape in shapes.items() if name.endswith("relative_position_bias_table")]
  if not tables and num_heads is None:
    raise OptionError(
      "The number of heads is unknown, because there is no relative position bias table: give num_heads."
    )
  if grid is None and tables:
    grid = positions.square_grid(table_rows=tables[0][0])
  elif grid is None and "pos_embed" in shapes:
    grid = positions.square_grid(num_positions=shapes["pos_embed"][1])
  options = {
    "patch_size": patch_size,
    "width": width,
    "depth": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
    "num_heads": tables[0][1] if tables else num_heads,
    "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] / width,
    "shared_rel_pos_bias": "rel_pos_bias.relative_position_bias_table" in shapes,
    "rel_pos_bias": "blocks.0.attn.relative_position_bias_table" in shapes,
    "abs_pos_emb": "pos_embed" in shapes,
    "layer_scale_init": 0.1 if "blocks.0.gamma_1" in shapes else None,
  }
  if "head.weight" in shapes:
    pooling = "mean" if "fc_norm.weight" in shapes else "cls"
    return Classifier(**options, num_classes=shapes["head.weight"][0], pooling=pooling), grid
  return vit.VisionTransformer(**options, out_dim=shapes.get("lm_head.weight", (None,))[0]), grid


def param_shapes(model: vit.Trunk, grid: Grid | None) -> PyTree:
  """Return the shapes of the model's parameters."""
  rows, columns = grid or (1, 1)
  image = image_shape(rows * model.patch_size, columns * model.patch_size)
  return variable_shapes(model, image)["params"]


def options(model: vit.Trunk) -> dict[str, Any]:
  """Return the attributes that build the model. Those that suit one device only are left out."""
  left_out = ("parent", "name", "attention", "stream_dtype")
  names = [field.name for field in dataclasses.fields(model) if field.name not in left_out]
  return {name: getattr(model, name) for name in names}


def to_authors(model: vit.Trunk, image_size: Grid, mean: Triple, std: Triple) -> dict[str, Any]:
  """Return our config.json: attributes, image size and normalisation. The authors' files have none."""
  return options(model) | {"image_size": list(image_size), "mean": list(mean), "std": list(std)}


def to_timm(model: vit.Trunk, image_size: Grid, mean: Triple, std: Triple) -> dict[str, Any]:
  """Return the config.json of timm's Beit with one bias table for each block. A student has 0 classes."""
  classes = model.num_classes if isinstance(model, Classifier) else 0
  pooled = isinstance(model, Classifier) and model.pooling == "mean"
  hidden = round(model.mlp_ratio * model.width)
  arguments = {
    "img_size": list(image_size),
    "patch_size": model.patch_size,
    "embed_dim": model.width,
    "depth": model.depth,
    "num_heads": model.num_heads,
    # timm truncates mlp_ratio * embed_dim to the hidden width.
    "mlp_ratio": (hidden if hidden % model.width == 0 else hidden + 0.5) / model.width,
    "init_values": model.layer_scale_init or None,
    "use_abs_pos_emb": model.abs_pos_emb,
    "use_rel_pos_bias": model.rel_pos_bias or model.shared_rel_pos_bias,
    "global_pool": "avg" if pooled else "token",
  }
  return {
    "architecture": "beit_large_patch16_224" if model.depth > 12 else "beit_base_patch16_224",
    "num_classes": classes,
    "num_features": model.width,
    "global_pool": arguments["global_pool"],
    "model_args": arguments,
    "pretrained_cfg": {
      "num_classes": classes,
      "input_size": [3, *image_size],
      "fixed_input_size": True,
      "interpolation": "bicubic",
      "crop_pct": 0.875,
      "mean": list(mean),
      "std": list(std),
      "first_conv": "patch_embed.proj",
      "classifier": "head",
    },
  }


def to_transformers(model: vit.Trunk, image_size: Grid) -> dict[str, Any]:
  """Return the config.json of a BeitModel (student) or a BeitForImageClassification (classifier)."""
  classifier = isinstance(model, Classifier)
  rows, columns = image_size
  config: dict[str, Any] = {
    "model_type": "beit",
    "architectures": ["BeitForImageClassification" if classifier else "BeitModel"],
    "hidden_size": model.width,
    "num_hidden_layers": model.depth,
    "num_attention_heads": model.num_heads,
    "intermediate_size": round(model.mlp_ratio * model.width),
    "hidden_act": "gelu",
    "layer_norm_eps": vit.EPS,
    "image_size": rows if rows == columns else list(image_size),
    "patch_size": model.patch_size,
    "use_mask_token": not classifier,
    "use_absolute_position_embeddings": model.abs_pos_emb,
    "use_relative_position_bias": model.rel_pos_bias,
    "use_shared_relative_position_bias": model.shared_rel_pos_bias,
    "layer_scale_init_value": model.layer_scale_init or 0.0,
    "drop_path_rate": model.drop_path,
    "use_mean_pooling": classifier and model.pooling == "mean",
  }
  if isinstance(model, Classifier):
    names = [f"LABEL_{label}" for label in range(model.num_classes)]
    config |= class_labels("transformers", names, model.num_classes)
  return config


def class_labels(layout: str, class_names: Sequence[str], num_classes: int) -> dict[str, Any]:
  """Return the entries of a layout's config.json that name the classes in the order of the labels.

  Raises:
    OptionError: the number of names is not the number of classes.
  """
  if len(class_names) != num_classes:
    raise OptionError(f"The classifier has {num_classes} classes, but {len(class_names)} names are given.")
  if layout == "transformers":
    labels = {str(label): name for label, name in enumerate(class_names)}
    return {"id2label": labels, "label2id": {name: int(label) for label, name in reversed(labels.items())}}
  return {"label_names" if layout == "timm" else "class_names": list(class_names)}


def from_transformers(config: dict[str, Any], names: Collection[str]) -> tuple[vit.Trunk, Grid]:
  """Return the model and its grid of patches from config.json and the names of the tensors.

  Args:
    config: the content of config.json; the defaults of `transformers` fill missing values.
    names: the names of the tensors. A classifier has `classifier.weight`, and a student does not.

  Raises:
    UnreadableFileError: the model is not a BEiT.
  """
  if config.get("model_type") != "beit":
    raise UnreadableFileError(f"Unknown model_type {config.get('model_type')!r}. Available: beit.")
  from transformers import BeitConfig

  full = BeitConfig(**config)
  rows, columns = full.image_size if isinstance(full.image_size, list | tuple) else (full.image_size,) * 2
  common = {
    "patch_size": full.patch_size,
    "width": full.hidden_size,
    "depth": full.num_hidden_layers,
    "num_heads": full.num_attention_heads,
    "mlp_ratio": full.intermediate_size / full.hidden_size,
    "shared_rel_pos_bias": full.use_shared_relative_position_bias,
    "rel_pos_bias": full.use_relative_position_bias,
    "abs_pos_emb": full.use_absolute_position_embeddings,
    "layer_scale_init": full.layer_scale_init_value or None,
    "drop_path": full.drop_path_rate,
  }
  grid = rows // full.patch_size, columns // full.patch_size
  if "classifier.weight" in names:
    pooling = "mean" if full.use_mean_pooling else "cls"
    return Classifier(**common, num_classes=full.num_labels, pooling=pooling), grid
  return vit.VisionTransformer(**common, out_dim=full.vocab_size if "lm_head.weight" in names else None), grid
