"""Frozen teachers. A new teacher is a file here with a function `build(**options) -> Teacher`.

Teachers share these options:

| option | meaning |
|---|---|
| path | a file, a folder, or a repository of the Hugging Face hub |
| revision | branch, tag or commit of the repository |
| normalization | "imagenet", "clip", "inception", or a pair (mean, std) of three numbers each |
| dtype | type of the matrix products |
| attention | "xla", or "cudnn" (GPUs, half precision) |
| image_size | pixels of a side. The positions are resized if it is not the checkpoint's size |
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
from collections.abc import Callable, Sequence
from typing import Any

from dtm_jax.arrays import Array, Float, PyTree
from dtm_jax.models.files import preprocessors
from dtm_jax.models.files.weight_files import Found
from dtm_jax.models.layers import grid_of
from dtm_jax.normalizations import Triple, mean_and_std

Normalization = str | Sequence[Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A frozen network that turns images into one token for each patch.

  Attributes:
    name: name for messages.
    params: parameters, NumPy float32. They are an argument of the train step and never saved.
    tokens: from (params, image_BHW3) to float32 tokens [B, N, C] in row-major order. The images must be
      normalised by `mean` and `std`. Raises an OptionError for an image size that the network cannot see.
    image_size, patch_size: pixels of a side.
    grid: (rows, columns) of patches.
    width: C.
    mean, std: normalisation of RGB values in [0, 1] that the network expects.
    cls: from the same arguments to the output of the class token [B, _]; None without a class token.
    missing: a message that asks for an option that neither the files nor the user gave, or None. A teacher
      with such a message cannot be applied.
    resized: from an image size to the same teacher for images of that size, without another reading of files.
      None if the teacher knows only its own size.
  """

  name: str
  params: PyTree
  tokens: Callable[[PyTree, Float[Array, "B H W 3"]], Float[Array, "B N C"]]
  image_size: int
  patch_size: int
  grid: tuple[int, int]
  width: int
  mean: Triple
  std: Triple
  cls: Callable[[PyTree, Float[Array, "B H W 3"]], Float[Array, "B _"]] | None = None
  missing: str | None = None
  resized: Callable[[int], "Teacher"] | None = None


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


def mean_and_std_of(normalization: Normalization | None, found: Found, default: str) -> tuple[Triple, Triple]:
  """Return the mean and the standard deviation that the option `normalization` means for these weights.

  Args:
    normalization: a name, a pair (mean, std), or None for what the files beside the weights say.
    default: name of the normalisation that fills what no file says (see `preprocessors.mean_and_std`).

  Raises:
    UnreadableFileError: a file beside the weights is damaged.
    OptionError: the name is unknown, or the pair does not have three numbers each.
  """
  if normalization is None:
    return preprocessors.mean_and_std(found, default)
  return mean_and_std(normalization)
