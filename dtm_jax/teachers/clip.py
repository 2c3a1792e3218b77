"""CLIP (arXiv 2103.00020), from any file that `clip.weights` loads. It is the paper's teacher."""

import dataclasses

from dtm_jax import teachers
from dtm_jax.arrays import Array, Float, PyTree
from dtm_jax.errors import OptionError, check_choice
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import shapes as clip_shapes
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.files import weight_files
from dtm_jax.models.files.weight_files import Found
from dtm_jax.normalizations import Triple
from dtm_jax.teachers import Normalization, Teacher, at_any_size, first_blocks

OUTPUTS = {"projected": "patch_embeddings", "normalized": "patch_tokens"}


def build(
  path: str = "openai/clip-vit-base-patch16",
  *,
  revision: str | None = None,
  tokens: str = "projected",
  normalization: Normalization = "clip",
  dtype: str = "float32",
  attention: str = "xla",
  stream_dtype: str = "float32",
  image_size: int | None = None,
  layer: int | None = None,
  heads: int | None = None,
  activation: str | None = None,
  weights: str | None = None,
) -> Teacher:
  """Return the frozen image tower of a CLIP with its patch tokens, which are not L2-normalised.

  The other options and the errors are those of `dtm_jax.teachers`.

  Args:
    tokens: "projected" applies ln_post and the projection to the space of the texts. "normalized" applies
      ln_post only, so the tokens have the tower's width.
    normalization: "clip" means what the files beside the weights say, or else CLIP's own. The paper's
      released code feeds CLIP with "imagenet" (docs/method.md).
    layer: see `teachers.first_blocks`. ln_post and the projection were trained for the last block.
    activation: activation of the MLP, needed only if the files do not give it (see `clip.shapes`).
  """
  check_choice("tokens", tokens, OUTPUTS)
  found = weight_files.find(path, revision=revision, weights=weights)
  config, params = clip_weights.load(found, heads=heads, activation=activation)
  clip_shapes.check_known(config, str(found.file), options=clip_shapes.flags("teacher"))
  if tokens == "projected" and config.embed_dim is None:
    raise OptionError(f"tokens='projected', but {path} has no projection. Available: normalized.")
  params, depth = first_blocks(params["image"], config.image.tower.depth, layer)
  sizes = dataclasses.replace(config.image.tower, depth=depth)
  image = dataclasses.replace(config.image, tower=sizes)
  tower = clip.ImageTower(image, config.embed_dim, dtype, attention, stream_dtype=stream_dtype)
  mean, std = clip_mean_and_std(normalization, found)

  def patch_tokens(params: PyTree, image_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B N C"]:
    return tower.apply({"params": params}, image_BHW3)[OUTPUTS[tokens]]

  def class_embedding(params: PyTree, image_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B E"]:
    return tower.apply({"params": params}, image_BHW3)["cls_embedding"]

  return at_any_size(
    image_size or config.image.image_size,
    patch_size=config.image.patch_size,
    name=f"clip {path}",
    params=params,
    apply=patch_tokens,
    width=config.embed_dim if tokens == "projected" else config.image.tower.width,
    mean=mean,
    std=std,
    cls=class_embedding if config.embed_dim else None,
  )


def clip_mean_and_std(normalization: Normalization, found: Found) -> tuple[Triple, Triple]:
  """Return the mean and the standard deviation that `normalization` (see `build`) means for these weights."""
  return teachers.mean_and_std_of(None if normalization == "clip" else normalization, found, "clip")
