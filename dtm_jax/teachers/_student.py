"""What the teachers BEiT and checkpoint share: build a teacher from a student's model and parameters."""

import jax
import numpy as np

from dtm_jax.arrays import Array, Float, PyTree
from dtm_jax.errors import OptionError
from dtm_jax.models.layers import grid_of
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import transfer as vit_transfer
from dtm_jax.normalizations import Triple
from dtm_jax.teachers import Teacher, first_blocks


def of_student(
  name: str,
  model: vit.VisionTransformer,
  params: PyTree,
  *,
  grid: tuple[int, int],
  image_size: int | None,
  layer: int | None,
  mean: Triple,
  std: Triple,
) -> Teacher:
  """Return a teacher with a student's tokens after its final LayerNorm. No patch is hidden.

  Args:
    grid: (rows, columns) of patches of `params`.
    image_size: pixels of a side; None keeps `grid`. For another size, position embeddings and relative
      position biases are resized by `vit.transfer.resize_positions`.
    layer: see `teachers.first_blocks`.
    mean, std: normalisation of RGB values in [0, 1].

  Raises:
    OptionError: the image is not a whole number of patches, or there is no block `layer`.
  """
  params, depth = first_blocks(params, model.depth, layer)
  model = model.clone(depth=depth)
  own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)

  def resized(size: int) -> Teacher:
    new_grid = grid_of((size, size, 3), model.patch_size)

    def outputs(params: PyTree, image_BHW3: Float[Array, "B H W 3"]) -> dict[str, Array]:
      height, width = image_BHW3.shape[1:3]
      if (height, width) != (size, size):  # the tables of positions fit this grid only
        raise OptionError(f"Teacher {name!r} takes images of {size}x{size}, not {height}x{width}.")
      return model.apply({"params": params}, image_BHW3)

    return Teacher(
      name=name,
      params=vit_transfer.resize_positions(own, new_grid, grid),
      apply=lambda params, image_BHW3: outputs(params, image_BHW3)["patches"],
      image_size=size,
      patch_size=model.patch_size,
      grid=new_grid,
      width=model.width,
      mean=mean,
      std=std,
      cls=lambda params, image_BHW3: outputs(params, image_BHW3)["cls"],
      resized=resized,
    )

  return resized(image_size or grid[0] * model.patch_size)
