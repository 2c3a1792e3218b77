"""CLIP from any file that people have to our parameters, and back in the names of `transformers`.

    config, params = load("openai/clip-vit-base-patch16")     # or a folder, or a file: ViT-B-16.pt
    config, params = from_arrays(tensors)                     # {name: array} in OpenAI's names
    save(folder, config, params)                              # transformers.CLIPModel reads it

Reading is strict: every tensor of the file has its place and every parameter its tensor, or one
error lists all that do not. `clip_layouts` says which name is which parameter.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dtm_jax.arrays import PyTree
from dtm_jax.errors import NotThereError
from dtm_jax.models.clip import config as clip_config
from dtm_jax.models.clip import layouts as clip_layouts
from dtm_jax.models.clip import model as clip
from dtm_jax.models.files import weight_files, weight_names
from dtm_jax.models.files.file_checks import UnreadableFileError, blaming
from dtm_jax.models.files.weight_files import CONFIG, OPEN_CLIP_CONFIG, PREPROCESSOR, Found
from dtm_jax.normalizations import NORMALIZATIONS, Triple

RULES = clip_layouts.TRANSFORMERS


Heads = int | tuple[int, int]


def load(
  path_or_repo: str | Path | Found,
  *,
  revision: str | None = None,
  heads: Heads | None = None,
  activation: str | None = None,
) -> tuple[clip.CLIPConfig, PyTree]:
  """Return the configuration and the parameters (NumPy, float32) of a file, a folder or a repository.

  The names of the tensors tell the layout. The configuration is the config.json beside them, or
  open_clip_config.json. OpenAI's files have none: their shapes tell it but for heads and activation, which
  are None in the configuration where they are not known (see `clip_config`).
  The parameters are {"image", "text", "logit_scale"}, or {"image"} for a vision model alone.

  Args:
    heads: of the image tower, or of the image and the text tower.
    activation: "quick_gelu", "gelu" or "gelu_pytorch_tanh".

  Raises:
    NotThereError: a file is not there; says which, where it was looked for and how to get it.
    UnreadableFileError: the file is damaged, or names or shapes do not match; lists all of them.
    OptionError: `heads` or `activation` differs from what a configuration says.
  """
  found = weight_files.find(path_or_repo, revision=revision)
  tensors = weight_files.read(found)
  names = clip_layouts.normalize(tensors)
  layout = clip_layouts.recognize(names, source=str(found.file))
  config = _config(found, layout, names, tensors, heads, activation)
  return config, from_theirs(config, tensors, source=str(found.file))


def from_arrays(
  tensors: dict[str, np.ndarray],
  config: clip.CLIPConfig | None = None,
  *,
  source: str = "The arrays",
  heads: Heads | None = None,
  activation: str | None = None,
) -> tuple[clip.CLIPConfig, PyTree]:
  """As `load`, of named arrays; without `config` they are OpenAI's, whose shapes tell it.

  An image tower alone may lack the prefix "visual.".

  Raises:
    UnreadableFileError: names or shapes do not match, all listed, or no configuration can be told.
  """
  if config is None:
    names = clip_layouts.normalize(tensors)
    if (layout := clip_layouts.recognize(names, source=source)) != "openai":
      raise UnreadableFileError(
        f"{source} has the names of {layout}, whose shapes do not tell all: give the config."
      )
    config = _from_shapes(names, tensors, source, heads, activation)
  return config, from_theirs(config, tensors, source=source)


def _config(
  found: Found, layout: str, names: dict, tensors: dict, heads: Heads | None, activation: str | None
) -> clip.CLIPConfig:
  file = found.file
  ours, open_clip = found.beside(CONFIG), found.beside(OPEN_CLIP_CONFIG)
  if layout != "openai" and ours is None:
    raise NotThereError(f"No {CONFIG} beside {file}, whose shapes do not tell all that it says.")
  if layout != "openai" or open_clip is not None:
    source, read = (ours, clip_config.read) if layout != "openai" else (open_clip, clip_config.read_open_clip)
    config = read(source)
    clip_config.check_agrees(config, heads, activation, str(source))
    return config
  if file.name.startswith("open_clip") and activation is None:
    raise NotThereError(f"No {OPEN_CLIP_CONFIG} beside {file}: it says which GELU the model has.")
  return _from_shapes(names, tensors, str(file), heads, activation)


def _from_shapes(
  names: dict, tensors: dict, source: str, heads: Heads | None, activation: str | None
) -> clip.CLIPConfig:
  if activation is None and "input_resolution" in tensors:
    activation = "quick_gelu"  # an archive of OpenAI's
  shapes = {name: tensor.shape for name, tensor in names.items()}
  return clip_config.from_openai(shapes, source=source, heads=heads, activation=activation)


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
  """Our parameters from their named tensors, in any of `clip_layouts.LAYOUTS`.

  Raises:
    ValueError: lists every missing, unexpected and mis-shaped name; `source` says of what.
  """
  tensors = clip_layouts.normalize(tensors)
  layout = clip_layouts.LAYOUTS[clip_layouts.recognize(tensors, source=source)]
  with blaming(source, " has a configuration that makes no model"):
    expected = jax.eval_shape(layout.fuse, _expected(config))
  return layout.split(weight_names.to_ours(tensors, expected, layout.rules, source=source))


def to_theirs(params: PyTree, layout: str = "transformers") -> dict[str, Any]:
  """Their named tensors from our parameters; the inverse of `from_theirs`."""
  names = clip_layouts.LAYOUTS[layout]
  return weight_names.to_theirs(names.fuse(params), names.rules)


def _expected(config: clip.CLIPConfig) -> PyTree:
  """The shapes of our parameters."""
  config = clip_config.without_unknowns(config)
  image = jax.ShapeDtypeStruct((1, config.image.image_size, config.image.image_size, 3), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  if config.text is None:
    tower = clip.ImageTower(config.image, config.embed_dim)
    return {"image": jax.eval_shape(tower.init, key, image)["params"]}
  token = jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32)
  return jax.eval_shape(clip.CLIP(config).init, key, image, token)["params"]
