"""Mixup, CutMix and random erasing against NumPy and against their distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax import augment

RNG = np.random.default_rng(0)
DRAWS = 4000
MIXUP, CUTMIX = {"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}
EITHER = {"mixup": 0.8, "cutmix": 1.0, "cutmix_prob": 0.3}


def draw_keys():
  return jax.random.split(jax.random.key(1), DRAWS)


@functools.cache
def weights(size, **options):
  """Return the mixing weights that each of `draw_keys` draws."""
  return np.asarray(jax.jit(jax.vmap(lambda key: augment.mixing_weights(key, size, **options)))(draw_keys()))


def test_a_batch_is_mixed_with_its_reverse_on_any_device():
  """The partner of an image may lie on another device."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  image = RNG.normal(size=(16, 6, 6, 3)).astype(np.float32)
  target = RNG.random((16, 4)).astype(np.float32)
  mix, shards = jax.jit(functools.partial(augment.mix, **EITHER)), jax.device_put((image, target), sharding)
  cut = set()
  for key, w in zip(draw_keys()[:10], weights((6, 6), **EITHER)[:10], strict=True):
    cut.add(is_cut := bool(np.all((w == 0) | (w == 1))))
    lam = (w == 1).sum() / 36 if is_cut else w[0, 0]  # the true area, not the drawn one
    mixed, mixed_target = map(np.array, mix(key, *shards))
    np.testing.assert_allclose(mixed, w[..., None] * image + (1 - w[..., None]) * image[::-1], atol=1e-6)
    np.testing.assert_allclose(mixed_target, lam * target + (1 - lam) * target[::-1], atol=1e-6)
  assert cut == {False, True}


def test_mixup_draws_from_its_beta_distribution():
  w = weights((2, 2), **MIXUP)
  assert np.all(w == w[:, :1, :1])
  lam = w[:, 0, 0]
  assert lam.mean() == pytest.approx(0.5, abs=0.02)
  assert lam.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.05)


def test_cutmix_boxes_have_the_distribution_of_a_numpy_oracle():
  """Areas and places have the distribution of boxes that NumPy draws by the same rule."""
  height, width = 12, 20
  w = weights((height, width), **CUTMIX)
  inside = w == 0
  assert set(np.unique(w)) <= {0.0, 1.0}
  oracle = np.zeros((DRAWS, height, width), bool)
  for box in oracle:
    side = np.sqrt(1 - RNG.beta(1, 1))
    h, y, x = int(height * side), RNG.integers(height), RNG.integers(width)
    v = int(width * side)
    box[max(y - h // 2, 0) : max(y + h // 2, 0), max(x - v // 2, 0) : max(x + v // 2, 0)] = True
  areas = [sample.mean(axis=(1, 2)) for sample in (inside, oracle)]
  np.testing.assert_allclose(*[(area.mean(), area.std()) for area in areas], atol=0.015)
  np.testing.assert_allclose(inside.mean(axis=0), oracle.mean(axis=0), atol=0.05)
  # Each is one rectangle.
  rows, columns = inside.any(axis=2), inside.any(axis=1)
  np.testing.assert_array_equal(inside, rows[:, :, None] & columns[:, None, :])


def test_cutmix_is_chosen_with_its_probability():
  w = weights((6, 6), **EITHER)
  cut = np.all((w == 0) | (w == 1), axis=(1, 2))
  assert cut.mean() == pytest.approx(0.3, abs=0.03)


def test_a_batch_stays_as_it_is_without_mixup_and_cutmix():
  image, target = jnp.ones((2, 4, 4, 3)), jnp.eye(2)
  assert augment.mix(jax.random.key(0), image, target, mixup=0.0, cutmix=0.0) == (image, target)


def erased(size, prob, **options):
  keys = jax.random.split(jax.random.key(0), DRAWS)
  image = np.full((DRAWS, *size, 3), 7.0, np.float32)
  return np.asarray(jax.jit(lambda k, x: augment.random_erase(k, x, prob, **options))(keys, image))


def test_erasing_replaces_boxes_by_noise():
  out = erased((16, 24), 0.25)
  inside = np.all(out != 7.0, axis=-1)
  np.testing.assert_array_equal(inside, np.any(out != 7.0, axis=-1))
  hit = inside.any(axis=(1, 2))
  assert hit.mean() == pytest.approx(0.25, abs=0.03)
  noise = out[inside]
  assert noise.mean() == pytest.approx(0, abs=0.02)
  assert noise.std() == pytest.approx(1, abs=0.02)
  rows, columns = inside.any(axis=2), inside.any(axis=1)
  np.testing.assert_array_equal(inside, rows[:, :, None] & columns[:, None, :])
  assert rows.sum(axis=1).max() < 16
  assert columns.sum(axis=1).max() < 24


def test_erased_boxes_have_the_distribution_of_a_numpy_oracle():
  height, width = 16, 24
  inside = np.any(erased((height, width), 1.0) != 7.0, axis=-1)
  oracle = np.zeros_like(inside)
  for box in oracle:
    for _ in range(10):
      area, ratio = height * width * RNG.uniform(0.02, 1 / 3), np.exp(RNG.uniform(np.log(0.3), -np.log(0.3)))
      h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
      if h < height and w < width:
        y, x = RNG.integers(height - h + 1), RNG.integers(width - w + 1)
        box[y : y + h, x : x + w] = True
        break
  for axis in (1, 2):
    sides = [sample.any(axis=3 - axis).sum(axis=1) for sample in (inside, oracle)]
    np.testing.assert_allclose(*[np.quantile(side, (0.1, 0.25, 0.5, 0.75, 0.9)) for side in sides], atol=1.0)
    assert sides[0].mean() == pytest.approx(sides[1].mean(), rel=0.04)
  np.testing.assert_allclose(inside.mean(axis=0), oracle.mean(axis=0), atol=0.05)


def test_an_image_in_which_no_box_fits_stays_as_it_is():
  assert np.all(erased((4, 4), 1.0, area=(2.0, 3.0)) == 7.0)
