"""Load CLIP's weights from any common file, and save them under the names of `transformers`.

    config, params = load("openai/clip-vit-base-patch16")     # or a folder, or a file: ViT-B-16.pt
    config, params = from_arrays(tensors)                     # {name: array} in OpenAI's names
    save(folder, config, params)                              # transformers.CLIPModel reads it

Tensors and parameters must match exactly; one error lists all names that do not. `clip.layouts` maps the
names of tensors to parameters.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dtm_jax.arrays import PyTree
from dtm_jax.errors import NotThereError
from dtm_jax.models.clip import config as clip_config
from dtm_jax.models.clip import layouts as clip_layouts
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import shapes as clip_shapes
from dtm_jax.models.clip.shapes import Heads
from dtm_jax.models.files import weight_files, weight_formats, weight_names
from dtm_jax.models.files.file_checks import UnreadableFileError, blaming
from dtm_jax.models.files.weight_files import CONFIG, OPEN_CLIP_CONFIG, PREPROCESSOR, Found
from dtm_jax.models.layers import image_shape, variable_shapes
from dtm_jax.normalizations import NORMALIZATIONS, Triple

RULES = clip_layouts.TRANSFORMERS


def load(
  path_or_repo: str | Path | Found,
  *,
  revision: str | None = None,
  heads: Heads | None = None,
  activation: str | None = None,
) -> tuple[clip.CLIPConfig, PyTree]:
  """Return the configuration and the parameters (NumPy float32) of a CLIP in a file, folder or repository.

  The layout follows from the names of the tensors. The configuration is in config.json or
  open_clip_config.json, in the folder of the weights. OpenAI's files have no such file, so the configuration
  follows from the shapes of the tensors. If heads or activation are unknown, they are then None in the
  configuration (see `clip.shapes`).

  Args:
    path_or_repo: a file, a folder, a repository of the hub, or the result of `weight_files.find`.
    revision: branch, tag or commit of the repository.
    heads: heads of the image tower, or of the image and the text tower.
    activation: "quick_gelu", "gelu" or "gelu_pytorch_tanh".

  Returns:
    The configuration, and {"image", "text", "logit_scale"}, or {"image"} for an image tower alone.

  Raises:
    NotThereError: a file is missing; the message says which, where it was expected and how to get it.
    UnreadableFileError: the file is damaged, or names or shapes do not match; the message lists them.
    OptionError: `heads` or `activation` contradicts the configuration.
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
  """Return the configuration and the parameters from named arrays, as `load` does from a file.

  Args:
    tensors: arrays by their names in any layout. Without `config` the names must be OpenAI's, because only
      their shapes give the configuration. An image tower alone may lack the prefix "visual.".
    source: what to call the arrays in messages.

  Raises:
    UnreadableFileError: names or shapes do not match, or the configuration cannot be told.
  """
  if config is None:
    names = clip_layouts.normalize(tensors)
    if (layout := clip_layouts.recognize(names, source=source)) != "openai":
      raise UnreadableFileError(
        f"{source} has the names of {layout}. Their shapes do not give the configuration: give the config."
      )
    config = _from_shapes(names, tensors, source, heads, activation)
  return config, from_theirs(config, tensors, source=source)


def _config(
  found: Found, layout: str, names: dict, tensors: dict, heads: Heads | None, activation: str | None
) -> clip.CLIPConfig:
  """Return the configuration from the config file, or for OpenAI's names from the shapes."""
  file, openai = found.file, layout == "openai"
  source = found.beside(OPEN_CLIP_CONFIG if openai else CONFIG)
  if source is not None:
    config = clip_config.read_open_clip(source) if openai else clip_config.read(source)
    clip_shapes.check_agrees(config, heads, activation, str(source))
    return config
  if not openai:
    raise NotThereError(
      f"No {CONFIG} beside {file}. The shapes of its tensors do not give the configuration."
    )
  if file.name.startswith("open_clip") and activation is None:
    raise NotThereError(f"No {OPEN_CLIP_CONFIG} beside {file}, which says which GELU the model has.")
  return _from_shapes(names, tensors, str(file), heads, activation)


def _from_shapes(
  names: dict, tensors: dict, source: str, heads: Heads | None, activation: str | None
) -> clip.CLIPConfig:
  if activation is None and "input_resolution" in tensors:
    activation = "quick_gelu"  # only OpenAI's archives have this entry
  shapes = {name: tensor.shape for name, tensor in names.items()}
  return clip_shapes.from_openai(shapes, source=source, heads=heads, activation=activation)


def save(
  folder: str | Path,
  config: clip.CLIPConfig,
  params: PyTree,
  *,
  dtype: str = "float32",
  mean: Triple = NORMALIZATIONS["clip"][0],
  std: Triple = NORMALIZATIONS["clip"][1],
) -> None:
  """Write config.json, model.safetensors and preprocessor_config.json for `load` and `transformers`.

  Args:
    dtype: type of the stored tensors, "float32" or "float16".
    mean, std: normalisation of RGB values in [0, 1] in training.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = to_theirs(jax.device_get(params))
  weight_formats.write_safetensors(folder / "model.safetensors", tensors, dtype)
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
  """Return our parameters from named tensors in any layout of `clip.layouts.LAYOUTS`.

  Raises:
    UnreadableFileError: names or shapes do not match; the message lists all of them after `source`.
  """
  tensors = clip_layouts.normalize(tensors)
  layout = clip_layouts.LAYOUTS[clip_layouts.recognize(tensors, source=source)]
  with blaming(source, " has a configuration that makes no model"):
    expected = jax.eval_shape(layout.fuse, param_shapes(config))
  return layout.split(weight_names.to_ours(tensors, expected, layout.rules, source=source))


def to_theirs(params: PyTree, layout: str = "transformers") -> dict[str, Any]:
  """Return the tensors of a layout from our parameters; the inverse of `from_theirs`."""
  names = clip_layouts.LAYOUTS[layout]
  return weight_names.to_theirs(names.fuse(params), names.rules)


def param_shapes(config: clip.CLIPConfig) -> PyTree:
  """Return the shapes of our parameters."""
  config = clip_shapes.without_unknowns(config)
  image = image_shape(config.image.image_size, config.image.image_size)
  if config.text is None:
    return {"image": variable_shapes(clip.ImageTower(config.image, config.embed_dim), image)["params"]}
  token = jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32)
  return variable_shapes(clip.CLIP(config), image, token)["params"]
