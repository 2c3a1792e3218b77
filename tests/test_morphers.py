"""Every module in morphers/ fulfils the contract of the socket and what it promises beyond that."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_morphing import assert_canonical

from dtm_jax import morphing, plugins
from dtm_jax.morphers import bipartite

BATCH, GRID, PATCH, WIDTH = 4, 4, 8, 8
NUM_TOKENS = GRID * GRID
MORPHERS = plugins.available("morphers")
COUNTED = ("kmeans", "kmedoids", "random", "superpixel")
RANDOM_BESIDES_THE_COUNT = ("kmeans", "kmedoids", "random")


def make_inputs(batch_size, grid):
  rng = np.random.default_rng(0)
  tokens_BNC = rng.normal(size=(batch_size, grid**2, WIDTH))
  images_BHW3 = rng.random((batch_size, grid * PATCH, grid * PATCH, 3))
  return tokens_BNC.astype(np.float32), images_BHW3.astype(np.float32)


def build(name, **options):
  return plugins.load("morphers", name).build(**options)


@functools.cache
def compiled(name, **options):
  """Return the morpher under `jax.jit`, which tests of the same shapes share, and the list of its traces."""
  assign, traces = build(name, **options), []

  def traced(*arguments):
    traces.append(1)
    return assign(*arguments)

  return jax.jit(traced), traces


@pytest.fixture(scope="module")
def inputs():
  return tuple(map(jnp.array, make_inputs(BATCH, GRID)))


def assert_canonical_partition(label_BN, batch_size, num_tokens):
  assert label_BN.shape == (batch_size, num_tokens)
  assert label_BN.dtype == np.int32
  assert_canonical(np.array(label_BN))


def count_groups(label_BN):
  return np.apply_along_axis(lambda label_N: len(np.unique(label_N)), -1, label_BN)


@pytest.mark.parametrize("name", MORPHERS)
def test_contract(name, inputs):
  jitted, traces = compiled(name)
  label_BN = np.array(jitted(jax.random.key(2), *inputs))
  jitted(jax.random.key(3), *inputs)
  jitted(jax.random.key(4), *(x / 2 for x in inputs))
  assert len(traces) == 1
  assert_canonical_partition(label_BN, BATCH, NUM_TOKENS)
  np.testing.assert_array_equal(jitted(jax.random.key(2), *inputs), label_BN)

  keys_S = jnp.stack([jax.random.key(2), jax.random.key(3)])
  label_SBN = jax.jit(jax.vmap(build(name), (0, None, None)))(keys_S, *inputs)
  np.testing.assert_array_equal(label_SBN, [jitted(key, *inputs) for key in keys_S])


@pytest.mark.parametrize("grid", [2, 14, pytest.param(8, marks=pytest.mark.long)])  # lies between the two
@pytest.mark.parametrize("name", MORPHERS)
def test_every_grid_is_partitioned_without_gradient(name, grid):
  tokens_BNC, images_BHW3 = make_inputs(2, grid)

  def loss(tokens_BNC, images_BHW3):
    label_BN = build(name)(jax.random.key(2), tokens_BNC, images_BHW3)
    return morphing.morph(tokens_BNC, label_BN).sum(), label_BN

  grads, label_BN = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(tokens_BNC, images_BHW3)
  assert_canonical_partition(label_BN, 2, grid**2)
  # Morphing keeps the sum of the tokens, so the gradient is 1 unless the labels add to it.
  np.testing.assert_allclose(grads[0], 1.0, atol=1e-5)
  np.testing.assert_array_equal(grads[1], 0.0)


@pytest.mark.parametrize("name", MORPHERS)
def test_tokens_without_direction_and_equal_tokens_are_partitioned(name, inputs):
  _, images_BHW3 = inputs
  tokens_BNC = np.ones((BATCH, NUM_TOKENS, WIDTH), np.float32)
  tokens_BNC[1], tokens_BNC[2, :5], tokens_BNC[3, 7] = 0.0, np.nan, np.inf
  label_BN = compiled(name)[0](jax.random.key(2), tokens_BNC, images_BHW3 * 0)
  assert_canonical_partition(label_BN, BATCH, NUM_TOKENS)


@pytest.mark.parametrize("name", MORPHERS)
def test_every_option_has_a_default_and_unknown_ones_are_refused(name):
  options = inspect.signature(plugins.load("morphers", name).build).parameters
  assert all(option.default is not option.empty for option in options.values())
  with pytest.raises(TypeError):
    build(name, no_such_option=1)


def test_identity_has_one_token_per_group_and_image_one_group(inputs):
  identity, image = build("identity"), build("image")
  np.testing.assert_array_equal(identity(jax.random.key(0), *inputs), [np.arange(NUM_TOKENS)] * BATCH)
  np.testing.assert_array_equal(image(jax.random.key(0), *inputs), np.zeros((BATCH, NUM_TOKENS)))


@pytest.mark.parametrize(
  ("schedule", "drawn_per", "num_shards", "draws"),
  [
    ("paper", "image", 1, 12),
    ("paper", "step", 1, 1),
    ("paper", "shard", 3, 3),
    ("paper", "shard", 1, 1),
    ("released", "image", 1, 12),
    # Who shares a draw does not depend on the schedule. The paper's schedule has each of these above.
    pytest.param("released", "step", 1, 1, marks=pytest.mark.long),
    pytest.param("released", "shard", 3, 3, marks=pytest.mark.long),
    pytest.param("released", "shard", 1, 1, marks=pytest.mark.long),
  ],
)
def test_schedules_are_drawn_per(schedule, drawn_per, num_shards, draws):
  """With one image repeated, equal parts of the batch share a group count, and the draws differ mostly."""
  tokens_BNC = np.tile(make_inputs(1, 8)[0], (12, 1, 1))
  assign = bipartite.build(
    schedule=schedule, drawn_per=drawn_per, num_shards=num_shards, max_rounds=4, split="alternate"
  )
  keys = jax.random.split(jax.random.key(1), 20)
  label_SBN = jax.jit(jax.vmap(assign, (0, None, None)))(
    keys, tokens_BNC, np.zeros((12, 8, 8, 3), np.float32)
  )
  counts = count_groups(label_SBN).reshape(20, draws, 12 // draws)
  assert (counts == counts[:, :, :1]).all()
  different = np.array([len(np.unique(row)) for row in counts[:, :, 0]])
  assert different.mean() > 0.6 * draws
  assert len(np.unique(counts[:, 0, 0])) > 5


def test_min_groups_and_max_merged_bound_the_groups():
  tokens_BNC, images_BHW3 = make_inputs(200, GRID)
  for options in ({"min_groups": 9}, {"schedule": "released", "max_merged": 7}):
    assign = jax.jit(bipartite.build(**options, max_rounds=4, split="alternate"))
    counts = count_groups(assign(jax.random.key(1), tokens_BNC, images_BHW3))
    assert (counts.min(), counts.max()) == (9, 16)


def test_protect_first_keeps_the_first_token_alone(inputs):
  released = bipartite.build(schedule="released", drawn_per="step", split="alternate", protect_first=True)
  assign = jax.jit(jax.vmap(released, (0, None, None)))
  label_SBN = assign(jax.random.split(jax.random.key(5), 10), *inputs)
  assert (np.array(label_SBN)[..., 1:] > 0).all()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"schedule": "cosine"}, "Unknown schedule 'cosine'. Available: paper, released"),
    ({"drawn_per": "epoch"}, "Unknown drawn_per 'epoch'. Available: image, step, shard"),
    ({"split": "odd"}, "Unknown split 'odd'. Available: alternate, random"),
    ({"merged_feature": "max"}, "Unknown merged_feature 'max'. Available: size_weighted, mean_of_means"),
  ],
)
def test_bipartite_refuses(options, message):
  with pytest.raises(ValueError, match=message):
    bipartite.build(**options)


def test_shards_must_divide_the_batch(inputs):
  with pytest.raises(ValueError, match="batch of 4 does not divide into num_shards=3"):
    bipartite.build(drawn_per="shard", num_shards=3)(jax.random.key(0), *inputs)


# How many groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "num_groups",
  [1, 7, 16, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 15))],  # 2 and 15 are between the others
)
@pytest.mark.parametrize("name", COUNTED)
def test_exactly_the_requested_number_of_groups(name, num_groups, inputs):
  """Three tokens repeat, so most groups would be empty without care."""
  tokens_BNC = np.array(inputs[0])[:, np.arange(NUM_TOKENS) % 3]
  label_BN = compiled(name, groups=num_groups)[0](jax.random.key(2), tokens_BNC, inputs[1])
  assert count_groups(label_BN).tolist() == [num_groups] * BATCH


@pytest.mark.parametrize("name", COUNTED)
def test_drawn_counts_cover_their_range_per_image_or_per_step(name):
  tokens_BNC, images_BHW3 = make_inputs(64, GRID)
  assign = jax.jit(build(name, min_groups=3, max_groups=7))
  count_B = count_groups(assign(jax.random.key(2), tokens_BNC, images_BHW3))
  assert np.bincount(count_B, minlength=8)[3:].min() >= 4  # of 64 / 5 = 12.8 expected each
  assert (count_B.min(), count_B.max()) == (3, 7)

  assign = jax.jit(jax.vmap(build(name, drawn_per="step"), (0, None, None)))
  label_SBN = assign(jax.random.split(jax.random.key(3), 12), tokens_BNC[:3], images_BHW3[:3])
  count_SB = count_groups(label_SBN)
  assert (count_SB == count_SB[:, :1]).all()
  assert len(np.unique(count_SB)) > 4


@pytest.mark.parametrize("name", COUNTED)
def test_with_a_fixed_count_only_random_morphers_depend_on_the_key(name, inputs):
  assign, _ = compiled(name, groups=7)
  first, second = (np.array(assign(jax.random.key(seed), *inputs)) for seed in (2, 3))
  assert (first != second).any() == (name in RANDOM_BESIDES_THE_COUNT)


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"groups": 17}, "From 17 to 17 groups do not fit 1 to 16 tokens"),
    ({"groups": 0}, "From 0 to 0 groups"),
    ({"min_groups": 5, "max_groups": 4}, "From 5 to 4 groups"),
    ({"groups": 3, "max_groups": 4}, "groups=3 is a fixed number; it goes without .*max_groups=4"),
    ({"drawn_per": "shard"}, "Unknown drawn_per 'shard'. Available: image, step"),
  ],
)
def test_impossible_counts_are_refused(name, options, message, inputs):
  with pytest.raises(ValueError, match=message):
    build(name, **options)(jax.random.key(0), *inputs)


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("kmeans", {"init": "pca"}, "Unknown init 'pca'. Available: k-means[+][+], random"),
    ("kmedoids", {"iterations": -1}, "iterations=-1 must be at least 0"),
    ("superpixel", {"compactness": 0.0}, "compactness=0.0 must be above 0"),
  ],
)
def test_impossible_options_are_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    build(name, **options)


def test_random_groups_do_not_depend_on_distance():
  """All 120 pairs of 16 tokens share a group equally often, within 5 standard errors."""
  tokens_BNC, images_BHW3 = (np.zeros((4000, *shape), np.float32) for shape in ((NUM_TOKENS, 1), (4, 4, 3)))
  label_BN = np.array(jax.jit(build("random", groups=4))(jax.random.key(0), tokens_BNC, images_BHW3))
  together_NN = (label_BN[:, :, None] == label_BN[:, None, :]).mean(0)
  pairs = together_NN[np.triu_indices(NUM_TOKENS, 1)]
  expected = pairs.mean()
  assert np.abs(pairs - expected).max() < 5 * np.sqrt(expected * (1 - expected) / 4000)
