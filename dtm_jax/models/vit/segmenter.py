"""The segmenter for fine-tuning: the student's trunk and a linear head or a UPerNet.

    model = build("B", num_classes=150, head="upernet", drop_path=0.15)
    params, statistics = vit.init(model, key, image_size=512), fresh_statistics(model, image_size=512)
    scores = model.apply({"params": params, "batch_stats": statistics}, image_BHW3)["logits"]

`vit.transfer.to_finetune` makes its parameters from those of a pre-trained student.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from dtm_jax.arrays import Array, Float, PyTree
from dtm_jax.devices import resolved
from dtm_jax.errors import OptionError, check_choice
from dtm_jax.models.layers import FLOAT32_NORM, grid_of, image_shape, variable_shapes
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit.classifier import Classifier, normal, uniform
from dtm_jax.models.vit.upernet import FCNHead, Pyramid, UPerHead, batch_norm, classify

HEADS = ("linear", "upernet")


class Segmenter(vit.Trunk):
  """A segmenter with a linear head or, as in BEiT, with UPerNet (arXiv 1807.10221).

  Attributes:
    num_classes: G.
    head: "linear" scores every patch from the last tokens, after the student's final LayerNorm "norm" and a
      BatchNorm. "upernet" scores a grid four times as fine in each direction. It reads the residual stream
      after four blocks, and has an auxiliary head on the third of them.
    channels: channels of UPerNet's maps; None for the trunk's width.
    auxiliary_channels: channels of the auxiliary head; 0 for no auxiliary head.
    dropout: rate of dropped channels before the heads' last layers.
    taps: numbers of the four blocks, counted from 1; None for `default_taps`.

  Raises:
    OptionError: the head is unknown, a tap is not the number of a block, or as for `Trunk`.
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
    check_choice("head", self.head, HEADS)
    if self.taps and not all(1 <= tap <= self.depth for tap in self.taps):
      raise OptionError(f"taps={self.taps} must be numbers of blocks in 1..{self.depth}.")
    super().__post_init__()

  @nn.compact
  def __call__(self, image_BHW3: Float[Array, "B H W 3"], *, train: bool = False) -> dict[str, Array]:
    """Return the class scores of normalised images, float32, on a grid coarser than the image.

    Returns:
      logits [B, h, w, G].
      auxiliary [B, h', w', G]: only with an auxiliary head.

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
    options = (self.dropout, self.dtype)
    outputs = {
      "logits": UPerHead(self.num_classes, self.channels or self.width, *options, name="decoder")(
        levels, train
      )
    }
    if self.auxiliary_channels:
      auxiliary = FCNHead(self.num_classes, self.auxiliary_channels, *options, name="auxiliary")
      outputs["auxiliary"] = auxiliary(levels[2], train)
    return outputs


class LinearHead(nn.Module):
  """BatchNorm and a linear layer on every patch."""

  num_classes: int
  dropout: float
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B H W D"], train: bool) -> Float[Array, "B H W G"]:
    x = batch_norm("float32", train)(x)
    return classify(x, self.num_classes, self.dropout, self.dtype, train)


def default_taps(depth: int) -> tuple[int, ...]:
  """Return BEiT's taps in proportion to the depth: 4, 6, 8, 12 of 12, and 8, 12, 16, 24 of 24."""
  return tuple(max(1, round(depth * part / 12)) for part in (4, 6, 8, 12))


def build(variant: str = "B", **overrides) -> Segmenter:
  """Return the segmenter of a size in `vit.VARIANTS`; `overrides` are attributes of `Segmenter` or "auto".

  Raises:
    OptionError: the variant or the head is unknown.
  """
  return Segmenter(**resolved({**vit.sizes(variant), **overrides}))


def fresh_statistics(model: Segmenter, image_size: int) -> PyTree:
  """Return the initial running statistics, "batch_stats": means of zero and variances of one.

  Args:
    image_size: pixels of a side.
  """
  shapes = variable_shapes(model, image_shape(image_size, image_size))["batch_stats"]
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.full(x.shape, path[-1].key == "var", x.dtype), shapes
  )
