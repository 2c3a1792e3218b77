"""Masks hide the exact number of patches, and block-wise masks have the distribution of a NumPy oracle."""

import functools
import importlib
import math
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax import masking

NUM_MASKS = 2000
draw = jax.jit(masking.masks, static_argnums=(0, 2, 3), static_argnames=("min_patches", "max_patches"))


def oracle_block_mask(rng, grid, num_masked, min_patches, max_patches, min_aspect=0.3):
  """Draw a mask by a loop over single rectangles. Numbers are Python's, which is quicker here than NumPy."""
  rows, columns = grid
  mask, left_over = np.zeros(grid, bool), num_masked
  while left_over:
    cap = min(left_over, max_patches)
    for _ in range(10):
      area = rng.uniform(min(min_patches, cap), max(min_patches, cap))
      aspect = math.exp(rng.uniform(math.log(min_aspect), -math.log(min_aspect)))
      height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
      if width < columns and height < rows:
        top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
        box = mask[top : top + height, left : left + width]
        if 0 < (added := box.size - np.count_nonzero(box)) <= cap:
          box[:] = True
          left_over -= added
          break
    else:
      break
  mask.flat[rng.sample(np.flatnonzero(~mask).tolist(), left_over)] = True
  return mask


CASES = {
  "default": ((14, 14), 75, 16, None),
  "capped blocks": ((14, 14), 75, 16, 25),
  "small grid": ((8, 8), 25, 4, None),
  "not square": ((6, 12), 30, 4, None),
}
# The default is square too, and the case that is not square has few patches too.
cases = pytest.mark.parametrize(
  "case", [pytest.param(case, marks=[pytest.mark.long] * (case == "small grid")) for case in CASES]
)


@functools.cache
def both(case):
  """Return NUM_MASKS masks [mask, H, W] of the package, and as many of the oracle."""
  grid, num_masked, min_patches, max_patches = CASES[case]
  keys = jax.random.split(jax.random.key(0), NUM_MASKS)
  ours = draw("block", keys, grid, num_masked, min_patches=min_patches, max_patches=max_patches)
  rng = random.Random(0)
  theirs = [
    oracle_block_mask(rng, grid, num_masked, min_patches, max_patches or num_masked) for _ in range(NUM_MASKS)
  ]
  return np.array(ours).reshape(-1, *grid), np.stack(theirs)


def assert_same_mean(ours, theirs, bound=5.0):
  """Compare the means over masks by a two-sample z test. Of some hundred statistics, none should exceed 5."""
  deviation = np.sqrt((ours.var(0) + theirs.var(0)) / NUM_MASKS)
  assert (np.abs(ours.mean(0) - theirs.mean(0)) <= bound * deviation + 1e-9).all()


@cases
def test_block_masks_hide_the_exact_number(case):
  masks, _ = both(case)
  assert masks.dtype == bool
  assert (masks.sum((1, 2)) == CASES[case][1]).all()


@cases
def test_every_position_is_hidden_as_often_as_in_the_oracle(case):
  ours, theirs = both(case)
  assert_same_mean(ours.astype(float), theirs.astype(float))


@cases
def test_blocks_have_the_sizes_of_the_oracle(case):
  """Compare statistics that depend on the size and aspect of the blocks.

  Edges between hidden and visible patches, by direction, measure size and aspect. Pairs of hidden patches at
  a distance measure how far the blocks reach.
  """
  for statistic in (
    lambda m: (m[:, 1:] != m[:, :-1]).sum((1, 2)),
    lambda m: (m[:, :, 1:] != m[:, :, :-1]).sum((1, 2)),
    lambda m: (m[:, 3:] & m[:, :-3]).sum((1, 2)),
    lambda m: (m[:, :, 5:] & m[:, :, :-5]).sum((1, 2)),
    lambda m: m.any(2).sum(1),
    lambda m: m.any(1).sum(1),
  ):
    assert_same_mean(*(statistic(m) for m in both(case)))


