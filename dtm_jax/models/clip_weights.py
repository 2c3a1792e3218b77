"""CLIP from files to our parameters and back, in the names and layouts of `transformers`.

    config, params = load("openai/clip-vit-base-patch16")     # or a folder
    save(folder, config, params)                              # transformers.CLIPModel reads it

Reading is strict: every tensor of the file has its place and every parameter its tensor, or one
error lists all that do not. `RULES` says which name is which parameter.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dtm_jax.arrays import PyTree
from dtm_jax.models import clip, clip_config, weight_files, weight_names
from dtm_jax.models.weight_files import CONFIG, PREPROCESSOR
from dtm_jax.models.weight_names import CONVOLUTION, LINEAR, NORM, SAME, TRANSPOSED, Rules, layers
from dtm_jax.normalizations import NORMALIZATIONS, Triple

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


RULES: Rules = {
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


def load(path_or_repo: str | Path, *, revision: str | None = None) -> tuple[clip.CLIPConfig, PyTree]:
  """The configuration and the parameters (NumPy, float32) of a folder or of a repository of the hub.

  The parameters are {"image", "text", "logit_scale"}, or {"image"} for a vision model alone.

  Raises:
    FileNotFoundError: a file is not there; says which, where it was looked for and how to get it.
    ValueError: names or shapes do not match; lists all of them.
  """
  folder = weight_files.find(path_or_repo, revision=revision)
  config = clip_config.read(folder / CONFIG)
  tensors, file = weight_files.read(folder)
  return config, from_theirs(config, tensors, source=str(file))


def save(
  folder: str | Path,
  config: clip.CLIPConfig,
  params: PyTree,
  *,
  dtype: str = "float32",
  mean: Triple = NORMALIZATIONS["clip"][0],
  std: Triple = NORMALIZATIONS["clip"][1],
) -> None:
  """Writes config.json, model.safetensors and preprocessor_config.json for `load` and `transformers`.

  Args:
    dtype: of the stored tensors, "float32" or "float16".
    mean, std: the normalisation that the model was trained with.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  # safetensors writes the buffer as it lies in memory, so a transposed view must become an array.
  tensors = {
    name: np.array(tensor, dtype, order="C") for name, tensor in to_theirs(jax.device_get(params)).items()
  }
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  size = config.image.image_size
  preprocessor = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": size},
    "crop_size": {"height": size, "width": size},
    "image_mean": list(mean),
    "image_std": list(std),
  }
  (folder / PREPROCESSOR).write_text(json.dumps(preprocessor, indent=2))
  clip_config.write(folder / CONFIG, config)


def from_theirs(config: clip.CLIPConfig, tensors: dict[str, np.ndarray], *, source: str) -> PyTree:
  """Our parameters from their named tensors.

  Raises:
    ValueError: lists every missing, unexpected and mis-shaped name; `source` says of what.
  """
  tensors = {_full_name(name): tensor for name, tensor in tensors.items() if "position_ids" not in name}
  return weight_names.to_ours(tensors, _expected(config), RULES, source=source)


def to_theirs(params: PyTree) -> dict[str, Any]:
  """Their named tensors from our parameters; the inverse of `from_theirs`."""
  return weight_names.to_theirs(params, RULES)


def _full_name(name: str) -> str:
  """transformers 5 writes a CLIPVisionModel without the prefix that all other files have."""
  bare = name.startswith(("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm."))
  return f"vision_model.{name}" if bare else name


def _expected(config: clip.CLIPConfig) -> PyTree:
  """The shapes of our parameters."""
  image = jax.ShapeDtypeStruct((1, config.image.image_size, config.image.image_size, 3), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  if config.text is None:
    tower = clip.ImageTower(config.image, config.embed_dim)
    return {"image": jax.eval_shape(tower.init, key, image)["params"]}
  token = jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32)
  return jax.eval_shape(clip.CLIP(config).init, key, image, token)["params"]
