"""The segmentation model: the student's trunk below a linear head or a UPerNet.

    model = build("B", num_classes=150, head="upernet", drop_path=0.15)
    params, statistics = vit.init(model, key, image_size=512), fresh_statistics(model, image_size=512)
    scores = model.apply({"params": params, "batch_stats": statistics}, image_BHW3)["logits"]

`vit_transfer.to_finetune` makes its parameters from a pre-trained student's.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from dtm_jax.arrays import Array, Float, PyTree
from dtm_jax.errors import OptionError
from dtm_jax.models.layers import FLOAT32_NORM, grid_of
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit.classifier import Classifier, normal, uniform
from dtm_jax.models.vit.upernet import FCNHead, Pyramid, UPerHead, batch_norm, classify

HEADS = ("linear", "upernet")


class Segmenter(vit.Trunk):
  """Scores for every patch ("linear") or for every quarter of a patch's side ("upernet").

  "linear" is a linear layer on the normalised last tokens: the student's final LayerNorm ("norm"), then a
  BatchNorm. "upernet" is BEiT's: UPerNet on the residual stream after blocks 4, 6, 8 and 12 of 12, with an
  auxiliary head on the third of these.

  Attributes:
    num_classes: G.
    channels: of UPerNet's maps; None for the trunk's width.
    auxiliary_channels: of the auxiliary head; 0 for no such head.
    dropout: rate at which channels are dropped before the heads' last layers.
    taps: the four blocks, from 1; None for those of BEiT, in proportion to the depth.
  """

  num_classes: int = 150
  head: str = "upernet"
  channels: int | None = None
  auxiliary_channels: int = 256
  dropout: float = 0.1
  taps: tuple[int, int, int, int] | None = None
  shared_rel_pos_bias: bool = False

  kernel_init, patch_init = staticmethod(normal), staticmethod(uniform)
  patch_bias_init = Classifier.patch_bias_init

  def __post_init__(self):
    if self.head not in HEADS:
      raise OptionError(f"Unknown head {self.head!r}. Available: {', '.join(HEADS)}.")
    if self.taps and not all(1 <= tap <= self.depth for tap in self.taps):
      raise OptionError(f"taps={self.taps} are not all among the blocks 1..{self.depth}.")
    super().__post_init__()

  @nn.compact
  def __call__(self, image_BHW3: Float[Array, "B H W 3"], *, train: bool = False) -> dict[str, Array]:
    """Scores of normalised images, coarser than the image and float32.

    Returns:
      logits [B, h, w, G], and auxiliary [B, h', w', G] where there is such a head.

    Raises:
      OptionError: the image is not a whole number of patches.
    """
    grid = grid_of(image_BHW3.shape, self.patch_size)
    patches = self.embed(image_BHW3)
    as_map = lambda tokens: rearrange(tokens[:, 1:], "b (r c) d -> b r c d", r=grid[0])
    if self.head == "linear":
      tokens = FLOAT32_NORM(epsilon=vit.EPS, name="norm")(self.encode(patches, grid, train))
      head = LinearHead(self.num_classes, self.dropout, self.dtype, name="decoder")
      return {"logits": head(as_map(tokens), train)}

    blocks_LBTD = self.encode(patches, grid, train, every_block=True)
    maps = [as_map(blocks_LBTD[tap - 1]) for tap in self.taps or default_taps(self.depth)]
    levels = Pyramid(self.dtype, name="pyramid")(maps, train)
    head = (self.dropout, self.dtype)
    outputs = {
      "logits": UPerHead(self.num_classes, self.channels or self.width, *head, name="decoder")(levels, train)
    }
    if self.auxiliary_channels:
      auxiliary = FCNHead(self.num_classes, self.auxiliary_channels, *head, name="auxiliary")
      outputs["auxiliary"] = auxiliary(levels[2], train)
    return outputs


class LinearHead(nn.Module):
  """BatchNorm and a linear layer, patch by patch."""

  num_classes: int
  dropout: float
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B H W D"], train: bool) -> Float[Array, "B H W G"]:
    x = batch_norm("float32", train)(x)
    return classify(x, self.num_classes, self.dropout, self.dtype, train)


def default_taps(depth: int) -> tuple[int, ...]:
  """A third, a half, two thirds and all of the blocks: 4, 6, 8, 12 of 12, and 8, 12, 16, 24 of 24."""
  return tuple(max(1, round(depth * part / 12)) for part in (4, 6, 8, 12))


def build(variant: str = "B", **overrides) -> Segmenter:
  """The segmenter of a named size; `overrides` are the attributes of `Segmenter`.

  Raises:
    OptionError: there is no such variant or head.
  """
  return Segmenter(**{**vit.sizes(variant), **overrides})


def fresh_statistics(model: Segmenter, image_size: int) -> PyTree:
  """The running statistics ("batch_stats") before training: means of zero, variances of one."""
  image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), image)["batch_stats"]
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.full(x.shape, path[-1].key == "var", x.dtype), shapes
  )
