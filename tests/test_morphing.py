"""Dynamic token morphing equals a slow oracle and has the properties that the paper's equations imply."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import oracle_morphing as oracle
import pytest

from dtm_jax import morphing, partitions, rngs
from dtm_jax.matching import rounds

NUM_TOKENS = (1, 2, 7, 50, *(pytest.param(n, marks=pytest.mark.long) for n in (16, 49, 64, 196, 197)))
"""The long numbers are close to 7 and 50, or to the 196 tokens of test_matching.py."""
DECIDABLE = 3e-7
"""float32 decides differently from float64 only if two similarities are within 2e-7, as far as observed."""

match = jax.jit(
  morphing.bipartite_match, static_argnames=("split", "protect_first", "merged_feature")
)  # fmt: skip
morph = jax.jit(morphing.morph)
loss_and_gradient = jax.jit(
  jax.value_and_grad(morphing.dtm_loss), static_argnames=("distance", "normalize_target")
)  # fmt: skip


def clip_like_tokens(seed, batch_size, num_tokens, width=32):
  """Make tokens of a common direction, a few objects and noise. Every other image has noise only."""
  rng = np.random.default_rng(seed)
  objects = rng.normal(size=(batch_size, 6, width))[:, rng.integers(0, 6, num_tokens)]
  structure = 1.5 * rng.normal(size=width) + objects
  structure[1::2] = 0
  return (structure + rng.normal(size=(batch_size, num_tokens, width))).astype(np.float32)


def grid_of_schedules(num_tokens, max_rounds):
  """Make paper and released schedules, from none merged to more than can merge."""
  merges = [oracle.paper_merges(1, 1, num_tokens), oracle.paper_merges(num_tokens, max_rounds, num_tokens)]
  for share in (0.0, 0.3, 0.7, 0.97):
    for k in (1, 2, 5, max_rounds):
      n = max(1, round(share * num_tokens))
      merges += [oracle.paper_merges(n, k, num_tokens), oracle.released_merges(num_tokens - n, k, num_tokens)]
  return np.stack([np.pad(m, (0, max_rounds - len(m))) for m in merges]).astype(np.int32)


# Schedule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 7, 196])
def test_merges_equal_both_rules(num_tokens):
  max_rounds = 14
  n, k = (x.ravel() for x in np.meshgrid(np.arange(1, num_tokens + 1), np.arange(1, max_rounds + 1)))
  rules = (morphing.paper_merges, morphing.released_merges)
  merges = lambda n, k: [rule(n, k, num_tokens, max_rounds) for rule in rules]
  paper, released = map(np.array, jax.jit(jax.vmap(merges))(n, k))
  pad = lambda merges: np.pad(merges, (0, max_rounds - len(merges)))
  np.testing.assert_array_equal(
    paper, [pad(oracle.paper_merges(*nk, num_tokens)) for nk in zip(n, k, strict=True)]
  )
  np.testing.assert_array_equal(
    released, [pad(oracle.released_merges(*mk, num_tokens)) for mk in zip(n, k, strict=True)]
  )
  np.testing.assert_array_equal(paper.sum(1), num_tokens - n)


def test_released_merges_by_hand():
  np.testing.assert_array_equal(morphing.released_merges(7, 3, 196, 5), [3, 3, 3, 0, 0])
  np.testing.assert_array_equal(morphing.released_merges(195, 14, 196, 14), [14] * 14)  # 14 * 14 = 196
  np.testing.assert_array_equal(morphing.released_merges(196, 13, 196, 14), [15] * 13 + [0])  # 16 * 13 > 196
  np.testing.assert_array_equal(morphing.released_merges(0, 3, 196, 5), [0] * 5)


def test_draws_cover_the_whole_range():
  keys = jax.random.split(jax.random.key(0), 4000)
  draw = lambda key: [
    morphing.paper_schedule(key, 20, 5, 4),
    morphing.paper_schedule(key, 20, 7, 4, max_groups=7),
    morphing.released_schedule(key, 20, 12, 4),
  ]
  paper, fixed, released = map(np.array, jax.jit(jax.vmap(draw))(keys))
  assert set(20 - paper.sum(1)) == set(range(5, 21))
  rounds = np.array([np.flatnonzero(m)[-1] + 1 for m in paper if m.sum() >= 4])
  assert np.bincount(rounds)[1:].min() > 0.2 * len(rounds)
  assert set(20 - fixed.sum(1)) == {7}
  possible = {
    tuple(np.pad(oracle.released_merges(m, k, 12), (0, 4 - k))) for m in range(13) for k in range(1, 5)
  }
  assert set(map(tuple, released)) == possible


@pytest.mark.parametrize(
  "draw",
  [
    lambda key: morphing.paper_schedule(key, 16, 0, 4),
    lambda key: morphing.paper_schedule(key, 16, 17, 4),
    lambda key: morphing.paper_schedule(key, 16, 1, 0),
    lambda key: morphing.paper_schedule(key, 16, 5, 4, max_groups=4),
    lambda key: morphing.paper_schedule(key, 16, 1, 4, max_groups=17),
    lambda key: morphing.released_schedule(key, 16, 17, 4),
  ],
)
def test_impossible_schedules_are_refused(draw):
  with pytest.raises(ValueError, match="must be at least"):
    draw(jax.random.key(0))


# Matching ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protect_first", [False, True])
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_alternate_split_equals_the_oracle(num_tokens, protect_first):
  assert_groups_equal_the_oracle(num_tokens, "alternate", protect_first, "size_weighted")


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_random_split_equals_the_oracle(num_tokens):
  assert_groups_equal_the_oracle(num_tokens, "random", False, "size_weighted")


@pytest.mark.parametrize("num_tokens", [2, 7, 50])
def test_protected_random_split_equals_the_oracle(num_tokens):
  assert_groups_equal_the_oracle(num_tokens, "random", True, "size_weighted")


@pytest.mark.parametrize("split", morphing.SPLITS)
def test_mean_of_means_equals_the_oracle(split):
  assert_groups_equal_the_oracle(50, split, False, "mean_of_means")


def assert_groups_equal_the_oracle(num_tokens, split, protect_first, merged_feature):
  merges_BK = grid_of_schedules(num_tokens, max_rounds=14)
  target_BNC = clip_like_tokens(num_tokens, len(merges_BK), num_tokens)
  key = jax.random.key(num_tokens)
  options = {"protect_first": protect_first, "merged_feature": merged_feature}
  label_BN = np.array(match(target_BNC, merges_BK, split=split, key=key, **options))
  order_BKN = [None] * len(merges_BK)
  if split == "random":
    order_BKN = np.array(rounds.random_order(key, *merges_BK.shape, num_tokens))

  decidable = 0
  for b, (target_NC, merges_K) in enumerate(zip(target_BNC, merges_BK, strict=True)):
    label_N, margin = oracle.match(target_NC, merges_K, order_BKN[b], **options)
    count = oracle.num_groups(merges_K, num_tokens, protect_first)
    assert len(np.unique(label_BN[b])) == len(np.unique(label_N)) == count
    if margin > DECIDABLE:
      decidable += 1
      np.testing.assert_array_equal(label_BN[b], label_N, err_msg=f"{merges_K}")
  assert decidable >= 0.8 * len(merges_BK)
  assert label_BN.dtype == np.int32
  assert_canonical(label_BN)
  if protect_first:
    assert not (label_BN[:, 1:] == 0).any()


def assert_canonical(label_BN):
  """The id of every group is its smallest member."""
  for label_N in label_BN:
    for g in np.unique(label_N):
      assert g == np.flatnonzero(label_N == g)[0]


def test_released_rounds_by_hand():
  """Match angles on a circle with a protected first token. In round 1, 0, 2, 4, 6 choose among 1, 3, 5, 7."""
  angle = np.array([0, 1, 10, 12, 20, 41, 40, 90.0])
  target_NC = np.stack([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))], -1).astype(np.float32)
  one_round, two_rounds = match(np.stack([target_NC] * 2), np.array([[2, 0], [2, 1]]), protect_first=True)
  np.testing.assert_array_equal(one_round, [0, 1, 2, 2, 4, 5, 5, 7])  # 6 with 5 and 2 with 3 are closest
  # The live order is now 0, 4, 1, {2, 3}, {5, 6}, 7. Token 1 is nearer to {2, 3} than {5, 6} is to 4.
  np.testing.assert_array_equal(two_rounds, [0, 1, 1, 1, 4, 5, 5, 7])


def test_a_round_without_merges_changes_nothing():
  target_BNC = clip_like_tokens(0, 4, 33)
  for protect_first in (False, True):
    plain = match(target_BNC, np.array([5, 6, 0, 0]), protect_first=protect_first)
    gaps = match(target_BNC, np.array([0, 5, 0, 6]), protect_first=protect_first)
    np.testing.assert_array_equal(plain, gaps)


def test_the_first_in_the_live_order_wins_a_tie():
  same, merges_K = np.tile(np.eye(1, 32, dtype=np.float32), (4, 33, 1)), np.array([2, 0, 0, 0])
  rest = range(6, 33)
  np.testing.assert_array_equal(match(same, merges_K)[0], [0, 0, 0, 3, 4, 5, *rest])
  np.testing.assert_array_equal(match(same, merges_K, protect_first=True)[0], [0, 1, 1, 3, 1, 5, *rest])


def test_one_schedule_for_the_batch_equals_the_same_schedule_for_each_image():
  target_BNC = clip_like_tokens(1, 4, 33)
  merges_K = np.array([9, 4, 0, 0])
  np.testing.assert_array_equal(match(target_BNC, merges_K), match(target_BNC, np.tile(merges_K, (4, 1))))


def test_random_split_differs_between_images_rounds_and_keys():
  target_BNC, merges_BK = np.tile(clip_like_tokens(2, 1, 50), (8, 1, 1)), np.zeros((8, 14), int)
  merges_BK[:, 0] = 20
  label_BN, other_BN = (
    np.array(match(target_BNC, merges_BK, split="random", key=jax.random.key(seed))) for seed in (0, 1)
  )
  assert len({row.tobytes() for row in (*label_BN, *other_BN)}) == 16
  order_BKN = np.array(rounds.random_order(jax.random.key(0), 3, 2, 64))
  assert len(np.unique(order_BKN)) > 0.99 * order_BKN.size


def test_random_split_pairs_any_two_tokens():
  """Of 8 tokens two are alike. One merge joins them whenever the split parts them, with probability 4/7."""
  target_NC = np.eye(8, dtype=np.float32)
  target_NC[6] = target_NC[2]  # both are in the first set of an alternate split
  label_BN = match(
    np.tile(target_NC, (2000, 1, 1)), np.array([1]), split="random", key=jax.random.key(3)
  )  # fmt: skip
  joined = np.mean(np.array(label_BN)[:, 6] == 2)
  assert abs(joined - 4 / 7) < 5 * np.sqrt(4 / 7 * 3 / 7 / 2000)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("split", morphing.SPLITS)
def test_a_token_without_direction_merges_last(bad, split):
  num_tokens = 16
  target_BNC = clip_like_tokens(4, 4, num_tokens)
  target_BNC[:, [3, 8]] = bad
  merges_BK = np.array([[5, 0, 0, 0], [8, 2, 0, 0], [8, 4, 1, 0], [15, 15, 15, 15]], np.int32)
  label_BN = np.array(match(target_BNC, merges_BK, split=split, key=jax.random.key(0)))
  assert_canonical(label_BN)
  for label_N, merges_K in zip(label_BN, merges_BK, strict=True):
    assert len(np.unique(label_N)) == oracle.num_groups(merges_K, num_tokens, False)
  assert (label_BN[0] == 3).sum() == (label_BN[0] == 8).sum() == 1


def test_a_bad_token_changes_no_other_image_and_no_other_token():
  target_BNC = clip_like_tokens(5, 4, 33)
  spoilt = target_BNC.copy()
  spoilt[1, 20] = np.nan
  merges = np.array([10, 0, 0, 0])
  label_BN, spoilt_BN = np.array(match(target_BNC, merges)), np.array(match(spoilt, merges))
  np.testing.assert_array_equal(label_BN[[0, 2, 3]], spoilt_BN[[0, 2, 3]])
  assert spoilt_BN[1, 20] == 20
  assert len(np.unique(spoilt_BN[1])) == 23


def test_half_precision_tokens_are_compared_in_float32():
  target_BNC = clip_like_tokens(6, 4, 33).astype(jnp.bfloat16)
  merges = np.array([12, 7, 0, 0])
  np.testing.assert_array_equal(match(target_BNC, merges), match(target_BNC.astype(np.float32), merges))


# Partitions and morphing -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def partition():
  """Tokens of 8 images, and labels with 1 to 50 groups."""
  target_BNC = clip_like_tokens(7, 8, 50)
  n, k = np.array([1, 2, 5, 10, 25, 40, 49, 50]), np.array([14, 14, 9, 4, 2, 1, 1, 1])
  merges_BK = jax.jit(jax.vmap(lambda n, k: morphing.paper_merges(n, k, 50, 14)))(n, k)
  return target_BNC, np.array(match(target_BNC, merges_BK, split="random", key=jax.random.key(0)))


def test_the_paper_schedule_leaves_exactly_its_number_of_groups(partition):
  counts = jax.jit(partitions.num_groups)(partition[1])
  np.testing.assert_array_equal(counts[2:], [5, 10, 25, 40, 49, 50])


def test_group_sizes_sum_to_the_number_of_tokens(partition):
  size_BN = np.array(jax.jit(partitions.group_sizes)(partition[1]))
  np.testing.assert_array_equal(size_BN.sum(1), [50] * 8)
  for size_N, label_N in zip(size_BN, partition[1], strict=True):
    np.testing.assert_array_equal(size_N, np.bincount(label_N, minlength=50))


def test_canonical_labels_do_not_depend_on_the_names_of_the_groups(partition):
  names = np.random.default_rng(1).permutation(50)
  np.testing.assert_array_equal(jax.jit(partitions.canonical_labels)(names[partition[1]]), partition[1])


def test_morphing_keeps_the_weighted_sum(partition):
  tokens_BNC, label_BN = partition
  morphed_BNC = np.array(morph(tokens_BNC, label_BN))
  size_BN = np.stack([np.bincount(label_N, minlength=50) for label_N in label_BN])
  weighted = np.einsum("bn,bnc->bc", size_BN, morphed_BNC)  # v̂_i stands at its id i
  np.testing.assert_allclose(weighted, tokens_BNC.sum(1), rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(morphed_BNC.sum(1), tokens_BNC.sum(1), rtol=1e-5, atol=1e-4)


def test_morphing_twice_is_morphing_once(partition):
  once = morph(*partition)
  np.testing.assert_allclose(morph(once, partition[1]), once, rtol=1e-5, atol=1e-5)


def test_ranks_of_equal_values_keep_their_order():
  value_N = np.array([0.5, 0.9, 0.5, -np.inf, 0.9, 0.1, -np.inf], np.float32)
  rank = jax.jit(rounds.rank)
  np.testing.assert_array_equal(rank(-value_N), [2, 0, 3, 5, 1, 4, 6])
  np.testing.assert_array_equal(rank(value_N), np.argsort(np.argsort(value_N, kind="stable")))


@pytest.mark.parametrize("add", [rounds._scatter_at, rounds._product_at])
def test_sums_on_every_platform_are_the_same(add):
  """Compare the scatter of CPUs with the product of other devices. Rows with place 7 = N are dropped."""
  rng = np.random.default_rng(2)
  x_NC, place_N = rng.normal(size=(7, 5)).astype(np.float32), rng.integers(0, 8, 7)
  expected = [sum((x_NC[j] for j in range(7) if place_N[j] == i), np.zeros(5)) for i in range(7)]
  np.testing.assert_allclose(jax.jit(add)(place_N, x_NC), expected, atol=1e-6)


@pytest.mark.parametrize("merged_feature", morphing.MERGED_FEATURES)
def test_groups_on_every_platform_are_the_same(monkeypatch, merged_feature):
  merges_BK = grid_of_schedules(50, 14)
  target_BNC = clip_like_tokens(5, len(merges_BK), 50)
  here = match(target_BNC, merges_BK, merged_feature=merged_feature)
  monkeypatch.setattr(rounds, "_scatter_at", rounds._product_at)
  elsewhere = jax.jit(lambda *inputs: morphing.bipartite_match(*inputs, merged_feature=merged_feature))
  np.testing.assert_array_equal(here, elsewhere(target_BNC, merges_BK))


def test_morphing_equals_the_oracle(partition):
  expected = [oracle.morph(*image) for image in zip(*partition, strict=True)]
  np.testing.assert_allclose(morph(*partition), expected, rtol=1e-5, atol=1e-6)


# Loss --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example():
  rng = np.random.default_rng(8)
  student_BNC = rng.normal(size=(3, 16, 12)).astype(np.float32)
  target_BNC = 3 * rng.normal(size=(3, 16, 12)).astype(np.float32)
  draw = lambda key: morphing.bipartite_match(
    jnp.array(target_BNC), morphing.paper_schedule(key, 16, 1, 5), split="random", key=key
  )
  label_SBN = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4))
  return student_BNC, target_BNC, np.array(label_SBN)


@pytest.mark.parametrize("normalize_target", [False, True])
@pytest.mark.parametrize("distance", morphing.DISTANCES)
def test_loss_equals_the_oracle(example, distance, normalize_target):
  value, _ = loss_and_gradient(*example, distance=distance, normalize_target=normalize_target)
  expected = oracle.loss(*example, distance, normalize_target)
  np.testing.assert_allclose(value, expected, rtol=5e-6)


def test_one_token_per_group_and_one_group_are_the_token_wise_and_image_level_losses(example):
  student, target, _ = example
  each, one = np.tile(np.arange(16, dtype=np.int32), (4, 3, 1)), np.zeros((4, 3, 16), np.int32)
  loss = lambda label_SBN: loss_and_gradient(student, target, label_SBN, distance="smooth_l1")[0]
  token_wise = oracle.distance(student, target, "smooth_l1").mean()
  image_level = oracle.distance(student.mean(1), target.mean(1), "smooth_l1").mean()
  np.testing.assert_allclose(loss(each), token_wise, rtol=1e-5)
  np.testing.assert_allclose(loss(one), image_level, rtol=1e-5)
  assert abs(token_wise - image_level) > 0.1


def test_loss_is_the_papers_sum_over_groups(example):
  """The loss is (1/N) Σ_i w_i d(û_i, v̂_i). The value of group i stands at place i."""
  student, target, label_SBN = example
  label_BN = label_SBN[0]
  distance = oracle.distance(morph(student, label_BN), np.array(morph(target, label_BN)), "smooth_l1")
  size_BN = np.stack([np.bincount(label_N, minlength=16) for label_N in label_BN])
  expected = np.mean(np.sum(size_BN * distance, axis=1) / 16)
  value, _ = loss_and_gradient(student, target, np.stack([label_BN] * 4), distance="smooth_l1")
  np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("distance", morphing.DISTANCES)
def test_gradient_equals_finite_differences(example, distance):
  student, target, label_SBN = example
  _, gradient = loss_and_gradient(*example, distance=distance, normalize_target=False)
  gradient = np.array(gradient, np.float64)
  direction = np.random.default_rng(9).normal(size=student.shape)
  student, step = student.astype(np.float64), 1e-6
  ahead, behind = (
    oracle.loss(student + sign * step * direction, target, label_SBN, distance, False) for sign in (1, -1)
  )
  np.testing.assert_allclose((gradient * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-4)


def test_no_gradient_reaches_the_target(example):
  student, target, label_SBN = map(jnp.array, example)

  def loss(target):
    label_BN = morphing.bipartite_match(target, jnp.array([4, 2]))
    return morphing.dtm_loss(student, target, jnp.concatenate([label_SBN, label_BN[None]]))

  np.testing.assert_array_equal(jax.jit(jax.grad(loss))(target), np.zeros_like(target))


def test_cosine_gradient_is_finite_at_zero(example):
  student, target, label_SBN = example
  _, gradient = loss_and_gradient(
    np.zeros_like(student), target, label_SBN, distance="cosine", normalize_target=False
  )
  assert np.isfinite(gradient).all()


def test_half_precision_inputs_give_a_float32_loss(example):
  student, target = (x.astype(jnp.bfloat16) for x in example[:2])
  value, _ = loss_and_gradient(student, target, example[2])
  assert value.dtype == jnp.float32
  expected, _ = loss_and_gradient(student.astype(np.float32), target.astype(np.float32), example[2])
  np.testing.assert_array_equal(value, expected)


# All together ------------------------------------------------------------------------------------------


def whole(key, student_BNC, target_BNC):
  """Compute the loss of two schedules: draw, match, morph and compare."""
  batch_size, num_tokens, _ = target_BNC.shape

  def assign(key):
    keys_B = rngs.per_example(key, batch_size)
    merges_BK = jax.vmap(lambda key: morphing.paper_schedule(key, num_tokens, 1, 6))(keys_B)
    return morphing.bipartite_match(target_BNC, merges_BK, split="random", key=key)

  label_SBN = jax.vmap(assign)(jax.random.split(key, 2))
  return morphing.dtm_loss(student_BNC, target_BNC, label_SBN), label_SBN


def test_a_thousand_draws_need_one_trace():
  traces = []

  @jax.jit
  def step(keys, student_BNC, target_BNC):
    traces.append(1)
    return jax.vmap(whole, (0, None, None))(keys, student_BNC, target_BNC)

  student_BNC, target_BNC = (clip_like_tokens(seed, 2, 16, 8) for seed in (10, 11))
  losses = [step(keys, student_BNC, target_BNC)[0] for keys in jax.random.split(jax.random.key(0), (50, 20))]
  assert len(traces) == 1
  assert step._cache_size() == 1
  assert np.isfinite(losses).all()
  assert len(np.unique(losses)) > 900


def test_eight_devices_find_the_same_groups_as_one():
  student_BNC, target_BNC = (clip_like_tokens(seed, 16, 49) for seed in (12, 13))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  by_image = jax.NamedSharding(mesh, jax.P("data"))
  step = jax.jit(whole)
  loss, label_SBN = step(jax.random.key(0), student_BNC, target_BNC)
  sharded = (jax.device_put(x, by_image) for x in (student_BNC, target_BNC))
  loss_8, label_SBN_8 = step(jax.random.key(0), *sharded)
  assert len(label_SBN_8.sharding.device_set) == 8
  np.testing.assert_array_equal(label_SBN, label_SBN_8)
  np.testing.assert_allclose(loss, loss_8, rtol=1e-6)


@pytest.fixture
def without_shape_checks(monkeypatch):
  """Call the functions as in production. The tests' shape checks would raise before our own errors do."""
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"split": "even"}, "Unknown split 'even'. Available: alternate, random"),
    ({"merged_feature": "max"}, "Unknown merged_feature 'max'. Available: size_weighted, mean_of_means"),
    ({"split": "random"}, "needs a key"),
    ({"merges_BK": jnp.ones((3, 4), int)}, r"merges_BK \(3, 4\) .* target_BNC \(2, 16, 8\)"),
    ({"merges_BK": jnp.int32(3)}, r"merges_BK \(\) must be"),
  ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_matching_refuses(options, message):
  arguments = {"merges_BK": jnp.array([3]), **options}
  with pytest.raises(ValueError, match=message):
    morphing.bipartite_match(jnp.ones((2, 16, 8)), **arguments)


