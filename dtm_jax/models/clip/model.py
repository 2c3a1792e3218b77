"""CLIP (Radford et al. 2021, arXiv 2103.00020): an image tower and a text tower.

    model = CLIP(config)
    params = model.init(key, image_BHW3, token_BT)["params"]
    embedding_BP = model.apply({"params": params}, image_BHW3, method="encode_image")

The image tower alone serves as a teacher: `ImageTower(config.image, config.embed_dim)` takes
`params["image"]`. Every block sows its output as "output", so `apply(..., mutable="intermediates")` returns
the outputs of all blocks. In this file, E is embed_dim.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Float, Int, RandomKey
from dtm_jax.models.attention import Implementation
from dtm_jax.models.layers import (
  ACTIVATIONS,
  FLOAT32_NORM,
  Attention,
  Mlp,
  PatchEmbed,
  Tower,
  grid_of,
)
from dtm_jax.models.positions import resize_positions

LEGACY_EOS = 2  # configurations that transformers wrote before July 2023 have this wrong id


@dataclass(frozen=True)
class ImageConfig:
  """The image tower, by default that of ViT-B/16.

  Attributes:
    tower: the sizes of the transformer.
    image_size: pixels of a side. It fixes the stored position table, which is resized for other images.
    patch_size: pixels of a side.
  """

  tower: Tower = field(default_factory=lambda: Tower(768, 12, 12, 3072))
  image_size: int = 224
  patch_size: int = 16


@dataclass(frozen=True)
class TextConfig:
  """The text tower, by default that of ViT-B/16.

  Attributes:
    tower: the sizes of the transformer.
    vocab_size: number of token ids.
    context_length: largest number of text tokens T.
    pad_token_id, bos_token_id, eos_token_id: special tokens. A text ends at its first `eos_token_id`. The
      value 2, of old configuration files, means that a text ends at its largest id.
  """

  tower: Tower = field(default_factory=lambda: Tower(512, 12, 8, 2048))
  vocab_size: int = 49408
  context_length: int = 77
  pad_token_id: int = 1
  bos_token_id: int = 49406
  eos_token_id: int = 49407


@dataclass(frozen=True)
class CLIPConfig:
  """Both towers, by default those of ViT-B/16.

  Attributes:
    text: None for an image tower alone.
    embed_dim: E, the width of the embeddings; None for no projection.
    init_logit_scale: initial logarithm of the inverse temperature.
  """

  image: ImageConfig = field(default_factory=ImageConfig)
  text: TextConfig | None = field(default_factory=TextConfig)
  embed_dim: int | None = 512
  init_logit_scale: float = math.log(1 / 0.07)


class Block(nn.Module):
  """Compute x += attention(ln1(x)), then x += mlp(ln2(x))."""

  tower: Tower
  causal: bool
  implementation: Implementation
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], _: None):
    tower = self.tower
    activation = tower.known()[1]
    norm = partial(nn.LayerNorm, epsilon=tower.eps, use_fast_variance=False, dtype=self.dtype)
    mlp = Mlp(
      tower.mlp_width,
      ACTIVATIONS[activation],
      nn.initializers.normal((2 * tower.width) ** -0.5),
      nn.initializers.normal((2 * tower.depth * tower.width) ** -0.5),
      self.dtype,
      name="mlp",
    )
    attention = Attention(tower, self.causal, self.implementation, self.dtype, name="attn")
    x += attention(norm(name="ln1")(x)).astype(x.dtype)
    x += mlp(norm(name="ln2")(x)).astype(x.dtype)
    self.sow("intermediates", "output", x)
    return x, None


def _blocks(tower: Tower, initializing: bool, **options) -> nn.Module:
  """Return the blocks of a tower under `nn.scan`."""
  scan = nn.scan(
    Block,
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True},
    length=tower.depth,
    # The check traces a block twice. Without it, a seed would give other initial parameters.
    check_constancy_invariants=initializing,
  )
  return scan(tower, name="blocks", **options)


class ImageTower(nn.Module):
  """The vision transformer of CLIP.

  Attributes:
    embed_dim: E; None for no projection.
    dtype: type of the matrix products.
    attention: implementation, see `models.attention`.
    patch_dropout: fraction of the patches that a training step drops (FLIP, arXiv 2212.00794), drawn with the
      key "patch_dropout".
    stream_dtype: type of the residual stream between the blocks.
  """

  config: ImageConfig
  embed_dim: int | None
  dtype: str = "float32"
  attention: Implementation = "xla"
  patch_dropout: float = 0.0
  stream_dtype: str = "float32"

  @nn.compact
  def __call__(self, image_BHW3: Float[Array, "B H W 3"], train: bool = False) -> dict[str, Array]:
    """Return tokens and embeddings of normalised images, without L2 normalisation.

    Returns:
      pre [B, 1+N, D]: the input of the first block.
      patch_tokens [B, N, D]: ln_post of the patch tokens.
      patch_embeddings [B, N, E]: the projection of patch_tokens, unless `embed_dim` is None.
      cls_embedding [B, E]: the projection of ln_post of CLS, unless `embed_dim` is None.

    Raises:
      OptionError: the image is not a whole number of patches, or heads or activation are unknown.
    """
    tower, size = self.config.tower, self.config.patch_size
    small = nn.initializers.normal(tower.width**-0.5)
    norm = partial(FLOAT32_NORM, epsilon=tower.eps)
    stored = grid_of((self.config.image_size, self.config.image_size, 3), size)
    cls = self.param("class_embedding", small, (tower.width,))
    positions = self.param("position_embedding", small, (1 + math.prod(stored), tower.width))
    positions = resize_positions(jnp.asarray(positions), grid_of(image_BHW3.shape, size))

    patches = PatchEmbed(
      tower.width, size, False, nn.initializers.normal(0.02), self.dtype, name="patch_embed"
    )(image_BHW3)
    patches += positions[None, 1:]
    if train and self.patch_dropout > 0:
      patches = keep_random(self.make_rng("patch_dropout"), patches, 1 - self.patch_dropout)
    cls = jnp.broadcast_to(cls + positions[0], (patches.shape[0], 1, tower.width))
    pre = norm(name="ln_pre")(jnp.concatenate([cls, patches], axis=1))

    options = {"causal": False, "implementation": self.attention, "dtype": self.dtype}
    blocks = _blocks(tower, self.is_initializing(), **options)
    tokens = norm(name="ln_post")(blocks(pre.astype(self.stream_dtype), None)[0])
    outputs = {"pre": pre, "patch_tokens": tokens[:, 1:]}
    if self.embed_dim is not None:
      projection = nn.Dense(self.embed_dim, False, self.dtype, kernel_init=small, name="projection")
      outputs["cls_embedding"] = projection(tokens[:, 0]).astype(jnp.float32)
      outputs["patch_embeddings"] = projection(tokens[:, 1:]).astype(jnp.float32)
    return outputs


class TextTower(nn.Module):
  """The causal text transformer of CLIP.

  Attributes:
    embed_dim: E.
    dtype: type of the matrix products.
  """

  config: TextConfig
  embed_dim: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, token_BT: Int[Array, "B T"]) -> dict[str, Array]:
    """Return tokens and embeddings of texts.

    Returns:
      pre [B, T, D]: the input of the first block.
      tokens [B, T, D]: ln_final of the last block's output.
      embedding [B, E]: the projection of the token at the end of the text; not L2-normalised.

    Raises:
      ValueError: T exceeds `context_length`.
    """
    config, tower = self.config, self.config.tower
    if token_BT.shape[1] > config.context_length:
      raise ValueError(f"{token_BT.shape[1]} tokens exceed the context length {config.context_length}.")
    normal = nn.initializers.normal
    words = self.param("token_embedding", normal(0.02), (config.vocab_size, tower.width))
    positions = self.param("position_embedding", normal(0.01), (config.context_length, tower.width))
    pre = jnp.take(words, token_BT, axis=0) + positions[None, : token_BT.shape[1]]

    blocks = _blocks(tower, self.is_initializing(), causal=True, implementation="xla", dtype=self.dtype)
    tokens = FLOAT32_NORM(epsilon=tower.eps, name="ln_final")(blocks(pre, None)[0])
    end_B = end_of_text(token_BT, config.eos_token_id)
    pooled = jnp.take_along_axis(tokens, end_B[:, None, None], axis=1)[:, 0]
    project = nn.Dense(
      self.embed_dim, False, self.dtype, kernel_init=normal(tower.width**-0.5), name="projection"
    )
    return {"pre": pre, "tokens": tokens, "embedding": project(pooled).astype(jnp.float32)}


class CLIP(nn.Module):
  """Both towers and the learned temperature; the parameters are {"image", "text", "logit_scale"}."""

  config: CLIPConfig
  dtype: str = "float32"
  patch_dropout: float = 0.0

  def setup(self):
    config = self.config
    self.image = ImageTower(config.image, config.embed_dim, self.dtype, patch_dropout=self.patch_dropout)
    self.text = TextTower(config.text, config.embed_dim, self.dtype)
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(config.init_logit_scale), ())

  def __call__(
    self, image_BHW3: Float[Array, "B H W 3"], token_PT: Int[Array, "P T"], train: bool = False
  ) -> tuple[Float[Array, "B E"], Float[Array, "P E"], Float[Array, ""]]:
    """Return the embeddings of B images and P texts, and logit_scale.

    The logit of a pair is exp(logit_scale) times the cosine of its embeddings.
    """
    image, text = self.encode_image(image_BHW3, train), self.encode_text(token_PT)
    return image, text, jnp.asarray(self.logit_scale)

  def encode_image(self, image_BHW3: Float[Array, "B H W 3"], train: bool = False) -> Float[Array, "B E"]:
    """Return the embedding of each image, not L2-normalised."""
    return self.image(image_BHW3, train)["cls_embedding"]

  def encode_patches(self, image_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B N E"]:
    """Return the embedding of each patch in the space of the texts, not L2-normalised."""
    return self.image(image_BHW3)["patch_embeddings"]

  def encode_text(self, token_BT: Int[Array, "B T"]) -> Float[Array, "B E"]:
    """Return the embedding of each text, not L2-normalised."""
    return self.text(token_BT)["embedding"]


def end_of_text(token_BT: Int[Array, "B T"], eos_token_id: int) -> Int[Array, " B"]:
  """Return the index of the first end token, or of the largest id if the id is LEGACY_EOS."""
  return jnp.argmax(token_BT if eos_token_id == LEGACY_EOS else token_BT == eos_token_id, axis=1)


def keep_random(key: RandomKey, patches: Float[Array, "B N D"], fraction: float) -> Float[Array, "B kept D"]:
  """Return a random `fraction` of the patches of each image, at least one."""
  batch_size, num_patches, _ = patches.shape
  order = jnp.argsort(jax.random.uniform(key, (batch_size, num_patches)), axis=1)
  kept = order[:, : max(1, round(fraction * num_patches))]
  return jnp.take_along_axis(patches, kept[:, :, None], axis=1)
