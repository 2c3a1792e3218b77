"""SigLIP, DINOv2, MAE and the plain vision transformer from files.

    config, params = load("facebook/dinov2-base", ["dinov2"])     # or a folder, or the authors' .pth

The names are those of `transformers`, with its config.json beside them, or those of DINOv2's and MAE's
authors (see `frozen_vit_authors`).

Reading is strict: every tensor of the file has its place, is one of those that a teacher of patch tokens
has no use for (`unused` of its family, named in the log), or is listed in an error. So is every parameter
without a tensor.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from absl import logging

from dtm_jax.arrays import PyTree
from dtm_jax.errors import NotThereError, OptionError
from dtm_jax.models.clip.layouts import BLOCK
from dtm_jax.models.files import weight_files, weight_names
from dtm_jax.models.files.file_checks import UnreadableFileError, blaming
from dtm_jax.models.files.weight_files import Found
from dtm_jax.models.files.weight_names import CONVOLUTION, LINEAR, NORM, SAME, TRANSPOSED, Rules, layers
from dtm_jax.models.frozen_vit import author_files as frozen_vit_authors
from dtm_jax.models.frozen_vit.author_files import TOKENS
from dtm_jax.models.frozen_vit.model import FrozenViT, FrozenViTConfig
from dtm_jax.models.layers import Tower

_VIT_LAYER = "encoder.layer.{layer}"
_ATTENTION = {
  "attn/query": ("attention.attention.query", LINEAR),
  "attn/key": ("attention.attention.key", LINEAR),
  "attn/value": ("attention.attention.value", LINEAR),
  "attn/out": ("attention.output.dense", LINEAR),
}
_VIT_COMMON: Rules = {
  "cls_token": ("embeddings.cls_token", TOKENS),
  "position_embedding": ("embeddings.position_embeddings", TOKENS),
  "patch_embed/proj/kernel": ("embeddings.patch_embeddings.projection.weight", CONVOLUTION),
  "patch_embed/proj/bias": ("embeddings.patch_embeddings.projection.bias", SAME),
  **layers("blocks", _VIT_LAYER, _ATTENTION),
  "norm/scale": ("layernorm.weight", SAME),
  "norm/bias": ("layernorm.bias", SAME),
}
VIT: Rules = _VIT_COMMON | layers("blocks", _VIT_LAYER, {
  "ln1": ("layernorm_before", NORM), "ln2": ("layernorm_after", NORM),
  "mlp/fc1": ("intermediate.dense", LINEAR), "mlp/fc2": ("output.dense", LINEAR),
})  # fmt: skip
_DINOV2_COMMON: Rules = {
  **_VIT_COMMON,
  "register_tokens": ("embeddings.register_tokens", TOKENS),
  "blocks/layer_scale1": (f"{_VIT_LAYER}.layer_scale1.lambda1", SAME),
  "blocks/layer_scale2": (f"{_VIT_LAYER}.layer_scale2.lambda1", SAME),
  **layers("blocks", _VIT_LAYER, {"ln1": ("norm1", NORM), "ln2": ("norm2", NORM)}),
}
DINOV2 = _DINOV2_COMMON | layers("blocks", _VIT_LAYER, {
  "mlp/fc1": ("mlp.fc1", LINEAR), "mlp/fc2": ("mlp.fc2", LINEAR),
})  # fmt: skip
DINOV2_SWIGLU = _DINOV2_COMMON | layers("blocks", _VIT_LAYER, {
  "mlp/fc1": ("mlp.weights_in", LINEAR), "mlp/fc2": ("mlp.weights_out", LINEAR),
})  # fmt: skip
SIGLIP: Rules = {
  "position_embedding": ("embeddings.position_embedding.weight", SAME),
  "patch_embed/proj/kernel": ("embeddings.patch_embedding.weight", CONVOLUTION),
  "patch_embed/proj/bias": ("embeddings.patch_embedding.bias", SAME),
  **layers("blocks", "encoder.layers.{layer}", BLOCK),
  "norm/scale": ("post_layernorm.weight", SAME),
  "norm/bias": ("post_layernorm.bias", SAME),
}
# There the patches come flattened, (y, x, rgb), into a linear map.
SIGLIP_NAFLEX = SIGLIP | {"patch_embed/proj/kernel": ("embeddings.patch_embedding.weight", TRANSPOSED)}


class Family(NamedTuple):
  """How one `model_type` of config.json is read.

  Attributes:
    describe: their configuration -> ours, and the rules of names.
    prefix: what a model with a head puts before the names of the tower.
    unused: beginnings of the names that the patch tokens do not depend on.
  """

  describe: Callable[[dict], tuple[FrozenViTConfig, Rules]]
  prefix: str
  unused: tuple[str, ...]


def load(
  path_or_repo: str | Path | Found,
  model_types: Sequence[str],
  *,
  revision: str | None = None,
  heads: int | None = None,
) -> tuple[FrozenViTConfig, PyTree]:
  """Return the configuration and the parameters (NumPy, float32) of a file, a folder or a repository.

  The configuration has None for heads that nothing tells.

  Args:
    model_types: those of FAMILIES that are wanted.
    heads: for the authors' names at a size that was not published.

  Raises:
    NotThereError: a file is not there.
    OptionError: config.json says other heads.
    UnreadableFileError: another kind of model, or names or shapes do not match; lists all of them.
  """
  found = weight_files.find(path_or_repo, revision=revision)
  tensors = weight_files.read(found)
  source, config_file = str(found.file), found.folder / weight_files.CONFIG
  content = found.json(weight_files.CONFIG)
  kind = content.get("model_type")
  if kind is None and frozen_vit_authors.ANCHOR in tensors:
    family = frozen_vit_authors.family_of(tensors)
    if AUTHORS[family] not in model_types:
      raise UnreadableFileError(
        f"{source} has the names of {family.upper()}'s authors, but wanted is one of: "
        f"{', '.join(model_types)} (in transformers' names, with a config.json)."
      )
    return frozen_vit_authors.to_ours(tensors, _expected, source=source, heads=heads, content=content)
  if not content:
    raise NotThereError(
      f"No {weight_files.CONFIG} beside {source}. Read are {', '.join(model_types)} in transformers' names "
      f"with their config.json; its tensors are {', '.join(list(tensors)[:5])}, ..."
    )
  if kind not in model_types:
    raise UnreadableFileError(f"model_type {kind!r} in {config_file} is none of: {', '.join(model_types)}.")
  with blaming(config_file):
    config, rules = FAMILIES[kind].describe(content)
    expected = _expected(config)
  if heads is not None and heads != config.tower.num_heads:
    raise OptionError(f"heads={heads}, but {config_file} says {config.tower.num_heads}.")
  tensors = _of_the_tower(tensors, FAMILIES[kind], source)
  return config, weight_names.to_ours(tensors, expected, rules, source=source)


AUTHORS = {"dinov2": "dinov2", "mae": "vit_mae"}
"""Whose names `frozen_vit_authors` reads -> their `model_type` in transformers."""


def _of_the_tower(tensors: dict[str, np.ndarray], family: Family, source: str) -> dict[str, np.ndarray]:
  """Without the prefix, and without what is not used."""
  tensors = {name.removeprefix(family.prefix): tensor for name, tensor in tensors.items()}
  unused = sorted(name for name in tensors if name.startswith(family.unused))
  if unused:
    logging.info("Not used of %s: %s.", source, ", ".join(unused))
  return {name: tensor for name, tensor in tensors.items() if name not in unused}


def _expected(config: FrozenViTConfig) -> PyTree:
  """The shapes of our parameters."""
  image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(FrozenViT(config).init, key, image)["params"]


def _tower(theirs: "transformers.PretrainedConfig", mlp_width: int) -> Tower:
  if not getattr(theirs, "qkv_bias", True):
    raise UnreadableFileError(
      f"A {theirs.model_type} without biases of queries, keys and values is not supported."
    )
  return Tower(
    width=theirs.hidden_size,
    depth=theirs.num_hidden_layers,
    num_heads=theirs.num_attention_heads,
    mlp_width=mlp_width,
    activation=theirs.hidden_act,
    eps=theirs.layer_norm_eps,
  )


def _side(size: int | Sequence[int]) -> int:
  """Of a square, which they may write as a pair."""
  sides = {size} if isinstance(size, int) else set(size)
  if len(sides) > 1:
    raise UnreadableFileError(f"Only square images and patches are supported, not {tuple(size)}.")
  return sides.pop()


def _vit(content: dict) -> tuple[FrozenViTConfig, Rules]:
  kind = {"vit": transformers.ViTConfig, "vit_mae": transformers.ViTMAEConfig}[content["model_type"]]
  theirs = kind.from_dict(content)
  tower = _tower(theirs, theirs.intermediate_size)
  return FrozenViTConfig(tower, _side(theirs.image_size), _side(theirs.patch_size)), VIT


def _dinov2(content: dict) -> tuple[FrozenViTConfig, Rules]:
  kinds = {
    "dinov2": transformers.Dinov2Config,
    "dinov2_with_registers": transformers.Dinov2WithRegistersConfig,
  }
  theirs = kinds[content["model_type"]].from_dict(content)
  hidden = int(theirs.hidden_size * theirs.mlp_ratio)
  if theirs.use_swiglu_ffn:
    hidden = (int(hidden * 2 / 3) + 7) // 8 * 8  # as many parameters as the MLP, in eights
  config = FrozenViTConfig(
    _tower(theirs, hidden),
    _side(theirs.image_size),
    _side(theirs.patch_size),
    resize="bicubic" if content["model_type"] == "dinov2" else "bicubic_antialias",
    num_registers=getattr(theirs, "num_register_tokens", 0),
    layer_scale=True,
    swiglu=theirs.use_swiglu_ffn,
  )
  return config, DINOV2_SWIGLU if config.swiglu else DINOV2


def _siglip(content: dict) -> tuple[FrozenViTConfig, Rules]:
  theirs = transformers.SiglipVisionConfig.from_dict(content.get("vision_config", content))
  tower = _tower(theirs, theirs.intermediate_size)
  image_size, patch_size = _side(theirs.image_size), _side(theirs.patch_size)
  return FrozenViTConfig(tower, image_size, patch_size, class_token=False), SIGLIP


def _siglip_naflex(content: dict) -> tuple[FrozenViTConfig, Rules]:
  theirs = transformers.Siglip2VisionConfig.from_dict(content.get("vision_config", content))
  tower, patch_size = _tower(theirs, theirs.intermediate_size), _side(theirs.patch_size)
  image_size = round(theirs.num_patches**0.5) * patch_size
  config = FrozenViTConfig(tower, image_size, patch_size, resize="bilinear_antialias", class_token=False)
  return config, SIGLIP_NAFLEX


_SIGLIP_UNUSED = (
  "head.", "text_model.", "logit_scale", "logit_bias", "classifier.", "embeddings.position_ids",
)  # fmt: skip
_VIT_UNUSED = ("embeddings.mask_token", "pooler.", "classifier.", "decoder.")
_DINOV2_UNUSED = ("embeddings.mask_token", "classifier.")
FAMILIES = {
  "siglip": Family(_siglip, "vision_model.", _SIGLIP_UNUSED),
  "siglip_vision_model": Family(_siglip, "vision_model.", _SIGLIP_UNUSED),
  "siglip2": Family(_siglip_naflex, "vision_model.", _SIGLIP_UNUSED),
  "siglip2_vision_model": Family(_siglip_naflex, "vision_model.", _SIGLIP_UNUSED),
  "dinov2": Family(_dinov2, "dinov2.", _DINOV2_UNUSED),
  "dinov2_with_registers": Family(_dinov2, "dinov2_with_registers.", _DINOV2_UNUSED),
  "vit": Family(_vit, "vit.", _VIT_UNUSED),
  "vit_mae": Family(_vit, "vit.", _VIT_UNUSED),
}
