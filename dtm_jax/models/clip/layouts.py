"""The names and the axes of CLIP's tensors in other libraries: a table of rules for each layout.

`transformers` and our towers have three linear maps for query, key and value. OpenAI's and open_clip's files
have one map with their outputs in this order, so `fuse_qkv` brings our parameters into that form.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from einops import rearrange

from dtm_jax.arrays import PyTree
from dtm_jax.models.files.file_checks import UnreadableFileError
from dtm_jax.models.files.weight_names import (
  CONVOLUTION,
  LINEAR,
  NORM,
  SAME,
  TRANSPOSED,
  Layout,
  Rules,
  fuse_qkv,
  layers,
  split_qkv,
)

FLAX_CONVOLUTION = Layout(
  lambda kernel: rearrange(kernel, "y x rgb d -> (y x rgb) d"),
  lambda kernel: CONVOLUTION.to_theirs(kernel).transpose(2, 3, 1, 0),
)

BLOCK = {
  "ln1": ("layer_norm1", NORM),
  "attn/query": ("self_attn.q_proj", LINEAR),
  "attn/key": ("self_attn.k_proj", LINEAR),
  "attn/value": ("self_attn.v_proj", LINEAR),
  "attn/out": ("self_attn.out_proj", LINEAR),
  "ln2": ("layer_norm2", NORM),
  "mlp/fc1": ("mlp.fc1", LINEAR),
  "mlp/fc2": ("mlp.fc2", LINEAR),
}
TRANSFORMERS: Rules = {
  "image/class_embedding": ("vision_model.embeddings.class_embedding", SAME),
  "image/patch_embed/proj/kernel": ("vision_model.embeddings.patch_embedding.weight", CONVOLUTION),
  "image/position_embedding": ("vision_model.embeddings.position_embedding.weight", SAME),
  **layers("image", "vision_model", {"ln_pre": ("pre_layrnorm", NORM), "ln_post": ("post_layernorm", NORM)}),
  **layers("image/blocks", "vision_model.encoder.layers.{layer}", BLOCK),
  "image/projection/kernel": ("visual_projection.weight", TRANSPOSED),
  "text/token_embedding": ("text_model.embeddings.token_embedding.weight", SAME),
  "text/position_embedding": ("text_model.embeddings.position_embedding.weight", SAME),
  **layers("text", "text_model", {"ln_final": ("final_layer_norm", NORM)}),
  **layers("text/blocks", "text_model.encoder.layers.{layer}", BLOCK),
  "text/projection/kernel": ("text_projection.weight", TRANSPOSED),
  "logit_scale": ("logit_scale", SAME),
}

_FUSED: Rules = {"kernel": ("in_proj_weight", TRANSPOSED), "bias": ("in_proj_bias", SAME)}
_OPENAI_LINEARS = {
  "ln1": ("ln_1", NORM),
  "attn/out": ("attn.out_proj", LINEAR),
  "ln2": ("ln_2", NORM),
  "mlp/fc1": ("mlp.c_fc", LINEAR),
  "mlp/fc2": ("mlp.c_proj", LINEAR),
}


def _openai_blocks(ours: str, theirs: str) -> Rules:
  block = f"{theirs}.{{layer}}"
  fused = {
    f"{ours}/attn/qkv/{leaf}": (f"{block}.attn.{name}", layout) for leaf, (name, layout) in _FUSED.items()
  }
  return layers(ours, block, _OPENAI_LINEARS) | fused


OPENAI: Rules = {
  "image/class_embedding": ("visual.class_embedding", SAME),
  "image/patch_embed/proj/kernel": ("visual.conv1.weight", CONVOLUTION),
  "image/position_embedding": ("visual.positional_embedding", SAME),
  **layers("image", "visual", {"ln_pre": ("ln_pre", NORM), "ln_post": ("ln_post", NORM)}),
  **_openai_blocks("image/blocks", "visual.transformer.resblocks"),
  "image/projection/kernel": ("visual.proj", SAME),
  "text/token_embedding": ("token_embedding.weight", SAME),
  "text/position_embedding": ("positional_embedding", SAME),
  "text/ln_final/scale": ("ln_final.weight", SAME),
  "text/ln_final/bias": ("ln_final.bias", SAME),
  **_openai_blocks("text/blocks", "transformer.resblocks"),
  "text/projection/kernel": ("text_projection", SAME),
  "logit_scale": ("logit_scale", SAME),
}


def _flax(path: str, name: str, layout: Layout) -> tuple[str, Layout]:
  """Return the rule of transformers' Flax module from that of its PyTorch module.

  Its names have slashes, and "scale" or "embedding" in place of "weight". Its kernels have our axes.
  """
  leaf = path.rpartition("/")[2]
  name = name.replace(".", "/")
  if name.endswith("/weight"):
    name = name.removesuffix("weight") + (leaf if leaf in ("kernel", "scale") else "embedding")
  return name, FLAX_CONVOLUTION if layout is CONVOLUTION else SAME


FLAX: Rules = {path: _flax(path, name, layout) for path, (name, layout) in TRANSFORMERS.items()}


class Names(NamedTuple):
  """One layout.

  Attributes:
    prefixes: prefixes of tensor names that only this layout has.
    rules: names and axes of the tensors.
    fuse: converts our parameters to the structure of the layout.
    split: the inverse of `fuse`.
  """

  prefixes: tuple[str, ...]
  rules: Rules
  fuse: Callable[[PyTree], PyTree] = lambda params: params
  split: Callable[[PyTree], PyTree] = lambda params: params


def _each_tower(change: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
  return lambda params: {
    name: change(part) if name in ("image", "text") else part for name, part in params.items()
  }


LAYOUTS: dict[str, Names] = {
  "transformers": Names(("vision_model.", "text_model."), TRANSFORMERS),
  "openai": Names(("visual.transformer.resblocks.",), OPENAI, _each_tower(fuse_qkv), _each_tower(split_qkv)),
  "flax": Names(("vision_model/", "text_model/"), FLAX),
}

_BARE_TRANSFORMERS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
_BUFFERS = ("position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")


def normalize(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return the tensors under the full names of a layout, without buffers that the sizes determine.

  transformers 5 writes a CLIPVisionModel without the prefix "vision_model.". An image tower in OpenAI's names
  may lack "visual.". open_clip's CustomTextCLIP adds "text." to the names of its text tower.
  """
  tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFERS)}
  if {"class_embedding", "conv1.weight"} & tensors.keys():
    return {f"visual.{name}": tensor for name, tensor in tensors.items()}

  def full(name: str) -> str:
    return f"vision_model.{name}" if name.startswith(_BARE_TRANSFORMERS) else name.removeprefix("text.")

  return {full(name): tensor for name, tensor in tensors.items()}


def recognize(names: Iterable[str], *, source: str) -> str:
  """Return the layout of these names, a key of LAYOUTS.

  Raises:
    UnreadableFileError: no layout has such names; the message lists some of them.
  """
  names = list(names)
  for layout, description in LAYOUTS.items():
    if any(name.startswith(description.prefixes) for name in names):
      return layout
  raise UnreadableFileError(
    f"{source} is no CLIP in a known layout ({', '.join(LAYOUTS)}). It has {', '.join(names[:8])} ..."
  )
