"""k-means, k-medoids and SLIC equal NumPy's results and keep their promises."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle_clustering as oracle
import pytest

from dtm_jax.morphers import _clustering as clustering
from dtm_jax.morphers import superpixel
from dtm_jax.morphers.kmeans import kmeans
from dtm_jax.morphers.kmedoids import kmedoids

NUM_TOKENS, WIDTH, MAX_GROUPS = 64, 16, 24
GRID = (8, 8)
ALGORITHMS = [
  (kmeans, oracle.kmeans, oracle.kmeans_objective),
  (kmedoids, oracle.kmedoids, oracle.kmedoids_objective),
]
kmeans_and_kmedoids = pytest.mark.parametrize(
  ("algorithm", "reference", "objective"), ALGORITHMS, ids=["kmeans", "kmedoids"]
)
cosine_similarity = jax.jit(clustering.cosine_similarity)
choose_seeds = jax.jit(clustering.seeds, static_argnums=(2, 3))
cluster = jax.jit(
  lambda algorithm, sim_NN, seed_M, num_groups, iterations: algorithm(
    sim_NN, seed_M, num_groups, iterations=iterations
  ),
  static_argnums=0,
)
slic = jax.jit(superpixel.slic, static_argnames=("grid", "max_groups", "compactness", "iterations"))
seed_patches = jax.jit(superpixel.seed_patches, static_argnums=(1, 2))


def make_tokens(seed, num_objects=6, noise=1.0):
  """Make tokens of a few objects, and return the object of each."""
  rng = np.random.default_rng(seed)
  owner = rng.permutation(np.arange(NUM_TOKENS) % num_objects)
  objects = rng.normal(size=(num_objects, WIDTH))
  tokens = objects[owner] + noise * rng.normal(size=(NUM_TOKENS, WIDTH))
  return tokens.astype(np.float32), owner


def same_group(label):
  return label[:, None] == label[None, :]


# Cosines, seeds, empty groups ---------------------------------------------------------------------------


def test_cosines_do_not_depend_on_scale_and_are_zero_without_direction():
  tokens, _ = make_tokens(0)
  tokens[3], tokens[5, 0] = 0.0, np.nan
  sim_NN = np.array(cosine_similarity(tokens))
  rest = np.delete(np.arange(NUM_TOKENS), [3, 5])
  expected = 1 - oracle.cosine_distance(tokens[rest].astype(np.float64))
  np.testing.assert_allclose(sim_NN[np.ix_(rest, rest)], expected, atol=1e-5)
  np.testing.assert_array_equal(sim_NN[[3, 5]], 0.0)
  scaled = tokens * (1 + np.arange(NUM_TOKENS, dtype=np.float32))[:, None]
  np.testing.assert_allclose(cosine_similarity(scaled), sim_NN, atol=1e-5)


@pytest.mark.parametrize("init", clustering.INITS)
def test_seeds_are_different_tokens_even_if_all_tokens_are_equal(init):
  sim_NN = np.ones((NUM_TOKENS, NUM_TOKENS), np.float32)
  seed_M = choose_seeds(jax.random.key(0), sim_NN, NUM_TOKENS, init)
  np.testing.assert_array_equal(np.sort(seed_M), np.arange(NUM_TOKENS))


def test_kmeans_plus_plus_samples_by_squared_distance():
  """χ² test over the 20 pairs of 5 tokens: the first is uniform, the second proportional to 1 - cos."""
  tokens = make_tokens(1)[0][:5]
  sim_NN, draws = cosine_similarity(tokens), 20_000
  keys = jax.random.split(jax.random.key(0), draws)
  seed_S2 = np.array(jax.jit(jax.vmap(lambda key: clustering.seeds(key, sim_NN, 2, "k-means++")))(keys))
  distance = oracle.cosine_distance(tokens.astype(np.float64))
  expected = draws / 5 * distance / distance.sum(1, keepdims=True)
  counts = np.zeros((5, 5))
  np.add.at(counts, tuple(seed_S2.T), 1)
  assert counts.trace() == 0
  off = ~np.eye(5, dtype=bool)
  assert ((counts - expected)[off] ** 2 / expected[off]).sum() < 43.8  # 19 degrees of freedom, p = 0.001


def test_kmeans_plus_plus_finds_every_one_of_distant_objects():
  tokens, owner = make_tokens(2, num_objects=6, noise=0.01)
  keys = jax.random.split(jax.random.key(0), 50)
  sim_NN = cosine_similarity(tokens)
  seed_SM = jax.jit(jax.vmap(lambda key: clustering.seeds(key, sim_NN, 6, "k-means++")))(keys)
  found = [len(set(owner[np.array(seed_M)])) for seed_M in seed_SM]
  assert np.mean(np.array(found) == 6) > 0.9


def test_empty_groups_take_the_farthest_tokens():
  slot_N = jnp.array([0, 0, 0, 2, 2, 0, 3])
  distance_N = jnp.array([0.1, 0.9, 0.5, 0.8, 0.3, 0.7, 1.0])
  jitted = jax.jit(lambda num_groups: clustering.fill_empty(slot_N, distance_N, num_groups, 7))
  fill = lambda num_groups: jitted(num_groups).tolist()
  assert fill(4) == [0, 1, 0, 2, 2, 0, 3]  # group 1 was empty; the farthest token is alone, so it stays
  assert fill(5) == [0, 1, 0, 4, 2, 0, 3]  # group 4 was empty too
  assert fill(7) == [0, 1, 6, 4, 2, 5, 3]  # tokens 0 and 4 are nearest to their centres, so they stay


# k-means and k-medoids ----------------------------------------------------------------------------------


@kmeans_and_kmedoids
@pytest.mark.parametrize("num_groups", [1, 5, 23])
def test_every_iteration_equals_numpy(algorithm, reference, objective, num_groups):
  for seed in range(5):
    tokens, _ = make_tokens(seed)
    sim_NN = cosine_similarity(tokens)
    seed_M = choose_seeds(jax.random.key(seed), sim_NN, MAX_GROUPS, "k-means++")
    expected = reference(tokens.astype(np.float64), np.array(seed_M)[:num_groups], 10)
    for iterations in (0, 1, 2, 10):
      slot_N = cluster(algorithm, sim_NN, seed_M, jnp.int32(num_groups), iterations)
      np.testing.assert_array_equal(slot_N, expected[iterations])


def test_empty_initial_groups_of_kmeans_are_filled_as_in_numpy():
  tokens, _ = make_tokens(0)
  sim_NN, seeds = cosine_similarity(tokens), np.array([7, 7, 7, 20, 20, 31])
  expected = oracle.kmeans(tokens.astype(np.float64), seeds, 3)
  for iterations, slot in enumerate(expected):
    slot_N = cluster(kmeans, sim_NN, jnp.array(seeds), jnp.int32(6), iterations)
    np.testing.assert_array_equal(slot_N, slot)


@kmeans_and_kmedoids
def test_the_objective_never_rises_and_falls_in_the_end(algorithm, reference, objective):
  """Start from different seeds, and from copies of one token, which leave groups empty at first."""
  tokens, _ = make_tokens(3)
  twins = tokens.copy()
  twins[:12] = twins[0]
  for x, seed_M in ((tokens, np.arange(12)), (twins, np.arange(12))):
    sim_NN = cosine_similarity(x)
    slots = [cluster(algorithm, sim_NN, jnp.array(seed_M), jnp.int32(12), i) for i in range(9)]
    values = [objective(x.astype(np.float64), np.array(slot_N)) for slot_N in slots]
    assert all(len(np.unique(slot_N)) == 12 for slot_N in slots)
    assert (np.diff(values) <= 1e-6).all(), values
    assert values[-1] < values[0]


@kmeans_and_kmedoids
def test_planted_groups_are_found(algorithm, reference, objective):
  for seed in range(5):
    tokens, owner = make_tokens(seed, num_objects=6, noise=0.1)
    sim_NN = cosine_similarity(tokens)
    keys = jax.random.split(jax.random.key(seed), 8)
    runs = [choose_seeds(key, sim_NN, 6, "k-means++") for key in keys]
    slots = [np.array(cluster(algorithm, sim_NN, seed_M, jnp.int32(6), 10)) for seed_M in runs]
    best = min(slots, key=lambda slot: objective(tokens.astype(np.float64), slot))
    np.testing.assert_array_equal(same_group(best), same_group(owner))


def test_kmedoids_converges_to_nearest_medoids():
  tokens, _ = make_tokens(4)
  sim_NN = cosine_similarity(tokens)
  slot_N = np.array(cluster(kmedoids, sim_NN, jnp.arange(7), jnp.int32(7), 20))
  distance = oracle.cosine_distance(tokens.astype(np.float64))
  groups = [np.flatnonzero(slot_N == i) for i in range(7)]
  medoids = np.array([group[distance[np.ix_(group, group)].sum(1).argmin()] for group in groups])
  np.testing.assert_array_equal(distance[medoids].argmin(0), slot_N)  # a fixed point


# Superpixels --------------------------------------------------------------------------------------------


def test_lab_of_known_colors():
  """Compare primaries, white, black and grey with the values of Lindbloom's calculator for sRGB and D65."""
  rgb = [[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5], [2, 2, 2]]
  expected = [
    [100, 0, 0],
    [0, 0, 0],
    [53.2408, 80.0925, 67.2032],
    [87.7347, -86.1827, 83.1793],
    [32.2970, 79.1875, -107.8602],
    [53.3890, 0, 0],
    [100, 0, 0],
  ]
  np.testing.assert_allclose(jax.jit(superpixel.lab)(np.array(rgb, np.float32)), expected, atol=0.02)


