"""MAE (arXiv 2111.06377), and the plain vision transformer."""

from dtm_jax.teachers import Normalization, Teacher
from dtm_jax.teachers._frozen_vit import build_frozen_vit

MODEL_TYPES = ("vit_mae", "vit")


def build(
  path: str = "facebook/vit-mae-base",
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
  """Return the frozen encoder of an MAE, or a ViT, with its patch tokens after the final LayerNorm.

  The encoder sees all patches. Its decoder, pooler or classifier is not used. The options are those of
  `dtm_jax.teachers`. The normalisation of the family is ImageNet's. `heads` is needed for the authors' names
  at a size that was not published (see `frozen_vit.author_files`).
  """
  return build_frozen_vit(
    path, MODEL_TYPES, "imagenet", revision=revision, normalization=normalization, dtype=dtype,
    stream_dtype=stream_dtype, attention=attention, image_size=image_size, layer=layer, weights=weights,
    heads=heads,
  )  # fmt: skip
