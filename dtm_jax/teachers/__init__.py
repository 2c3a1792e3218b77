"""Frozen teachers. A new one is a file here with `build(**options) -> Teacher`."""

from collections.abc import Callable
from dataclasses import dataclass

from dtm_jax.arrays import Array, Float, PyTree


@dataclass(frozen=True)
class Teacher:
  """A frozen network that turns images into one token for each patch.

  Attributes:
    name: for messages.
    params: its parameters, NumPy float32; an argument of the train step, never saved.
    tokens: (params, image_BHW3) -> float32 [B, N, C], the images normalised by `mean` and `std`.
    image_size, patch_size, grid: pixels of a side, of a patch, and (rows, columns) of patches.
    width: C.
    mean, std: what the network expects its RGB input in [0, 1] to be normalised by.
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
