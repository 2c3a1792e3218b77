"""The interpreted kernel finds the groups of the oracle and of the plain rounds, and it lowers for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle_morphing as oracle
import pytest
from test_morphing import DECIDABLE, assert_canonical, clip_like_tokens

from dtm_jax import morphing
from dtm_jax.matching import rounds, tpu_kernel
from dtm_jax.morphers import bipartite

interpreted = functools.partial(tpu_kernel.kernel_rounds, interpret=True)
match = jax.jit(
  morphing.bipartite_match, static_argnames=("split", "protect_first", "merged_feature", "rounds")
)  # fmt: skip


def schedules(num_tokens):
  """Make schedules from none to all merged, one with a gap, and one with more than a round can merge."""
  n = num_tokens
  merges = [[0, 0, 0, 0], oracle.paper_merges(1, 4, n), oracle.paper_merges(n // 3 + 1, 3, n), [n, n, n, n]]
  merges += [oracle.released_merges(n // 2, 3, n), [n // 4, 0, n // 4, 1]]
  return np.stack([np.pad(m, (0, 4 - len(m))) for m in merges]).astype(np.int32)


@pytest.mark.parametrize(
  ("num_tokens", "split", "protect_first", "merged_feature"),
  [
    (49, "alternate", False, "size_weighted"),
    (50, "alternate", True, "size_weighted"),
    (196, "random", False, "size_weighted"),
    (7, "random", True, "mean_of_means"),
    (2, "random", True, "size_weighted"),
  ],
)
def test_groups_equal_the_oracle_and_the_plain_rounds(num_tokens, split, protect_first, merged_feature):
  merges_BK = schedules(num_tokens)
  target_BNC = clip_like_tokens(num_tokens, len(merges_BK), num_tokens)
  key = jax.random.key(num_tokens)
  options = dict(protect_first=protect_first, merged_feature=merged_feature)
  label = lambda way: np.array(
    match(jnp.array(target_BNC), jnp.array(merges_BK), split=split, key=key, rounds=way, **options)
  )
  label_BN, plain_BN = label(interpreted), label(None)
  order_BKN = [None] * len(merges_BK)
  if split == "random":
    order_BKN = np.array(rounds.random_order(key, *merges_BK.shape, num_tokens))

  decidable = 0
  for b, merges_K in enumerate(merges_BK):
    label_N, margin = oracle.match(target_BNC[b], merges_K, order_BKN[b], **options)
    assert len(np.unique(label_BN[b])) == len(np.unique(label_N))
    if margin > DECIDABLE:
      decidable += 1
      np.testing.assert_array_equal(label_BN[b], label_N, err_msg=f"{merges_K}")
      np.testing.assert_array_equal(label_BN[b], plain_BN[b], err_msg=f"{merges_K}")
  assert decidable >= len(merges_BK) - 1
  assert_canonical(label_BN)


def test_ties_and_tokens_without_direction_equal_the_plain_rounds():
  target_BNC = np.ones((3, 6, 2), np.float32)
  target_BNC[1, [2, 3]], target_BNC[2] = np.nan, 0.0
  merges_BK = jnp.array([[2, 0], [3, 1], [2, 2]])
  for protect_first in (False, True):
    kernel, plain = (
      match(jnp.array(target_BNC), merges_BK, protect_first=protect_first, rounds=way)
      for way in (interpreted, None)
    )
    np.testing.assert_array_equal(kernel, plain)


@pytest.mark.parametrize("split", morphing.SPLITS)
def test_the_kernel_lowers_for_a_tpu_only(split):
  """Lower it as the morpher calls it, with two schedules per image. Other platforms get the plain rounds."""
  assign = bipartite.build(split=split, implementation="pallas")
  keys_S = jax.random.split(jax.random.key(0), 2)
  tokens_BNC, images = jnp.zeros((2, 196, 512)), jnp.zeros((2, 224, 224, 3))
  traced = jax.jit(jax.vmap(assign, (0, None, None))).trace(keys_S, tokens_BNC, images)
  kernels = lambda platform: traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")
  assert [kernels(platform) for platform in ("tpu", "cpu", "cuda")] == [1, 0, 0]


def test_the_morpher_falls_back_to_the_plain_rounds():
  inputs = jnp.array(clip_like_tokens(0, 4, 50)), jnp.zeros((4, 8, 8, 3))
  label = lambda name: jax.jit(bipartite.build(implementation=name))(jax.random.key(0), *inputs)
  np.testing.assert_array_equal(label("pallas"), label("plain"))
  with pytest.raises(ValueError, match=r"'triton'.*plain, pallas"):
    bipartite.build(implementation="triton")
