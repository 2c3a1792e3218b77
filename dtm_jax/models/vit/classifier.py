"""The classifier for fine-tuning: the student's trunk and a linear head.

    model = build("B", num_classes=1000, drop_path=0.1)
    params = vit.init(model, key, image_size=224)
    logits = model.apply({"params": params}, image_BHW3)["logits"]

`vit.transfer.to_finetune` makes its parameters from those of a pre-trained student.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Float, RandomKey
from dtm_jax.devices import resolved
from dtm_jax.errors import check_choice
from dtm_jax.models.layers import FLOAT32_NORM, grid_of
from dtm_jax.models.vit import model as vit

POOLINGS = ("mean", "cls")

# Pre-training truncates this distribution, fine-tuning does not.
normal = nn.initializers.normal(0.02)
# U(-a, a) with a = fan_in^-1/2, which is PyTorch's default for a convolution.
uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Classifier(vit.Trunk):
  """A linear classifier on the mean of the patch tokens, or on CLS.

  Attributes:
    num_classes: G.
    pooling: input of the head. "mean" is LN(mean of the N patches of the residual stream) with a new
      LayerNorm "fc_norm". "cls" is LN(CLS) with the student's final LayerNorm "norm".
    head_init_scale: factor of the head's initial weights, so that training starts from equal logits.

  Raises:
    OptionError: the pooling is unknown, or as for `Trunk`.
  """

  num_classes: int = 1000
  pooling: str = "mean"
  head_init_scale: float = 0.001
  shared_rel_pos_bias: bool = False

  kernel_init, patch_init = staticmethod(normal), staticmethod(uniform)

  @nn.nowrap
  def patch_bias_init(self, key: RandomKey, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Return the initial bias of the patch embedding, from the same distribution as its kernel."""
    bound = (3 * self.patch_size**2) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  def __post_init__(self):
    check_choice("pooling", self.pooling, POOLINGS)
    super().__post_init__()

  @nn.compact
  def __call__(self, image_BHW3: Float[Array, "B H W 3"], *, train: bool = False) -> dict[str, Array]:
    """Return the class scores of normalised images.

    Returns:
      logits [B, G]: float32.
      features [B, D]: the input of the head.
      tokens [B, 1+N, D]: the residual stream after the last block.

    Raises:
      OptionError: the image is not a whole number of patches.
    """
    grid = grid_of(image_BHW3.shape, self.patch_size)
    tokens = self.encode(self.embed(image_BHW3), grid, train)
    if self.pooling == "mean":
      features = FLOAT32_NORM(epsilon=vit.EPS, name="fc_norm")(tokens[:, 1:].mean(axis=1))
    else:
      features = FLOAT32_NORM(epsilon=vit.EPS, name="norm")(tokens[:, 0])
    init = nn.initializers.normal(0.02 * self.head_init_scale)
    head = nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="head")
    return {"logits": head(features).astype(jnp.float32), "features": features, "tokens": tokens}


def build(variant: str = "B", **overrides) -> Classifier:
  """Return the classifier of a size in `vit.VARIANTS`; `overrides` are attributes of `Classifier` or "auto".

  Raises:
    OptionError: the variant or the pooling is unknown.
  """
  return Classifier(**resolved({**vit.sizes(variant), **overrides}))
