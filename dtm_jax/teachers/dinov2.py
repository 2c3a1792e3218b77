"""DINOv2 (arXiv 2304.07193), also with registers (arXiv 2309.16588).

A patch has 14 pixels. An image of 224 pixels has a grid of 16x16 patches, so a student for such images needs
patches of 14 pixels, too.
"""

from dtm_jax.teachers import Normalization, Teacher
from dtm_jax.teachers._frozen_vit import build_frozen_vit

MODEL_TYPES = ("dinov2", "dinov2_with_registers")


def build(
  path: str = "facebook/dinov2-base",
  *,
  revision: str | None = None,
  normalization: Normalization | None = None,
  dtype: str = "float32",
  attention: str = "xla",
  stream_dtype: str = "float32",
  image_size: int | None = None,
  layer: int | None = None,
  heads: int | None = None,
  weights: str | None = None,
) -> Teacher:
  """Return a frozen DINOv2 with its patch tokens after the final LayerNorm.

  CLS, the registers and the mask token are not among the tokens. The options are those of `dtm_jax.teachers`.
  The normalisation of the family is ImageNet's. `heads` is needed for the authors' names at a size that was
  not published (see `frozen_vit.author_files`).
  """
  return build_frozen_vit(
    path, MODEL_TYPES, "imagenet", revision=revision, normalization=normalization, dtype=dtype,
    stream_dtype=stream_dtype, attention=attention, image_size=image_size, layer=layer, weights=weights,
    heads=heads,
  )  # fmt: skip
