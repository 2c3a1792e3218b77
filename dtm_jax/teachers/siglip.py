"""SigLIP (arXiv 2303.15343) and SigLIP 2 (arXiv 2502.14786).

All checkpoints of a fixed resolution have the model_type "siglip". Those of NaFlex have "siglip2" and see
square images of any size here.
"""

from dtm_jax.teachers import Normalization, Teacher
from dtm_jax.teachers._frozen_vit import build_frozen_vit

MODEL_TYPES = ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model")


def build(
  path: str = "google/siglip-base-patch16-224",
  *,
  revision: str | None = None,
  normalization: Normalization | None = None,
  dtype: str = "float32",
  attention: str = "xla",
  stream_dtype: str = "float32",
  image_size: int | None = None,
  layer: int | None = None,
  weights: str | None = None,
) -> Teacher:
  """Return the frozen image tower of a SigLIP with its patch tokens after the final LayerNorm.

  Its pooling head and its text tower are not used. The options are those of `dtm_jax.teachers`. The
  normalisation of the family is 0.5 for the mean and the standard deviation of each channel. At its own image
  size, a tower may ignore a remainder of pixels: so400m has 27 patches of 14 pixels in 384 pixels.
  """
  return build_frozen_vit(
    path, MODEL_TYPES, "inception", revision=revision, normalization=normalization, dtype=dtype,
    stream_dtype=stream_dtype, attention=attention, image_size=image_size, layer=layer, weights=weights,
  )  # fmt: skip
