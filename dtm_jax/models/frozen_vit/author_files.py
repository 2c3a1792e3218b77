"""Convert DINOv2's and MAE's weights from their authors' names, which timm shares, without a config.json.

    dinov2_vitb14_pretrain.pth, dinov2_vitg14_reg4_pretrain.pth, mae_pretrain_vit_base.pth, timm's folders

The shapes give all sizes except the number of heads. HEADS has those of the published models; for other sizes
the user must give them. As in all published models, LayerNorms have an epsilon of 1e-6 and the activation is
the exact GELU. DINOv2's blocks may be numbered in chunks, `blocks.CHUNK.LAYER.`.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

from dtm_jax.arrays import PyTree
from dtm_jax.models.files import weight_names
from dtm_jax.models.files.weight_names import (
  CONVOLUTION,
  LINEAR,
  NORM,
  SAME,
  Rules,
  check_ranks,
  fuse_qkv,
  layers,
  split_qkv,
)
from dtm_jax.models.frozen_vit.layouts import TOKENS
from dtm_jax.models.frozen_vit.model import FrozenViTConfig, param_shapes
from dtm_jax.models.layers import Tower

HEADS = {
  "dinov2": {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1536, 40): 24},
  "mae": {(768, 12): 12, (1024, 24): 16, (1280, 32): 16},
}
"""(width, depth) -> heads of the published models. A head has 80 channels in MAE's ViT-H, 64 elsewhere."""

ANCHOR = "patch_embed.proj.weight"
EPS = 1e-6

_MLP = {"mlp/fc1": ("mlp.fc1", LINEAR), "mlp/fc2": ("mlp.fc2", LINEAR)}
_SWIGLU = {"mlp/fc1": ("mlp.w12", LINEAR), "mlp/fc2": ("mlp.w3", LINEAR)}
_UNUSED = ("mask_token", "decoder", "head.", "head_drop")
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+\.)")


def rules(config: FrozenViTConfig, packed_swiglu: bool) -> Rules:
  """Return the rules of names. `packed_swiglu` is timm's SwiGLU, which has the names of a plain MLP."""
  block = {
    "ln1": ("norm1", NORM), "attn/qkv": ("attn.qkv", LINEAR), "attn/out": ("attn.proj", LINEAR),
    "ln2": ("norm2", NORM), **(_SWIGLU if config.swiglu and not packed_swiglu else _MLP),
  }  # fmt: skip
  return {
    "cls_token": ("cls_token", TOKENS),
    "position_embedding": ("pos_embed", TOKENS),
    "register_tokens": ("register_tokens", TOKENS),
    "patch_embed/proj/kernel": (ANCHOR, CONVOLUTION),
    "patch_embed/proj/bias": ("patch_embed.proj.bias", SAME),
    "blocks/layer_scale1": ("blocks.{layer}.ls1.gamma", SAME),
    "blocks/layer_scale2": ("blocks.{layer}.ls2.gamma", SAME),
    **layers("blocks", "blocks.{layer}", block),
    "norm/scale": ("norm.weight", SAME),
    "norm/bias": ("norm.bias", SAME),
  }


def family_of(tensors: dict[str, np.ndarray]) -> str:
  """Return "dinov2" for blocks with layer scales, "mae" for those without."""
  return "dinov2" if any(name.endswith("ls1.gamma") for name in tensors) else "mae"


def from_authors(
  tensors: dict[str, np.ndarray], *, source: str, heads: int | None, content: dict[str, Any]
) -> tuple[FrozenViTConfig, PyTree]:
  """Return the configuration and our parameters from tensors with the authors' or timm's names.

  Args:
    source: the file of the tensors, for messages.
    heads: None takes those of timm's configuration `content`, or of HEADS. If neither has them, the
      configuration has heads of None.
    content: the content of config.json, or {}.

  Raises:
    UnreadableFileError: names or shapes do not match; the message lists all of them.
  """
  tensors = _normalized(tensors, source)
  family = family_of(tensors)
  config, packed = _describe({name: tensor.shape for name, tensor in tensors.items()}, family, source)
  size = config.tower.width, config.tower.depth
  heads = heads or content.get("model_args", {}).get("num_heads") or HEADS[family].get(size)
  config = _with_heads(config, heads)
  expected = jax.eval_shape(fuse_qkv, param_shapes(_with_heads(config, heads or 1)))  # heads change no shape
  return config, split_qkv(weight_names.to_ours(tensors, expected, rules(config, packed), source=source))


def _normalized(tensors: dict[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
  """Return the used tensors under the authors' names, with blocks numbered without chunks."""
  tensors = weight_names.without_unused(tensors, _UNUSED, source)
  chunked = any(re.match(r"blocks\.\d+\.\d+\.", name) for name in tensors)
  if chunked:
    tensors = {_CHUNKED.sub(r"blocks.\1", name): tensor for name, tensor in tensors.items()}
  if "reg_token" in tensors:
    tensors["register_tokens"] = tensors.pop("reg_token")
  table = tensors.get("pos_embed")
  if table is not None and table.ndim == 3 and math.isqrt(table.shape[1]) ** 2 == table.shape[1]:
    # timm's models with registers have no position for CLS. A zero position changes nothing.
    tensors["pos_embed"] = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
  return tensors


def _describe(shapes: dict[str, tuple[int, ...]], family: str, source: str) -> tuple[FrozenViTConfig, bool]:
  """Return the configuration without heads, and whether a gated MLP has the names of a plain one."""
  gated = "blocks.0.mlp.w12.weight" in shapes
  hidden = "blocks.0.mlp.w12.weight" if gated else "blocks.0.mlp.fc1.weight"
  output = "blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight"
  check_ranks(shapes, {ANCHOR: 4, "pos_embed": 3, hidden: 2, output: 2}, source=source, hint=_SUPPORTED)
  width, _, patch_size, _ = shapes[ANCHOR]
  depth = 1 + max(int(name.split(".")[1]) for name in shapes if re.match(r"blocks\.\d+\.", name))
  mlp_width, packed = shapes[output][1], False
  if not gated and shapes[hidden][0] == 2 * mlp_width:
    gated = packed = True
  registers = shapes["register_tokens"][1] if "register_tokens" in shapes else 0
  config = FrozenViTConfig(
    Tower(width, depth, None, mlp_width, "gelu", EPS),
    math.isqrt(max(0, shapes["pos_embed"][1] - 1)) * patch_size,
    patch_size,
    resize="bicubic_antialias" if registers else "bicubic",
    num_registers=registers,
    layer_scale=family == "dinov2",
    swiglu=gated,
  )
  return config, packed


_SUPPORTED = (
  " Supported are the names of DINOv2's and MAE's authors, of timm, and of transformers with a config.json."
)


def missing_heads(config: FrozenViTConfig, source: str) -> str | None:
  """Return a message that asks for the heads if `config` has none, and None otherwise."""
  if config.tower.num_heads is not None:
    return None
  published = ", ".join(f"{width} in {depth} layers" for width, depth in HEADS[_family(config)])
  return (
    f"{source} does not give the heads of its {config.tower.depth} layers of width {config.tower.width}: "
    f"give --config.teacher.heads=NUMBER. Published sizes need no heads: {published}. Or give the model as "
    "transformers writes it, a folder with model.safetensors and config.json."
  )


def _family(config: FrozenViTConfig) -> str:
  return "dinov2" if config.layer_scale else "mae"


def _with_heads(config: FrozenViTConfig, heads: int | None) -> FrozenViTConfig:
  return dataclasses.replace(config, tower=dataclasses.replace(config.tower, num_heads=heads))
