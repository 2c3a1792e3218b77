"""The names and the axes of the student's and the classifier's tensors in other libraries.

"authors" are the names of BEiT v2, which the paper's released code uses, too. timm knows a part of them: it
has no mask token, no head to the teacher's width, and one table of relative position biases for each block.
`transformers` has the mask token and both kinds of table.
"""

import jax.numpy as jnp
import numpy as np

from dtm_jax.arrays import PyTree
from dtm_jax.models.files.weight_names import (
  CONVOLUTION,
  LINEAR,
  NORM,
  SAME,
  TRANSPOSED,
  Layout,
  Rules,
  layers,
  with_attention,
)

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

# Its attention has separate query, key and value, which `split_qkv` makes from our fused map.
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


def is_student(params: PyTree) -> bool:
  """Return whether the parameters are a student's; a classifier has no mask token."""
  return "mask_token" in params


def authors_rules(params: PyTree) -> Rules:
  """Return the rules of the authors' names for these parameters."""
  return STUDENT if is_student(params) else CLASSIFIER


def split_qkv(params: PyTree) -> PyTree:
  """Return the parameters with the fused kernel and the two biases as three linear maps."""

  def split(attention: PyTree) -> PyTree:
    attention = dict(attention)
    fused = attention.pop("qkv")["kernel"]
    q_bias, v_bias = attention.pop("q_bias"), attention.pop("v_bias")
    query, key, value = (np if isinstance(fused, np.ndarray) else jnp).split(fused, 3, axis=-1)
    return attention | {
      "query": {"kernel": query, "bias": q_bias},
      "key": {"kernel": key},
      "value": {"kernel": value, "bias": v_bias},
    }

  return with_attention(params, split)


def fuse_qkv(params: PyTree) -> PyTree:
  """Return the inverse of `split_qkv` for NumPy arrays."""

  def fuse(attention: PyTree) -> PyTree:
    attention = dict(attention)
    query, key, value = (attention.pop(name) for name in ("query", "key", "value"))
    kernel = np.concatenate([query["kernel"], key["kernel"], value["kernel"]], axis=-1)
    return attention | {"qkv": {"kernel": kernel}, "q_bias": query["bias"], "v_bias": value["bias"]}

  return with_attention(params, fuse)
