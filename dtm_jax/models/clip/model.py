"""CLIP (Radford et al. 2021, arXiv 2103.00020): the image and the text tower.

    model = CLIP(config)
    params = model.init(key, image_BHW3, token_BT)["params"]
    embedding_BP = model.apply({"params": params}, image_BHW3, method="encode_image")

The image tower alone serves as a teacher: `ImageTower(config.image, config.embed_dim)` reads
`params["image"]`. Letters: P embed_dim, V vocabulary, T text tokens.
Every block sows its output as "output": `apply(..., mutable="intermediates")` gives them all.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Float, Int
from dtm_jax.models.layers import ACTIVATIONS, FLOAT32_NORM, Attention, Mlp, PatchEmbed, Tower, grid_of
from dtm_jax.models.positions import resize_positions

LEGACY_EOS = 2  # transformers configs written before July 2023 name this wrong id


@dataclass(frozen=True)
class ImageConfig:
  """`image_size` fixes the stored position table; other sizes resize it."""

  tower: Tower = field(default_factory=lambda: Tower(768, 12, 12, 3072))
  image_size: int = 224
  patch_size: int = 16


@dataclass(frozen=True)
class TextConfig:
  """The text ends at its first `eos_token_id`; id 2 means the largest id instead (old config files)."""

  tower: Tower = field(default_factory=lambda: Tower(512, 12, 8, 2048))
  vocab_size: int = 49408
  context_length: int = 77
  pad_token_id: int = 1
  bos_token_id: int = 49406
  eos_token_id: int = 49407


@dataclass(frozen=True)
class CLIPConfig:
  """Both towers of ViT-B/16. `text` is None for an image tower alone, `embed_dim` for no projection."""

  image: ImageConfig = field(default_factory=ImageConfig)
  text: TextConfig | None = field(default_factory=TextConfig)
  embed_dim: int | None = 512
  init_logit_scale: float = math.log(1 / 0.07)


class Block(nn.Module):
  """x += attention(ln1(x)); x += mlp(ln2(x))."""

  tower: Tower
  causal: bool
  implementation: str
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], _: None):
    tower = self.tower
    norm = partial(nn.LayerNorm, epsilon=tower.eps, use_fast_variance=False, dtype=self.dtype)
    mlp = Mlp(
      tower.mlp_width,
      ACTIVATIONS[tower.known().activation],
      nn.initializers.normal((2 * tower.width) ** -0.5),
      nn.initializers.normal((2 * tower.depth * tower.width) ** -0.5),
      self.dtype,
      name="mlp",
    )
    x += Attention(tower, self.causal, self.implementation, self.dtype, name="attn")(norm(name="ln1")(x))
    x += mlp(norm(name="ln2")(x))
    self.sow("intermediates", "output", x)
    return x, None


def _blocks(tower: Tower, **options) -> nn.Module:
  scan = nn.scan(
    Block,
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True},
    length=tower.depth,
  )
  return scan(tower, name="blocks", **options)


class ImageTower(nn.Module):
  """The vision transformer of CLIP.

  `patch_dropout` is the fraction of patches hidden from a training step (FLIP, arXiv 2212.00794);
  it draws from the stream "patch_dropout".
  """

  config: ImageConfig
  embed_dim: int | None
  dtype: str = "float32"
  attention: str = "xla"
  patch_dropout: float = 0.0

  @nn.compact
  def __call__(self, image_BHW3: Float[Array, "B H W 3"], train: bool = False) -> dict[str, Array]:
    """Tokens and embeddings of normalised images; what is not used, `jit` never computes.

    Returns:
      pre [B, 1+N, D]: what enters the first block; patch_tokens [B, N, D]: ln_post(tokens) without
      CLS; patch_embeddings [B, N, P]: those, projected; cls_embedding [B, P]. Nothing is L2-normalised.
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

    blocks = _blocks(tower, causal=False, implementation=self.attention, dtype=self.dtype)
    tokens = norm(name="ln_post")(blocks(pre, None)[0])
    outputs = {"pre": pre, "patch_tokens": tokens[:, 1:]}
    if self.embed_dim is not None:
      projection = nn.Dense(self.embed_dim, False, self.dtype, kernel_init=small, name="projection")
      outputs["cls_embedding"] = projection(tokens[:, 0]).astype(jnp.float32)
      outputs["patch_embeddings"] = projection(tokens[:, 1:]).astype(jnp.float32)
    return outputs


