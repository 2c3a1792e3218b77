"""UPerNet (arXiv 1807.10221) for plain vision transformers, as BEiT trains it.

Maps are [B, rows, columns, channels]. A transformer has one resolution. `Pyramid` makes four of it, with
strides from a quarter of a patch to two patches. In this file, D and F are numbers of channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dtm_jax.arrays import Array, Float

POOL_SCALES = (1, 2, 3, 6)

relu_init = nn.initializers.he_normal()


class ConvNormRelu(nn.Module):
  """A convolution without bias, BatchNorm and ReLU."""

  channels: int
  kernel_size: int
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B H W D"], train: bool) -> Float[Array, "B H W F"]:
    kernel = (self.kernel_size,) * 2
    x = nn.Conv(self.channels, kernel, use_bias=False, kernel_init=relu_init, dtype=self.dtype, name="conv")(
      x
    )
    return nn.relu(batch_norm(self.dtype, train)(x))


def batch_norm(dtype: str, train: bool) -> nn.BatchNorm:
  """Return a BatchNorm with PyTorch's defaults.

  Under `jit`, its statistics are those of the whole batch, however the batch is sharded.
  """
  return nn.BatchNorm(
    use_running_average=not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False, dtype=dtype, name="bn"
  )


class Pyramid(nn.Module):
  """Resize four maps on the grid of patches to strides of a quarter, a half, one and two patches."""

  dtype: str

  @nn.compact
  def __call__(self, maps: list[Float[Array, "B r c D"]], train: bool) -> list[Float[Array, "B _ _ D"]]:
    def double(x: Array, name: str) -> Array:
      return nn.ConvTranspose(x.shape[-1], (2, 2), (2, 2), "VALID", dtype=self.dtype, name=name)(x)

    quarter = double(maps[0], "up1")
    quarter = double(nn.gelu(batch_norm(self.dtype, train)(quarter), approximate=False), "up2")
    return [quarter, double(maps[1], "up"), maps[2], nn.max_pool(maps[3], (2, 2), (2, 2))]


class UPerHead(nn.Module):
  """Scores on the finest of four maps: pyramid pooling on the coarsest map, a feature pyramid, and a fusion.

  Attributes:
    num_classes: G.
    channels: channels of every map inside.
    dropout: rate of dropped channels before the last layer.
  """

  num_classes: int
  channels: int
  dropout: float
  dtype: str

  @nn.compact
  def __call__(self, maps: list[Float[Array, "B _ _ D"]], train: bool) -> Float[Array, "B H W G"]:
    def conv(x: Array, size: int, name: str) -> Array:
      return ConvNormRelu(self.channels, size, self.dtype, name=name)(x, train)

    coarsest = maps[-1]
    pooled = [
      upsample(conv(adaptive_mean(coarsest, scale), 1, f"pool{scale}"), coarsest.shape[1:3])
      for scale in POOL_SCALES
    ]
    laterals = [conv(x, 1, f"lateral{i}") for i, x in enumerate(maps[:-1])]
    laterals.append(conv(jnp.concatenate([coarsest, *pooled], axis=-1), 3, "pool_fuse"))
    for i in reversed(range(len(laterals) - 1)):
      laterals[i] += upsample(laterals[i + 1], laterals[i].shape[1:3])
    levels = [conv(x, 3, f"level{i}") for i, x in enumerate(laterals[:-1])] + laterals[-1:]
    fused = jnp.concatenate([upsample(x, levels[0].shape[1:3]) for x in levels], axis=-1)
    return classify(conv(fused, 3, "fuse"), self.num_classes, self.dropout, self.dtype, train)


class FCNHead(nn.Module):
  """The auxiliary head: one convolution and a linear layer."""

  num_classes: int
  channels: int
  dropout: float
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B H W D"], train: bool) -> Float[Array, "B H W G"]:
    x = ConvNormRelu(self.channels, 3, self.dtype, name="conv")(x, train)
    return classify(x, self.num_classes, self.dropout, self.dtype, train)


def classify(
  x: Float[Array, "B H W F"], num_classes: int, dropout: float, dtype: str, train: bool
) -> Float[Array, "B H W G"]:
  """Apply dropout of whole channels and a linear layer "classes" of the calling module. Return float32."""
  x = nn.Dropout(dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
  init = nn.initializers.normal(0.01)
  return nn.Dense(num_classes, kernel_init=init, dtype=dtype, name="classes")(x).astype(jnp.float32)


def upsample(x: Float[Array, "B h w F"], size: tuple[int, ...]) -> Float[Array, "B H W F"]:
  """Resize maps bilinearly to `size` (rows, columns), as PyTorch with align_corners=False."""
  return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "linear", antialias=False)


def adaptive_mean(x: Float[Array, "B h w F"], size: int) -> Float[Array, "B s s F"]:
  """Return means over size x size areas. Area i of n rows has rows ⌊i n / size⌋ to ⌈(i+1) n / size⌉ - 1."""
  rows, columns = (jnp.asarray(_areas(side, size), x.dtype) for side in x.shape[1:3])
  return jnp.einsum("ry,cx,byxd->brcd", rows, columns, x, precision="highest")


def _areas(old: int, new: int) -> np.ndarray:
  """Return the [new, old] matrix of means along one axis."""
  start = np.arange(new) * old // new
  stop = -(-np.arange(1, new + 1) * old // new)
  place = np.arange(old)
  inside = (place >= start[:, None]) & (place < stop[:, None])
  return inside / inside.sum(axis=1, keepdims=True)
