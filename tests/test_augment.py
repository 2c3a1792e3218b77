"""Flips, colours and normalisation against NumPy."""

import itertools

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dtm_jax import augment, rngs
from dtm_jax.normalizations import mean_and_std

BATCH = 64


def _keys(stream: str = "augment"):
  return rngs.per_example(rngs.stream(jax.random.key(0), stream, 3), BATCH)


def _images(seed: int = 0):
  return np.random.default_rng(seed).integers(0, 256, (BATCH, 6, 5, 3)).astype(np.uint8)


def test_a_flip_mirrors_whole_images_with_the_given_probability():
  image = augment.to_float(_images())
  flipped = np.asarray(augment.random_flip(_keys(), image, 0.25))
  mirrored = [np.array_equal(new, old[:, ::-1]) for new, old in zip(flipped, np.asarray(image), strict=True)]
  same = [np.array_equal(new, old) for new, old in zip(flipped, np.asarray(image), strict=True)]
  assert np.all(np.array(mirrored) ^ np.array(same))
  keys = rngs.per_example(rngs.stream(jax.random.key(1), "flip"), 4000)
  ramp = augment.to_float(np.broadcast_to(np.arange(2, dtype=np.uint8)[None, None, :, None], (4000, 1, 2, 3)))
  share = float((augment.random_flip(keys, ramp, 0.25)[:, 0, 0, 0] > 0).mean())
  assert share == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)


def test_normalisation_follows_its_equation_and_lists_the_names():
  image = _images()
  mean, std = mean_and_std("clip")
  expected = (image / 255 - np.array(mean)) / np.array(std)
  np.testing.assert_allclose(augment.normalize(augment.to_float(image), mean, std), expected, atol=1e-5)
  with pytest.raises(ValueError, match=r"'clop'.*imagenet, clip, inception"):
    mean_and_std("clop")


def _jitter_oracle(x, factors, order):
  for operation in order:
    grey = x @ np.array([0.299, 0.587, 0.114])
    base = (0.0, grey.mean(), grey[..., None])[operation]
    x = np.clip(factors[operation] * x + (1 - factors[operation]) * base, 0, 1)
  return x


def test_colour_jitter_follows_its_equations():
  keys, strengths = _keys(), np.array([0.4, 0.3, 0.6])
  image = augment.to_float(_images())
  got = augment.jitter_colors(keys, image, *map(float, strengths))
  factors, orders = jax.vmap(_draws)(keys)
  factors = 1 + strengths * (2 * np.asarray(factors, np.float64) - 1)
  for values in zip(np.asarray(image, np.float64), factors, np.asarray(orders), got, strict=True):
    np.testing.assert_allclose(values[-1], _jitter_oracle(*values[:-1]), atol=1e-5)
  assert set(map(tuple, orders.tolist())) == set(itertools.permutations(range(3)))


def _draws(key):
  factor_key, order_key = jax.random.split(key)
  return jax.random.uniform(factor_key, (3,)), jax.random.permutation(order_key, 3)


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
def test_one_operation_alone_agrees_with_pillow_up_to_its_rounding(operation):
  images = _images()
  strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, operation: 0.4}
  got = np.asarray(augment.jitter_colors(_keys(), augment.to_float(images), **strengths)) * 255
  place = list(strengths).index(operation)
  kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[place]
  factors = 0.6 + 0.8 * np.asarray(jax.vmap(_draws)(_keys())[0][:, place])
  for factor, before, after in zip(factors, images, got, strict=True):
    expected = np.asarray(kind(Image.fromarray(before)).enhance(float(factor)), np.float32)
    assert np.abs(after - expected).max() <= 1.5


def test_an_image_depends_only_on_its_own_key_and_compiles_once():
  traces = []

  @jax.jit
  def change(keys, image):
    traces.append(1)
    return augment.augment(keys, image, flip=0.5, color_jitter=0.4)

  keys, image = _keys(), _images()
  whole = np.asarray(change(keys, image))
  np.testing.assert_array_equal(change(_keys(), image), whole)
  order = np.random.default_rng(1).permutation(BATCH)
  np.testing.assert_allclose(change(keys[order], image[order]), whole[order], atol=1e-6)
  assert not np.array_equal(change(_keys("other"), image), whole)
  assert len(traces) == 1
  assert whole.dtype == np.float32
  assert whole.min() >= 0
  assert whole.max() <= 1


def test_without_jitter_and_flip_nothing_changes():
  np.testing.assert_array_equal(augment.augment(_keys(), _images(), flip=0.0), augment.to_float(_images()))
