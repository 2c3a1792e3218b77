"""Frozen teachers. A new one is a file here with `build(**options) -> Teacher`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtm_jax.arrays import Array, Float, PyTree
from dtm_jax.models import frozen_vit, frozen_vit_weights, vit, weight_files
from dtm_jax.models.layers import grid_of
from dtm_jax.normalizations import Triple, mean_and_std

Normalization = str | Sequence[Sequence[float]]


@dataclass(frozen=True)
class Teacher:
  """A frozen network that turns images into one token for each patch.

  Attributes:
    name: for messages.
    params: its parameters, NumPy float32; an argument of the train step, never saved.
    tokens: (params, image_BHW3) -> float32 [B, N, C], row by row, the images normalised by `mean` and `std`;
      a ValueError for a size that it cannot see.
    image_size, patch_size, grid: pixels of a side, of a patch, and (rows, columns) of patches.
    width: C.
    mean, std: what the network expects its RGB input in [0, 1] to be normalised by.
    cls: as `tokens`, what it makes of its class token, [B, _]; None without such a token.
  """

  name: str
  params: PyTree
  tokens: Callable[[PyTree, Float[Array, "B H W 3"]], Float[Array, "B N C"]]
  image_size: int
  patch_size: int
  grid: tuple[int, int]
  width: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  cls: Callable[[PyTree, Float[Array, "B H W 3"]], Float[Array, "B _"]] | None = None


def build_frozen_vit(
  path: str,
  *,
  model_types: Sequence[str],
  default_normalization: str,
  revision: str | None,
  normalization: Normalization | None,
  dtype: str,
  attention: str,
  image_size: int | None,
) -> Teacher:
  """What the teachers of `models.frozen_vit` have in common; see `build` of one of them."""
  found = weight_files.find(path, revision=revision)
  config, params = frozen_vit_weights.load(found, model_types)
  tower = frozen_vit.FrozenViT(config, dtype, attention)
  image_size = image_size or config.image_size
  mean, std = mean_and_std_of(normalization, found, default_normalization)
  return Teacher(
    name=f"{model_types[0]} {path}",
    params=params,
    tokens=lambda params, image_BHW3: tower.apply({"params": params}, image_BHW3)["patch_tokens"],
    image_size=image_size,
    patch_size=config.patch_size,
    grid=grid_of((image_size, image_size, 3), config.patch_size),
    width=config.tower.width,
    mean=mean,
    std=std,
    cls=(lambda params, image_BHW3: tower.apply({"params": params}, image_BHW3)["cls"])
    if config.class_token
    else None,
  )


def of_student(
  name: str, model: vit.VisionTransformer, params: PyTree, image_size: int, mean: Triple, std: Triple
) -> Teacher:
  """The tokens of a frozen student after its final LayerNorm; no patch is hidden."""

  def output(params: PyTree, image_BHW3: Float[Array, "B H W 3"]) -> dict[str, Array]:
    height, width = image_BHW3.shape[1:3]
    if (height, width) != (image_size, image_size):  # its tables of positions are of this grid
      raise ValueError(f"Teacher {name!r} takes images of {image_size}x{image_size}, not {height}x{width}.")
    return model.apply({"params": params}, image_BHW3)

  return Teacher(
    name=name,
    params=params,
    tokens=lambda params, image_BHW3: output(params, image_BHW3)["patches"],
    image_size=image_size,
    patch_size=model.patch_size,
    grid=grid_of((image_size, image_size, 3), model.patch_size),
    width=model.width,
    mean=mean,
    std=std,
    cls=lambda params, image_BHW3: output(params, image_BHW3)["cls"],
  )


def mean_and_std_of(normalization: Normalization | None, path: Path, default: str) -> tuple[Triple, Triple]:
  """A pair (mean, std), a named one, or for None what the files beside the weights say.

  These are preprocessor_config.json or open_clip's configuration in the folder, or beside the file, `path`;
  without them None is the named `default`.
  """
  if normalization is None:
    normalization = _said_beside(path.parent if path.is_file() else path) or default
  if isinstance(normalization, str):
    return mean_and_std(normalization)
  mean, std = normalization
  return tuple(mean), tuple(std)


def _said_beside(folder: Path) -> Normalization | None:
  transformers, open_clip = folder / weight_files.PREPROCESSOR, folder / weight_files.OPEN_CLIP_CONFIG
  if transformers.exists():
    content = json.loads(transformers.read_text())
    return [content["image_mean"], content["image_std"]]
  content = json.loads(open_clip.read_text()).get("preprocess_cfg", {}) if open_clip.exists() else {}
  return [content["mean"], content["std"]] if {"mean", "std"} <= content.keys() else None
