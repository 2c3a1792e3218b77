"""What the teachers DINOv2, MAE and SigLIP share: build a teacher from any tower of `models.frozen_vit`."""

import dataclasses
from collections.abc import Sequence

from dtm_jax.arrays import Array, Float, PyTree
from dtm_jax.models.files import weight_files
from dtm_jax.models.frozen_vit import weights as frozen_vit_weights
from dtm_jax.models.frozen_vit.author_files import missing_heads
from dtm_jax.models.frozen_vit.model import FrozenViT
from dtm_jax.teachers import Normalization, Teacher, at_any_size, first_blocks, mean_and_std_of


def build_frozen_vit(
  path: str,
  model_types: Sequence[str],
  default_normalization: str,
  *,
  revision: str | None,
  normalization: Normalization | None,
  dtype: str,
  attention: str,
  stream_dtype: str,
  image_size: int | None,
  layer: int | None,
  weights: str | None,
  heads: int | None = None,
) -> Teacher:
  """Return a teacher with the patch tokens after the final LayerNorm, of the tower's width.

  Args:
    model_types: the accepted keys of `frozen_vit.config.FAMILIES`; the first one names the teacher.
    default_normalization: name of the normalisation that fills what the files do not say.

  The other options and the errors are those of `dtm_jax.teachers`.
  """
  found = weight_files.find(path, revision=revision, weights=weights)
  config, params = frozen_vit_weights.load(found, model_types, heads=heads)
  params, depth = first_blocks(params, config.tower.depth, layer)
  config = dataclasses.replace(config, tower=dataclasses.replace(config.tower, depth=depth))
  tower = FrozenViT(config, dtype, attention, stream_dtype)
  mean, std = mean_and_std_of(normalization, found, default_normalization)

  def patch_tokens(params: PyTree, image_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B N C"]:
    return tower.apply({"params": params}, image_BHW3)["patch_tokens"]

  def class_token(params: PyTree, image_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B C"]:
    return tower.apply({"params": params}, image_BHW3)["cls"]

  return at_any_size(
    image_size or config.image_size,
    grid=config.grid,
    name=f"{model_types[0]} {path}",
    params=params,
    apply=patch_tokens,
    patch_size=config.patch_size,
    width=config.tower.width,
    mean=mean,
    std=std,
    cls=class_token if config.class_token else None,
    missing=missing_heads(config, str(found.file)),
  )
