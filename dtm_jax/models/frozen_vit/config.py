"""Read the configuration of a frozen tower from the config.json of `transformers`, for each `model_type`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dtm_jax.models.files.file_checks import UnreadableFileError
from dtm_jax.models.files.weight_names import Rules
from dtm_jax.models.frozen_vit.layouts import DINOV2, DINOV2_SWIGLU, SIGLIP, SIGLIP_NAFLEX, VIT
from dtm_jax.models.frozen_vit.model import FrozenViTConfig
from dtm_jax.models.layers import Tower


class Family(NamedTuple):
  """How to read one `model_type`.

  Attributes:
    from_transformers: from the content of config.json to our configuration and the rules of names.
    prefix: what a model with a head adds to the names of the tower.
    unused: prefixes of the tensors that the patch tokens do not depend on.
  """

  from_transformers: Callable[[dict[str, Any]], tuple[FrozenViTConfig, Rules]]
  prefix: str
  unused: tuple[str, ...]


def _vit(content: dict[str, Any]) -> tuple[FrozenViTConfig, Rules]:
  import transformers  # takes a second, and other models do not need it

  kind = {"vit": transformers.ViTConfig, "vit_mae": transformers.ViTMAEConfig}[content["model_type"]]
  theirs = kind.from_dict(content)
  tower = _tower(theirs, theirs.intermediate_size)
  return FrozenViTConfig(tower, _side(theirs.image_size), _side(theirs.patch_size)), VIT


def _dinov2(content: dict[str, Any]) -> tuple[FrozenViTConfig, Rules]:
  import transformers  # takes a second, and other models do not need it

  kinds = {
    "dinov2": transformers.Dinov2Config,
    "dinov2_with_registers": transformers.Dinov2WithRegistersConfig,
  }
  theirs = kinds[content["model_type"]].from_dict(content)
  hidden = int(theirs.hidden_size * theirs.mlp_ratio)
  if theirs.use_swiglu_ffn:
    hidden = (int(hidden * 2 / 3) + 7) // 8 * 8  # keeps the MLP's number of parameters
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


def _siglip(content: dict[str, Any]) -> tuple[FrozenViTConfig, Rules]:
  import transformers  # takes a second, and other models do not need it

  theirs = transformers.SiglipVisionConfig.from_dict(content.get("vision_config", content))
  tower = _tower(theirs, theirs.intermediate_size)
  image_size, patch_size = _side(theirs.image_size), _side(theirs.patch_size)
  return FrozenViTConfig(tower, image_size, patch_size, class_token=False), SIGLIP


def _siglip_naflex(content: dict[str, Any]) -> tuple[FrozenViTConfig, Rules]:
  import transformers  # takes a second, and other models do not need it

  theirs = transformers.Siglip2VisionConfig.from_dict(content.get("vision_config", content))
  tower, patch_size = _tower(theirs, theirs.intermediate_size), _side(theirs.patch_size)
  image_size = round(theirs.num_patches**0.5) * patch_size
  config = FrozenViTConfig(tower, image_size, patch_size, resize="bilinear_antialias", class_token=False)
  return config, SIGLIP_NAFLEX


def _tower(theirs: Any, mlp_width: int) -> Tower:
  if not getattr(theirs, "qkv_bias", True):
    raise UnreadableFileError(
      f"qkv_bias=False: a {theirs.model_type} without biases of queries, keys and values is not supported."
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
  """Return the side of a square, which `transformers` may write as a pair."""
  if isinstance(size, int):
    return size
  if len(set(size)) > 1:
    raise UnreadableFileError(f"Only square images and patches are supported, not {tuple(size)}.")
  return size[0]


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
"""Maps a `model_type` of config.json to the rules for reading it."""
