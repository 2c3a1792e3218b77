"""The fine-tuning model: the student's trunk below a linear classifier.

    model = build("B", num_classes=1000, drop_path=0.1)
    params = vit.init(model, key, image_size=224)
    logits = model.apply({"params": params}, image_BHW3)["logits"]

`vit_weights.to_finetune` makes its parameters from a pre-trained student's.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Float, RandomKey
from dtm_jax.errors import OptionError
from dtm_jax.models.layers import FLOAT32_NORM, grid_of
from dtm_jax.models.vit import model as vit

POOLINGS = ("mean", "cls")

# Unlike pre-training's, nothing is cut.
normal = nn.initializers.normal(0.02)
# U(-a, a) with a = fan_in^-1/2.
uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Classifier(vit.Trunk):
  """A linear classifier on the mean of the patch tokens, or on CLS.

  Mean pooling is x = LN(mean over the N patches of the residual stream), a LayerNorm of its own ("fc_norm")
  that pre-training has not seen; "cls" is x = LN(CLS), with the student's final LayerNorm ("norm").

  Attributes:
    num_classes: G.
    pooling: "mean" or "cls".
    head_init_scale: factor of the head's initial weights, so that training starts from equal logits.
  """

  num_classes: int = 1000
  pooling: str = "mean"
  head_init_scale: float = 0.001
  shared_rel_pos_bias: bool = False

  kernel_init, patch_init = staticmethod(normal), staticmethod(uniform)

  @nn.nowrap
  def patch_bias_init(self, key: RandomKey, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """As PyTorch starts the bias of a convolution: like its kernel."""
    bound = (3 * self.patch_size**2) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  def __post_init__(self):
    if self.pooling not in POOLINGS:
      raise OptionError(f"Unknown pooling {self.pooling!r}. Available: {', '.join(POOLINGS)}.")
    super().__post_init__()

  @nn.compact
  def __call__(self, image_BHW3: Float[Array, "B H W 3"], *, train: bool = False) -> dict[str, Array]:
    """Scores of normalised images.

    Returns:
      logits [B, G], float32; features [B, D]: what the head reads; tokens [B, 1+N, D]: the residual stream
      after the last block.

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
  """The classifier of a named size; `overrides` are the attributes of `Classifier`.

  Raises:
    OptionError: there is no such variant or pooling.
  """
  return Classifier(**{**vit.sizes(variant), **overrides})