def test_patch_colors_are_in_row_order():
  image = np.zeros((1, 6, 9, 3), np.float32)
  image[0, 3:, 6:] = 1.0
  color_BN3 = jax.jit(superpixel.patch_colors, static_argnums=1)(image, (2, 3))
  np.testing.assert_allclose(color_BN3[0, :, 0], [0, 0, 0, 0, 0, 100], atol=1e-3)


def test_patches_must_tile_the_image():
  assert superpixel.patch_grid((32, 48), 24) == (4, 6)
  with pytest.raises(ValueError, match="50 square patches do not tile an image of 32 x 48"):
    superpixel.patch_grid((32, 48), 50)


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (3, 12), (12, 3), (1, 5), (1, 1)])
def test_seed_patches_are_different_for_every_count(grid):
  num_tokens = grid[0] * grid[1]
  seeds = jax.jit(lambda num_groups: superpixel.seed_patches(num_groups, grid, num_tokens))
  for num_groups in range(1, num_tokens + 1):
    seed_M = np.array(seeds(jnp.int32(num_groups)))
    assert (seed_M >= 0).all()
    assert (seed_M < num_tokens).all()
    assert len(np.unique(seed_M[:num_groups])) == num_groups
  np.testing.assert_array_equal(seed_M, np.arange(num_tokens))
  assert seeds(jnp.int32(1))[0] == grid[0] // 2 * grid[1] + grid[1] // 2