class TextTower(nn.Module):
  """The causal text transformer of CLIP."""

  config: TextConfig
  embed_dim: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, token_BT: Int[Array, "B T"]) -> dict[str, Array]:
    """Returns pre [B, T, D], tokens [B, T, D] (after ln_final) and embedding [B, P] (at the end of text).

    Raises:
      ValueError: more tokens than `context_length`.
    """
    config, tower = self.config, self.config.tower
    if token_BT.shape[1] > config.context_length:
      raise ValueError(f"{token_BT.shape[1]} tokens exceed the context length {config.context_length}.")
    normal = nn.initializers.normal
    words = self.param("token_embedding", normal(0.02), (config.vocab_size, tower.width))
    positions = self.param("position_embedding", normal(0.01), (config.context_length, tower.width))
    pre = jnp.take(words, token_BT, axis=0) + positions[None, : token_BT.shape[1]]

    blocks = _blocks(tower, causal=True, implementation="xla", dtype=self.dtype)
    tokens = FLOAT32_NORM(epsilon=tower.eps, name="ln_final")(blocks(pre, None)[0])
    end_B = end_of_text(token_BT, config.eos_token_id)
    pooled = jnp.take_along_axis(tokens, end_B[:, None, None], axis=1)[:, 0]
    project = nn.Dense(
      self.embed_dim, False, self.dtype, kernel_init=normal(tower.width**-0.5), name="projection"
    )
    return {"pre": pre, "tokens": tokens, "embedding": project(pooled).astype(jnp.float32)}


class CLIP(nn.Module):
  """Both towers and the learned temperature: params {"image", "text", "logit_scale"}."""

  config: CLIPConfig
  dtype: str = "float32"
  patch_dropout: float = 0.0

  def setup(self):
    config = self.config
    self.image = ImageTower(config.image, config.embed_dim, self.dtype, patch_dropout=self.patch_dropout)
    self.text = TextTower(config.text, config.embed_dim, self.dtype)
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(config.init_logit_scale), ())

  def __call__(self, image_BHW3, token_BT, train: bool = False):
    """(image [B, P], text [B, P], logit_scale []): the logits of a pair are exp(logit_scale) * cosine."""
    return self.encode_image(image_BHW3, train), self.encode_text(token_BT), self.logit_scale

  def encode_image(self, image_BHW3: Float[Array, "B H W 3"], train: bool = False) -> Float[Array, "B P"]:
    """The embedding of each image, not normalised."""
    return self.image(image_BHW3, train)["cls_embedding"]

  def encode_patches(self, image_BHW3: Float[Array, "B H W 3"]) -> Float[Array, "B N P"]:
    """Every patch's own embedding: the last layer's tokens in the space of the texts, not normalised."""
    return self.image(image_BHW3)["patch_embeddings"]

  def encode_text(self, token_BT: Int[Array, "B T"]) -> Float[Array, "B P"]:
    """The embedding of each text, not normalised."""
    return self.text(token_BT)["embedding"]


def end_of_text(token_BT: Int[Array, "B T"], eos_token_id: int) -> Int[Array, " B"]:
  """The place of the first end token; under the legacy id, of the largest id."""
  return jnp.argmax(token_BT if eos_token_id == LEGACY_EOS else token_BT == eos_token_id, axis=1)


def keep_random(key, patches: Float[Array, "B N D"], fraction: float) -> Float[Array, "B M D"]:
  """A random `fraction` of the patches of each image."""
  batch_size, num_patches, _ = patches.shape
  order = jnp.argsort(jax.random.uniform(key, (batch_size, num_patches)), axis=1)
  kept = order[:, : max(1, round(fraction * num_patches))]
  return jnp.take_along_axis(patches, kept[:, :, None], axis=1)
