"""SigLIP (arXiv 2303.15343) and SigLIP 2 (arXiv 2502.14786): the patch tokens after the last LayerNorm.

The checkpoints of a fixed resolution, of both, have model_type "siglip". Those of NaFlex have "siglip2":
here they see square images only, at any size.
"""

from dtm_jax.teachers import Normalization, Teacher, build_frozen_vit

MODEL_TYPES = ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model")


def build(
  path: str = "google/siglip-base-patch16-224",
  *,
  revision: str | None = None,
  normalization: Normalization | None = None,
  dtype: str = "float32",
  attention: str = "xla",
  image_size: int | None = None,
  weights: str | None = None,
) -> Teacher:
  """The image tower of a SigLIP; its pooling head and its texts are not used.

  Args:
    path: a file, a folder, or a repository of the hub.
    revision: of the repository.
    normalization: None (what the checkpoint says of itself, or else (0.5, 0.5)), a name ("imagenet",
      "clip", "inception"), or a pair (mean, std).
    dtype: of the matrix products.
    attention: "xla", or "cudnn" (GPUs, half precision).
    image_size: pixels of a side; where it is not the checkpoint's, the position table is resized.
    weights: the container of the model, for a file that holds several (see `models.checkpoint_contents`).

  Raises:
    OptionError: an unknown option.
    UnreadableFileError: another kind of model, a damaged file, or names or shapes that do not match.
    NotThereError: a file is missing.
  """
  return build_frozen_vit(
    path,
    model_types=MODEL_TYPES,
    default_normalization="inception",
    revision=revision,
    normalization=normalization,
    dtype=dtype,
    attention=attention,
    image_size=image_size,
    weights=weights,
  )
