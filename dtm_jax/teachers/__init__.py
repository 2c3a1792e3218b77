"""Frozen teachers. A new teacher is a file here with a function `build(**options) -> Teacher`.

Teachers share these options:

| option | meaning |
|---|---|
| path | a file, a folder, or a repository of the Hugging Face hub |
| revision | branch, tag or commit of the repository |
| normalization | "imagenet", "clip", "inception", or a pair (mean, std) of three numbers each |
| dtype | type of the matrix products |
| attention | "xla", "cudnn" or "pallas" (see `models.attention`) |
| stream_dtype | type of the residual stream |
| image_size | pixels of a side. The positions are resized if it is not the checkpoint's size |
| layer | the block after which the tokens are taken (see `first_blocks`) |
| heads | number of attention heads, needed only if the files do not give it |
| weights | the container of the model, if the file holds several models (see `files.checkpoint_contents`) |

If `normalization` is not set, the files next to the weights give it. Without such a file, the default of the
family is used.

All functions `build` raise the same errors:

| error | meaning |
|---|---|
| OptionError | an option is unknown or missing, or the image is not a whole number of patches |
| UnreadableFileError | the files are damaged or hold another model, or names or shapes do not match |
| NotThereError | a file is missing |
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dtm_jax.arrays import Array, Float, PyTree
from dtm_jax.augment import normalize, resize_to, to_float
from dtm_jax.errors import OptionError
from dtm_jax.models.files import preprocessors
from dtm_jax.models.files.weight_files import Found
from dtm_jax.models.layers import grid_of
from dtm_jax.normalizations import Triple, mean_and_std

Normalization = str | Sequence[Sequence[float]]
ROUNDING = 1e-3
"""How far a float image may lie outside of 0 to 1, after an interpolation for example."""


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A frozen network that turns images into one token for each patch.

  `tokens(images)` is for direct use. A train step passes the parameters as an argument and calls
  `apply(params, prepare(image))`.

  >>> teacher = dtm_jax.load_teacher("clip", "assets/tiny_clip_cifar10")
  >>> teacher.tokens(np.zeros((2, 32, 32, 3), np.uint8)).shape
  (2, 64, 64)
  >>> teacher.grid, teacher.width
  ((8, 8), 64)

  Attributes:
    name: name for messages.
    params: parameters, NumPy float32. They are an argument of the train step and never saved.
    apply: the pure function from (params, image_BHW3) to float32 tokens [B, N, C] in row-major order. The
      images must be normalised by `mean` and `std`, as `prepare` does it. Raises an OptionError for an image
      size that the network cannot see.
    image_size, patch_size: pixels of a side.
    grid: (rows, columns) of patches.
    width: C.
    mean, std: normalisation of RGB values in [0, 1] that the network expects.
    cls: from the same arguments as `apply` to the output of the class token [B, _]; None without a class
      token.
    missing: a message that asks for an option that neither the files nor the user gave, or None. A teacher
      with such a message cannot be applied.
    resized: from an image size to the same teacher for images of that size, without another reading of files.
      None if the teacher knows only its own size.
  """

  name: str
  params: PyTree
  apply: Callable[[PyTree, Float[Array, "B H W 3"]], Float[Array, "B N C"]]
  image_size: int
  patch_size: int
  grid: tuple[int, int]
  width: int
  mean: Triple
  std: Triple
  cls: Callable[[PyTree, Float[Array, "B H W 3"]], Float[Array, "B _"]] | None = None
  missing: str | None = None
  resized: Callable[[int], "Teacher"] | None = None

  def tokens(self, images: Any, *normalised: Any) -> Float[Array, "B N C"]:
    """Return the tokens of images: one for each patch of `grid`, row by row.

    The function normalises the images by `mean` and `std`. It resizes images that are not of `image_size`
    pixels. To see them at another size, use `teacher.resized(size).tokens(images)`. The first call compiles
    the network, and each new shape of the images compiles it again.

    >>> image = jax.random.uniform(jax.random.key(0), (1, 48, 48, 3))
    >>> teacher = dtm_jax.load_teacher("clip", "assets/tiny_clip_cifar10")
    >>> teacher.tokens(image).shape, teacher.resized(48).tokens(image).shape
    ((1, 64, 64), (1, 144, 64))

    Args:
      images: square RGB images [B, H, H, 3], uint8, or float from 0 to 1. Not normalised.
      normalised: a call with (params, normalised images) means `apply`, as in earlier versions.

    Raises:
      TypeError: the images have another type.
      ValueError: the images have another shape, or values outside of 0 to 1.
      OptionError: the teacher lacks an option (see `missing`).
    """
    if normalised:  # the call of earlier versions
      warnings.warn(
        "tokens(params, normalised images) is teacher.apply now", DeprecationWarning, stacklevel=2
      )
      return self.apply(images, *normalised)
    if self.missing:
      raise OptionError(self.missing)
    return self._jitted(self._params_on_device, _checked_images(images))

  def prepare(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B side side 3"]:
    """Resize and normalise square images with values from 0 to 1 as the network expects them.

    >>> teacher = dtm_jax.load_teacher("clip", "assets/tiny_clip_cifar10")
    >>> image = jax.random.uniform(jax.random.key(0), (1, 48, 48, 3))
    >>> teacher.apply(teacher.params, teacher.prepare(image)).shape
    (1, 64, 64)
    """
    return normalize(resize_to(image, self.image_size), self.mean, self.std)

  @functools.cached_property
  def _jitted(self) -> Callable[[PyTree, Array], Array]:
    def tokens(params: PyTree, images: Array) -> Array:
      pixels = to_float(images) if images.dtype == jnp.uint8 else images.astype(jnp.float32)
      return self.apply(params, self.prepare(pixels))

    return jax.jit(tokens)

  @functools.cached_property
  def _params_on_device(self) -> PyTree:
    with jax.ensure_compile_time_eval():  # an array, even if the first call is inside of a jitted function
      return jax.tree.map(jnp.asarray, self.params)


def _checked_images(images: Any) -> Array:
  """Return the images as an array of JAX. See `Teacher.tokens` for the errors."""
  if not isinstance(images, np.ndarray | jax.Array):
    raise TypeError(
      f"teacher.tokens takes an array of images, not {type(images).__name__}: use np.asarray(images). "
      "The function of (params, normalised images) is teacher.apply."
    )
  if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
    raise ValueError(f"Images must be square, [B, H, H, 3], but their shape is {images.shape}.")
  if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
    raise TypeError(f"Images must be uint8, or float with values from 0 to 1, not {images.dtype}.")
  if images.dtype != np.uint8 and images.size and not isinstance(images, jax.core.Tracer):
    low, high = float(images.min()), float(images.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # also if a value is NaN
      raise ValueError(
        f"Float images must have values from 0 to 1, but theirs are {low:.4g} to {high:.4g}. "
        "teacher.tokens normalises by itself; normalised images are for teacher.apply(params, images)."
      )
  return jnp.asarray(images)


def at_any_size(
  image_size: int,
  *,
  patch_size: int,
  grid: Callable[[tuple[int, ...]], tuple[int, int]] | None = None,
  **attributes: Any,
) -> Teacher:
  """Return a teacher for images of `image_size` pixels whose tower resizes its positions itself.

  Args:
    grid: from the shape of an image [H, W, 3] to the (rows, columns) of its patches. By default, the patch
      size must divide the image size.
    attributes: the other attributes of `Teacher`.

  Raises:
    OptionError: the image is not a whole number of patches.
  """
  grid_of_shape = grid or (lambda shape: grid_of(shape, patch_size))

  def resized(size: int) -> Teacher:
    return Teacher(
      image_size=size,
      patch_size=patch_size,
      grid=grid_of_shape((size, size, 3)),
      resized=resized,
      **attributes,
    )

  return resized(image_size)


def first_blocks(params: PyTree, depth: int, layer: int | None) -> tuple[PyTree, int]:
  """Return the parameters and the depth of the tower that ends after block `layer`.

  The later blocks are neither kept nor computed. What follows the blocks, such as the final LayerNorm, stays.

  Args:
    params: the tower's parameters. Those of its blocks are stacked [L, ...] below "blocks".
    depth: L, the number of blocks.
    layer: 1 is the first block and L the last, as in the `hidden_states` of transformers. Negative numbers
      count from the end: -1 is the last block. None means the last block.

  Raises:
    OptionError: the tower has no such block.
  """
  if layer is None:
    return params, depth
  kept = layer + depth + 1 if layer < 0 else layer
  if not 1 <= kept <= depth:
    raise OptionError(
      f"There is no block {layer} in a teacher of {depth} blocks: layer must be from 1 to {depth}, or from "
      f"{-depth} to -1 (the last)."
    )
  return params | {"blocks": jax.tree.map(lambda stacked: stacked[:kept], params["blocks"])}, kept


def mean_and_std_of(normalization: Normalization | None, found: Found, default: str) -> tuple[Triple, Triple]:
  """Return the mean and the standard deviation that the option `normalization` means for these weights.

  Args:
    normalization: a name, a pair (mean, std), or None for what the files beside the weights say.
    default: name of the normalisation for what no file says (see `preprocessors.mean_and_std_in_files`).

  Raises:
    UnreadableFileError: a file beside the weights is damaged.
    OptionError: the name is unknown, or the pair does not have three numbers each.
  """
  if normalization is None:
    return preprocessors.mean_and_std_in_files(found, default)
  return mean_and_std(normalization)
