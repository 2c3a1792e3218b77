"""The names and the axes of the frozen towers' tensors in `transformers`: a table of rules a family."""

from dtm_jax.models.clip.layouts import BLOCK
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

TOKENS = Layout(lambda tensor: tensor[0], lambda tokens: tokens[None])

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
DINOV2: Rules = _DINOV2_COMMON | layers("blocks", _VIT_LAYER, {
  "mlp/fc1": ("mlp.fc1", LINEAR), "mlp/fc2": ("mlp.fc2", LINEAR),
})  # fmt: skip
DINOV2_SWIGLU: Rules = _DINOV2_COMMON | layers("blocks", _VIT_LAYER, {
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
# NaFlex embeds flattened patches (y, x, rgb) with a linear map in place of a convolution.
SIGLIP_NAFLEX: Rules = SIGLIP | {
  "patch_embed/proj/kernel": ("embeddings.patch_embedding.weight", TRANSPOSED),
}