@pytest.mark.parametrize("num_groups", [1, 4, 11, 40])
@pytest.mark.parametrize("compactness", [1.0, 20.0])
def test_slic_equals_numpy(num_groups, compactness):
  rng = np.random.default_rng(num_groups)
  color = (rng.normal(size=(8, 8, 3)) * 20).cumsum(0).cumsum(1).reshape(64, 3) / 4
  color = color.astype(np.float32)
  options = dict(grid=GRID, compactness=compactness, iterations=4)
  slot_N = slic(jnp.array(color), jnp.int32(num_groups), max_groups=48, **options)
  seeds = seed_patches(num_groups, GRID, 48)[:num_groups]
  np.testing.assert_array_equal(slot_N, oracle.slic(color.astype(np.float64), np.array(seeds), **options))


@pytest.mark.parametrize(("grid", "num_groups"), [(GRID, 30), ((1, 12), 2)], ids=["empty", "out of reach"])
def test_slic_equals_numpy_if_a_group_is_lost_or_a_patch_out_of_reach(grid, num_groups):
  """Seeds of one colour sometimes lose all their patches, and two centres do not reach all of a long row."""
  seeds = np.array(seed_patches(num_groups, grid, num_groups))
  for seed in range(8):
    color = 20 * np.random.default_rng(seed).normal(size=(grid[0] * grid[1], 3)).astype(np.float32)
    color[seeds] = color[seeds[0]]
    options = dict(grid=grid, compactness=1.0, iterations=4)
    slot_N = slic(jnp.array(color), jnp.int32(num_groups), max_groups=num_groups, **options)
    np.testing.assert_array_equal(slot_N, oracle.slic(color.astype(np.float64), seeds, **options))


def test_superpixels_follow_edges_or_with_large_compactness_the_grid():
  """An image with 3 black and 5 white columns gives these two groups, or two halves with a large m."""
  image = np.zeros((1, 64, 64, 3), np.float32)
  image[:, :, 24:] = 1.0
  inputs = jax.random.key(0), np.zeros((1, 64, 1), np.float32), image
  label = lambda m: np.array(jax.jit(superpixel.build(groups=2, compactness=m))(*inputs)).reshape(GRID)
  np.testing.assert_array_equal(label(5.0), np.tile([0, 0, 0, 3, 3, 3, 3, 3], (8, 1)))
  np.testing.assert_array_equal(label(1000.0), np.tile([0, 0, 0, 0, 4, 4, 4, 4], (8, 1)))
