"""What happens to an image on the device: flip, colour jitter, normalisation.

Images come as uint8 and are float32 in [0, 1] until they are normalised. Every image has its own key, so
that its fate does not depend on how the batch is sharded.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Float, Key, RandomKey, Shaped, UInt8

Triple = tuple[float, float, float]

NORMALIZATIONS: dict[str, tuple[Triple, Triple]] = {
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
  "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of the channels, by name."""

LUMINANCE = (0.299, 0.587, 0.114)


def normalization(name: str) -> tuple[Triple, Triple]:
  """(mean, std) by name.

  Raises:
    ValueError: an unknown name.
  """
  if name not in NORMALIZATIONS:
    raise ValueError(f"Unknown normalization {name!r}. Available: {', '.join(NORMALIZATIONS)}.")
  return NORMALIZATIONS[name]


def normalize(
  image: Float[Array, "B H W 3"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "B H W 3"]:
  """(image - mean) / std, channel by channel."""
  mean, std = (jnp.asarray(value, jnp.float32)[None, None, None, :] for value in (mean, std))
  return (image - mean) / std


def to_float(image: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
  """0..255 to [0, 1]."""
  return image.astype(jnp.float32) / 255


def augment(
  keys: Key[Array, "B"], image: UInt8[Array, "B H W 3"], *, flip: float = 0.5, color_jitter: float = 0.0
) -> Float[Array, "B H W 3"]:
  """A horizontal flip with probability `flip`; brightness, contrast and saturation jittered by `color_jitter`."""
  flip_keys, jitter_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  flipped = random_flip(flip_keys, to_float(image), flip)
  return random_color(jitter_keys, flipped, color_jitter) if color_jitter else flipped


def random_flip(
  keys: Key[Array, "B"], image: Shaped[Array, "B H W 3"], probability: float
) -> Shaped[Array, "B H W 3"]:
  """Left and right exchanged in each image with this probability."""
  flips = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
  return jnp.where(flips[:, None, None, None], image[:, :, ::-1], image)


def random_color(
  keys: Key[Array, "B"], image: Float[Array, "B H W 3"], strength: float
) -> Float[Array, "B H W 3"]:
  """Brightness, contrast and saturation by factors ~ U[1-s, 1+s] in random order, as torchvision does.

  Each mixes the image with another: black, its mean luminance, its luminance. Results are clipped to [0, 1]
  after every step; unlike Pillow, nothing is rounded to grey levels in between.
  """
  return jax.vmap(lambda key, image: _jitter(key, image, strength))(keys, image)


def _jitter(key: RandomKey, image: Float[Array, "H W 3"], strength: float) -> Float[Array, "H W 3"]:
  order_key, factor_key = jax.random.split(key)
  factors = jax.random.uniform(factor_key, (3,), minval=1 - strength, maxval=1 + strength)
  grey = lambda image: jnp.einsum("hwc,c->hw", image, jnp.asarray(LUMINANCE))
  others = (
    jnp.zeros_like,
    lambda image: jnp.full_like(image, grey(image).mean()),
    lambda image: jnp.broadcast_to(grey(image)[:, :, None], image.shape),
  )
  for place in jax.random.permutation(order_key, 3):
    other = jax.lax.switch(place, others, image)
    image = jnp.clip(other + factors[place] * (image - other), 0.0, 1.0)
  return image