@pytest.mark.parametrize(
  ("student", "target", "label", "message"),
  [
    ((2, 16, 8), (2, 16, 9), (1, 2, 16), r"\(2, 16, 8\) where target_BNC has \(2, 16, 9\)"),
    ((2, 16, 8), (2, 16, 8), (1, 2, 15), r"\(2, 16\) where label_SBN has \(2, 15\)"),
    ((2, 16, 8), (2, 16, 8), (2, 16), r"\(2, 16\) where label_SBN has \(16,\)"),
  ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_loss_refuses_shapes(student, target, label, message):
  with pytest.raises(ValueError, match=message):
    morphing.dtm_loss(jnp.ones(student), jnp.ones(target), jnp.zeros(label, int))


def test_loss_refuses_an_unknown_distance(example):
  with pytest.raises(ValueError, match=r"Unknown distance 'huber'\. Available: smooth_l1, l1, l2, cosine"):
    loss_and_gradient(*example, distance="huber")


@pytest.mark.usefixtures("without_shape_checks")
def test_morph_refuses_shapes():
  with pytest.raises(ValueError, match=r"tokens_BND has \(2, 16\) where label_BN has \(2, 15\)"):
    morphing.morph(jnp.ones((2, 16, 8)), jnp.zeros((2, 15), int))
