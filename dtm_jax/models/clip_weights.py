"""CLIP from files to our parameters and back, in the names and layouts of `transformers`.

    config, params = load("openai/clip-vit-base-patch16")     # or a folder
    save(folder, config, params)                              # transformers.CLIPModel reads it

Reading is strict: every tensor of the file has its place and every parameter its tensor, or one
error lists all that do not. Torch is never imported. `find` says where the files are, `READERS` how
one becomes {name: array}, `RULES` which name is which parameter.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from dtm_jax.arrays import PyTree
from dtm_jax.models import clip, clip_config
from dtm_jax.normalizations import NORMALIZATIONS, Triple

CONFIG, PREPROCESSOR, TOKENIZER = "config.json", "preprocessor_config.json", "tokenizer.json"
READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {"model.safetensors": load_file}


class Layout(NamedTuple):
  """How a tensor of theirs becomes one of ours, and back."""

  to_ours: Callable
  to_theirs: Callable


SAME = Layout(lambda tensor: tensor, lambda tensor: tensor)
TRANSPOSED = Layout(lambda weight: weight.T, lambda kernel: kernel.T)
CONVOLUTION = Layout(
  lambda weight: rearrange(weight, "d rgb y x -> (y x rgb) d"),
  lambda kernel: rearrange(kernel, "(y x rgb) d -> d rgb y x", rgb=3, y=math.isqrt(kernel.shape[0] // 3)),
)

LINEAR = {"kernel": ("weight", TRANSPOSED), "bias": ("bias", SAME)}
NORM = {"scale": ("weight", SAME), "bias": ("bias", SAME)}
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


def _layers(ours: str, theirs: str, layers: dict) -> dict[str, tuple[str, Layout]]:
  return {
    f"{ours}/{layer}/{leaf}": (f"{theirs}.{name}.{their_leaf}", layout)
    for layer, (name, leaves) in layers.items()
    for leaf, (their_leaf, layout) in leaves.items()
  }


RULES: dict[str, tuple[str, Layout]] = {
  "image/class_embedding": ("vision_model.embeddings.class_embedding", SAME),
  "image/patch_embed/proj/kernel": ("vision_model.embeddings.patch_embedding.weight", CONVOLUTION),
  "image/position_embedding": ("vision_model.embeddings.position_embedding.weight", SAME),
  **_layers("image", "vision_model", {"ln_pre": ("pre_layrnorm", NORM), "ln_post": ("post_layernorm", NORM)}),
  **_layers("image/blocks", "vision_model.encoder.layers.{layer}", BLOCK),
  "image/projection/kernel": ("visual_projection.weight", TRANSPOSED),
  "text/token_embedding": ("text_model.embeddings.token_embedding.weight", SAME),
  "text/position_embedding": ("text_model.embeddings.position_embedding.weight", SAME),
  **_layers("text", "text_model", {"ln_final": ("final_layer_norm", NORM)}),
  **_layers("text/blocks", "text_model.encoder.layers.{layer}", BLOCK),
  "text/projection/kernel": ("text_projection.weight", TRANSPOSED),
  "logit_scale": ("logit_scale", SAME),
}
"""Our path -> their name and the layout of its tensor; `{layer}` where ours is stacked [L, ...]."""


def load(path_or_repo: str | Path, *, revision: str | None = None) -> tuple[clip.CLIPConfig, PyTree]:
  """The configuration and the parameters (NumPy, float32) of a folder or of a repository of the hub.

  The parameters are {"image", "text", "logit_scale"}, or {"image"} for a vision model alone.

  Raises:
    FileNotFoundError: a file is not there; says which, where it was looked for and how to get it.
    ValueError: names or shapes do not match; lists all of them.
  """
  folder = find(path_or_repo, revision=revision)
  config = clip_config.read(folder / CONFIG)
  weights = next(folder / name for name in READERS if (folder / name).exists())
  return config, from_theirs(config, READERS[weights.name](weights), source=str(weights))


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
  ours = _expected(config)
  theirs = jax.eval_shape(to_theirs, ours)
  problems = [f"missing: {name} {tensor.shape}" for name, tensor in theirs.items() if name not in tensors]
  problems += [f"unexpected: {name} {tensor.shape}" for name, tensor in tensors.items() if name not in theirs]
  problems += [
    f"shape of {name}: {tensors[name].shape}, expected {tensor.shape}"
    for name, tensor in theirs.items()
    if name in tensors and tensors[name].shape != tensor.shape
  ]
  if problems:
    raise ValueError(f"{source} does not match its configuration:\n  " + "\n  ".join(problems))

  def ours_of(path, shape):
    name, layout = RULES[path]
    read = lambda name: layout.to_ours(np.asarray(tensors[name], np.float32))
    return (
      np.stack([read(name.format(layer=i)) for i in range(shape[0])]) if "{layer}" in name else read(name)
    )

  flat = {path: ours_of(path, leaf.shape) for path, leaf in flatten_dict(ours, sep="/").items()}
  return unflatten_dict(flat, sep="/")


def to_theirs(params: PyTree) -> dict[str, Any]:
  """Their named tensors from our parameters; the inverse of `from_theirs`."""
  tensors = {}
  for path, leaf in flatten_dict(params, sep="/").items():
    name, layout = RULES[path]
    if "{layer}" in name:
      tensors |= {name.format(layer=i): layout.to_theirs(leaf[i]) for i in range(leaf.shape[0])}
    else:
      tensors[name] = layout.to_theirs(leaf)
  return tensors


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


def find(path_or_repo: str | Path, *, revision: str | None = None) -> Path:
  """The folder that holds the files: the given one, or the snapshot of a repository in the hub's cache.

  The network is asked only for what the cache lacks, and never where HF_HUB_OFFLINE is set.

  Raises:
    FileNotFoundError: the configuration or the weights are not there.
  """
  folder = Path(path_or_repo).expanduser()
  if folder.is_dir():
    if missing := _missing(folder):
      raise FileNotFoundError(f"No {missing} in the folder {folder}. {_HOW_TO_GET.format(repo='OWNER/NAME')}")
    return folder
  repo = str(path_or_repo)
  if repo.startswith(("/", "~", ".")) or repo.count("/") != 1:
    raise FileNotFoundError(f"There is no folder {folder}, and {repo!r} is not a repository 'owner/name'.")

  def snapshot(local_files_only: bool) -> Path:
    files = [*READERS, CONFIG, PREPROCESSOR, TOKENIZER]
    options = {"revision": revision, "allow_patterns": files, "local_files_only": local_files_only}
    return Path(snapshot_download(repo, **options))

  missing, reason = " and no ".join([CONFIG, *READERS]), None
  for local_files_only in (True,) if constants.HF_HUB_OFFLINE else (True, False):
    try:
      folder = snapshot(local_files_only)
      missing = _missing(folder)
      if not missing:
        return folder
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
      reason = error
  looked = f"{repo!r} (revision {revision or 'main'}) in the hub's cache {constants.HF_HUB_CACHE}"
  hub = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub did not give it"
  raise FileNotFoundError(f"No {missing} of {looked}, and {hub}. {_HOW_TO_GET.format(repo=repo)}") from reason


_HOW_TO_GET = (
  "On a machine with network, run `hf download {repo}`, or, with torch, where it has no safetensors, "
  "`transformers.CLIPModel.from_pretrained('{repo}').save_pretrained(folder)`; then copy the folder."
)


def _missing(folder: Path) -> str:
  weights = any((folder / name).exists() for name in READERS)
  names = ([] if (folder / CONFIG).exists() else [CONFIG]) + ([] if weights else [" or ".join(READERS)])
  return " and no ".join(names)
