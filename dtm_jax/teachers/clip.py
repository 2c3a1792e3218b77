"""CLIP's patch tokens as the target, from any checkpoint that `models.clip_weights` reads."""

from dtm_jax import teachers
from dtm_jax.arrays import Array, Float, PyTree
from dtm_jax.errors import OptionError
from dtm_jax.models.clip import config as clip_config
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.files import weight_files
from dtm_jax.models.files.weight_files import Found
from dtm_jax.normalizations import Triple
from dtm_jax.teachers import Normalization, Teacher, at_any_size

OUTPUTS = {"projected": "patch_embeddings", "normalized": "patch_tokens"}


def build(
  path: str = "openai/clip-vit-base-patch16",
  *,
  revision: str | None = None,
  tokens: str = "projected",
  normalization: Normalization = "clip",
  dtype: str = "float32",
  attention: str = "xla",
  image_size: int | None = None,
  heads: int | None = None,
  activation: str | None = None,
  weights: str | None = None,
) -> Teacher:
  """Return the image tower of a CLIP.

  Args:
    path: a file, a folder, or a repository of the hub.
    revision: of the repository.
    tokens: "projected" (ln_post, then the projection to the space of the texts; nothing is
      L2-normalised) or "normalized" (ln_post only, of the tower's width).
    normalization: "clip" (what the checkpoint says of itself, or else CLIP's constants), "imagenet"
      (the released code feeds CLIP so), "inception", or a pair (mean, std).
    dtype: of the matrix products.
    attention: "xla", or "cudnn" (GPUs, half precision).
    image_size: pixels of a side; where it is not the checkpoint's, the position table is resized.
    heads, activation: of the image tower, for files that do not tell them (see `models.clip_config`).
    weights: the container of the model, for a file that holds several (see `models.checkpoint_contents`).

  Raises:
    OptionError: an unknown option, projected tokens of a checkpoint without projection, or heads or
      activation that neither the files nor the options tell.
    UnreadableFileError: the files are damaged, or names or shapes do not match.
    NotThereError: a file is missing.
  """
  if tokens not in OUTPUTS:
    raise OptionError(f"Unknown tokens {tokens!r}. Available: {', '.join(OUTPUTS)}.")
  found = weight_files.find(path, revision=revision, weights=weights)
  config, params = clip_weights.load(found, heads=heads, activation=activation)
  clip_config.check_known(config, str(found.file), options=clip_config.flags("teacher"))
  if tokens == "projected" and config.embed_dim is None:
    raise OptionError(f"{path} has no projection, so no projected tokens; it has 'normalized' ones.")
  tower = clip.ImageTower(config.image, config.embed_dim, dtype, attention)
  mean, std = mean_and_std_of(normalization, found)

  def patch_tokens(params: PyTree, image_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B N C"]:
    return tower.apply({"params": params}, image_BHW3)[OUTPUTS[tokens]]

  def class_embedding(params: PyTree, image_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B P"]:
    return tower.apply({"params": params}, image_BHW3)["cls_embedding"]

  return at_any_size(
    image_size or config.image.image_size,
    patch_size=config.image.patch_size,
    name=f"clip {path}",
    params=params["image"],
    tokens=patch_tokens,
    width=config.embed_dim if tokens == "projected" else config.image.tower.width,
    mean=mean,
    std=std,
    cls=class_embedding if config.embed_dim else None,
  )


def mean_and_std_of(normalization: Normalization, found: Found) -> tuple[Triple, Triple]:
  """Return what `normalization` (see `build`) means for these weights."""
  return teachers.mean_and_std_of(None if normalization == "clip" else normalization, found, "clip")