def test_corners_are_rarely_hidden_and_the_centre_often():
  """The known frequencies of this generator are 0.04 and 0.72."""
  frequency = both("default")[0].mean(0)
  np.testing.assert_allclose(frequency[[0, 0, -1, -1], [0, -1, 0, -1]], 0.04, atol=0.02)
  np.testing.assert_allclose(frequency[6:8, 6:8], 0.72, atol=0.04)


def test_random_masks_are_uniform_and_exact():
  masks = np.array(draw("random", jax.random.split(jax.random.key(1), NUM_MASKS), (6, 12), 30))
  assert (masks.sum(1) == 30).all()
  share = 30 / 72
  np.testing.assert_allclose(masks.mean(0), share, atol=5 * np.sqrt(share * (1 - share) / NUM_MASKS))


@pytest.mark.parametrize("kind", masking.MASKS)
@pytest.mark.parametrize(("grid", "num_masked"), [((14, 14), 0), ((14, 14), 196), ((1, 5), 3), ((1, 1), 1)])
def test_masks_of_no_patch_and_of_all_patches_are_exact(kind, grid, num_masked):
  masks = draw(kind, jax.random.split(jax.random.key(2), 8), grid, num_masked)
  np.testing.assert_array_equal(np.array(masks).sum(1), [num_masked] * 8)


@pytest.mark.parametrize("kind", masking.MASKS)
def test_a_mask_is_a_function_of_its_key(kind):
  keys = jax.random.split(jax.random.key(3), 5)
  masks = np.array(draw(kind, keys, (14, 14), 75))
  assert len({mask.tobytes() for mask in masks}) == 5
  np.testing.assert_array_equal(draw(kind, keys[::-1], (14, 14), 75), masks[::-1])


@pytest.mark.parametrize("kind", masking.MASKS)
@pytest.mark.parametrize("num_masked", [-1, 65])
def test_impossible_numbers_are_refused(kind, num_masked):
  with pytest.raises(ValueError, match=rf"num_masked={num_masked} of the 64 patches of a \(8, 8\) grid"):
    masking.MASKS[kind](jax.random.key(0), (8, 8), num_masked)


@pytest.mark.parametrize("options", [{"min_patches": 0}, {"max_patches": -1}, {"min_aspect": 0.0}])
def test_blocks_with_impossible_limits_are_refused(options):
  with pytest.raises(ValueError, match="Blocks need"):
    masking.block_mask(jax.random.key(0), (8, 8), 25, **options)


def test_an_unknown_kind_lists_the_choices():
  with pytest.raises(ValueError, match=r"Unknown mask 'grid'\. Available: block, random"):
    masking.masks("grid", jnp.stack([jax.random.key(0)]), (8, 8), 25)


RELEASED = ((14, 14), 75, 16)
SMALL = ((8, 8), 25, 4)
SHIPPED = {
  "vitb16": RELEASED, "vits16": RELEASED, "vitl16": RELEASED, "vitb16_released": RELEASED,
  "quickstart": SMALL, "debug": SMALL, "comparisons_cifar10": SMALL, "claim_cifar10": SMALL,
}  # fmt: skip
"""Grid, hidden patches and smallest block of each config, by the numbers it had before it had shares."""


def test_the_shipped_configs_hide_the_same_numbers_of_patches_as_before():
  configs = {}
  for path in (Path(__file__).parents[1] / "configs").glob("*.py"):
    module = importlib.import_module(f"configs.{path.stem}")
    if path.stem not in ("__init__", "common") and "mask" in (config := module.get_config()):
      configs[path.stem] = config
  assert configs.keys() == SHIPPED.keys()
  for name, config in configs.items():
    grid, num_masked, min_patches = SHIPPED[name]
    assert grid == (config.data.image_size // config.student.patch_size,) * 2
    options = dict(config.mask)
    shares = {key: options.pop(key) for key in ("num_masked", "share", "min_patches", "min_block")}
    assert masking.counts(grid, **shares) == {"num_masked": num_masked, "min_patches": min_patches}, name
    assert options == {"kind": "block"}
