"""DINOv2 (arXiv 2304.07193), also with registers (arXiv 2309.16588): patch tokens after the last LayerNorm.

Its patches have 14 pixels: with images of 224 the grid is 16x16, and a student needs patches of 14 too.
"""

from dtm_jax.teachers import Normalization, Teacher, build_frozen_vit

MODEL_TYPES = ("dinov2", "dinov2_with_registers")


def build(
  path: str = "facebook/dinov2-base",
  *,
  revision: str | None = None,
  normalization: Normalization | None = None,
  dtype: str = "float32",
  attention: str = "xla",
  image_size: int | None = None,
  heads: int | None = None,
  weights: str | None = None,
) -> Teacher:
  """A DINOv2; CLS, the registers and the mask token are not among the tokens.

  Args:
    path: a file, a folder, or a repository of the hub.
    revision: of the repository.
    normalization: None (what the checkpoint says of itself, or else ImageNet's), a name ("imagenet",
      "clip", "inception"), or a pair (mean, std).
    dtype: of the matrix products.
    attention: "xla", or "cudnn" (GPUs, half precision).
    image_size: pixels of a side; where it is not the checkpoint's, the position table is resized.
    heads: for the authors' names at a size that was not published (see `models.frozen_vit_authors`).
    weights: the container of the model, for a file that holds several (see `models.checkpoint_contents`).

  Raises:
    OptionError: an unknown option.
    UnreadableFileError: another kind of model, a damaged file, or names or shapes that do not match.
    NotThereError: a file is missing.
  """
  return build_frozen_vit(
    path,
    model_types=MODEL_TYPES,
    default_normalization="imagenet",
    revision=revision,
    normalization=normalization,
    dtype=dtype,
    attention=attention,
    image_size=image_size,
    heads=heads,
    weights=weights,
  )
