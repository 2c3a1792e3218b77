"""Frozen teachers. A new one is a file here with `build(**options) -> Teacher`."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dtm_jax.arrays import Array, Float, PyTree
from dtm_jax.errors import OptionError
from dtm_jax.models.files import preprocessors, weight_files
from dtm_jax.models.files.weight_files import Found
from dtm_jax.models.frozen_vit import (
  author_files as frozen_vit_authors,
)
from dtm_jax.models.frozen_vit import (
  model as frozen_vit,
)
from dtm_jax.models.frozen_vit import (
  weights as frozen_vit_weights,
)
from dtm_jax.models.layers import grid_of
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import transfer as vit_transfer
from dtm_jax.normalizations import Triple, mean_and_std

Normalization = str | Sequence[Sequence[float]]


@dataclasses.dataclass(frozen=True)
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
    missing: a message that asks for what neither files nor options tell; None if nothing is missing. Without
      it the teacher cannot be applied.
    resized: image size -> the same teacher for images of that size. Nothing is read again. None: the teacher
      knows only its own size.
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
  missing: str | None = None
  resized: Callable[[int], "Teacher"] | None = None


def at_any_size(image_size: int, *, patch_size: int, **attributes) -> Teacher:
  """Return a teacher whose tower resizes its positions itself, for images of `image_size` pixels.

  Raises:
    ValueError: the image is not a whole number of patches.
  """

  def resized(size: int) -> Teacher:
    grid = grid_of((size, size, 3), patch_size)
    return Teacher(image_size=size, patch_size=patch_size, grid=grid, resized=resized, **attributes)

  return resized(image_size)


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
  heads: int | None = None,
  weights: str | None = None,
) -> Teacher:
  """Build any teacher of `models.frozen_vit`; see `build` of one of them."""
  found = weight_files.find(path, revision=revision, weights=weights)
  config, params = frozen_vit_weights.load(found, model_types, heads=heads)
  tower = frozen_vit.FrozenViT(config, dtype, attention)
  mean, std = mean_and_std_of(normalization, found, default_normalization)
  return at_any_size(
    image_size or config.image_size,
    patch_size=config.patch_size,
    name=f"{model_types[0]} {path}",
    params=params,
    tokens=lambda params, image_BHW3: tower.apply({"params": params}, image_BHW3)["patch_tokens"],
    width=config.tower.width,
    mean=mean,
    std=std,
    cls=(lambda params, image_BHW3: tower.apply({"params": params}, image_BHW3)["cls"])
    if config.class_token
    else None,
    missing=frozen_vit_authors.what_is_missing(config, str(found.file)),
  )


def of_student(
  name: str,
  model: vit.VisionTransformer,
  params: PyTree,
  *,
  grid: tuple[int, int],
  image_size: int | None,
  mean: Triple,
  std: Triple,
) -> Teacher:
  """Return the tokens of a frozen student after its final LayerNorm; no patch is hidden.

  Args:
    grid: of the patches that `params` was trained on.
    image_size: None keeps that grid; otherwise positions and relative biases are resized as for a student
      that goes on at this size (`vit_transfer.resize_positions`).

  Raises:
    OptionError: the image is not a whole number of patches.
  """
  own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)

  def resized(size: int) -> Teacher:
    new_grid = grid_of((size, size, 3), model.patch_size)

    def output(params: PyTree, image_BHW3: Float[Array, "B H W 3"]) -> dict[str, Array]:
      height, width = image_BHW3.shape[1:3]
      if (height, width) != (size, size):  # its tables of positions are of this grid
        raise OptionError(f"Teacher {name!r} takes images of {size}x{size}, not {height}x{width}.")
      return model.apply({"params": params}, image_BHW3)

    return Teacher(
      name=name,
      params=vit_transfer.resize_positions(own, new_grid, grid),
      tokens=lambda params, image_BHW3: output(params, image_BHW3)["patches"],
      image_size=size,
      patch_size=model.patch_size,
      grid=new_grid,
      width=model.width,
      mean=mean,
      std=std,
      cls=lambda params, image_BHW3: output(params, image_BHW3)["cls"],
      resized=resized,
    )

  return resized(image_size or grid[0] * model.patch_size)


def mean_and_std_of(normalization: Normalization | None, found: Found, default: str) -> tuple[Triple, Triple]:
  """Return a pair (mean, std), a named one, or for None what the files beside the weights say.

  See `preprocessors.mean_and_std`, which takes the named `default` for what no file says.

  Raises:
    UnreadableFileError: a file beside the weights is damaged.
    OptionError: an unknown name, or no pair of three numbers each.
  """
  if normalization is None:
    return preprocessors.mean_and_std(found, default)
  return mean_and_std(normalization)
