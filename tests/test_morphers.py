"""The contract of every module in morphers/, and what each of them promises besides."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax import morphing, plugins
from dtm_jax.morphers import bipartite

BATCH, GRID, PATCH, WIDTH = 4, 4, 8, 8
NUM_TOKENS = GRID * GRID


@pytest.fixture(scope="module")
def inputs():
  tokens_BNC = jax.random.normal(jax.random.key(0), (BATCH, NUM_TOKENS, WIDTH))
  images_BHW3 = jax.random.normal(jax.random.key(1), (BATCH, GRID * PATCH, GRID * PATCH, 3))
  return tokens_BNC, images_BHW3


@pytest.mark.parametrize("name", plugins.available("morphers"))
def test_contract(name, inputs):
  assign = plugins.load("morphers", name).build()
  traces = []

  def traced(*arguments):
    traces.append(1)
    return assign(*arguments)

  jitted = jax.jit(traced)
  label_BN = np.array(jitted(jax.random.key(2), *inputs))
  jitted(jax.random.key(3), *inputs)
  jitted(jax.random.key(4), *(2 * x for x in inputs))
  assert len(traces) == 1

  assert label_BN.shape == (BATCH, NUM_TOKENS)
  assert label_BN.dtype == np.int32
  np.testing.assert_array_equal(morphing.canonical_labels(jnp.array(label_BN)), label_BN)
  np.testing.assert_array_equal(morphing.group_sizes(jnp.array(label_BN)).sum(1), [NUM_TOKENS] * BATCH)
  np.testing.assert_array_equal(jitted(jax.random.key(2), *inputs), label_BN)

  keys_S = jnp.stack([jax.random.key(2), jax.random.key(3)])
  label_SBN = jax.vmap(assign, (0, None, None))(keys_S, *inputs)
  np.testing.assert_array_equal(label_SBN, [jitted(key, *inputs) for key in keys_S])


@pytest.mark.parametrize("name", plugins.available("morphers"))
def test_every_option_has_a_default_and_unknown_ones_are_refused(name):
  build = plugins.load("morphers", name).build
  assert all(p.default is not p.empty for p in inspect.signature(build).parameters.values())
  with pytest.raises(TypeError):
    build(no_such_option=1)


def test_identity_and_image_are_the_two_ends(inputs):
  identity, image = (plugins.load("morphers", name).build() for name in ("identity", "image"))
  np.testing.assert_array_equal(identity(jax.random.key(0), *inputs), [np.arange(NUM_TOKENS)] * BATCH)
  np.testing.assert_array_equal(image(jax.random.key(0), *inputs), np.zeros((BATCH, NUM_TOKENS)))


@pytest.mark.parametrize("schedule", bipartite.SCHEDULES)
@pytest.mark.parametrize(
  ("drawn_per", "num_shards", "draws"), [("image", 1, 12), ("step", 1, 1), ("shard", 3, 3), ("shard", 1, 1)]
)
def test_schedules_are_drawn_per(schedule, drawn_per, num_shards, draws):
  """The same image throughout: as many different group counts as draws, up to chance, in equal parts."""
  tokens_BNC = jnp.tile(jax.random.normal(jax.random.key(0), (1, 64, 8)), (12, 1, 1))
  assign = bipartite.build(
    schedule=schedule, drawn_per=drawn_per, num_shards=num_shards, max_rounds=4, split="alternate"
  )
  keys = jax.random.split(jax.random.key(1), 20)
  label_SBN = jax.jit(jax.vmap(assign, (0, None, None)))(keys, tokens_BNC, jnp.zeros((12, 8, 8, 3)))
  counts = np.array(jax.vmap(morphing.num_groups)(label_SBN)).reshape(20, draws, 12 // draws)
  assert (counts == counts[:, :, :1]).all()
  different = np.array([len(np.unique(row)) for row in counts[:, :, 0]])
  assert different.mean() > 0.6 * draws
  assert len(np.unique(counts[:, 0, 0])) > 5


def test_min_groups_and_max_merged_bound_the_groups():
  tokens_BNC = jax.random.normal(jax.random.key(0), (200, 16, 8))
  for options in ({"min_groups": 9}, {"schedule": "released", "max_merged": 7}):
    assign = jax.jit(bipartite.build(**options, max_rounds=4))
    label_BN = assign(jax.random.key(1), tokens_BNC, jnp.zeros((200, 8, 8, 3)))
    counts = np.array(morphing.num_groups(label_BN))
    assert (counts.min(), counts.max()) == (9, 16)


def test_protect_first_reaches_the_matching(inputs):
  released = bipartite.build(schedule="released", drawn_per="step", split="alternate", protect_first=True)
  label_SBN = jax.vmap(released, (0, None, None))(jax.random.split(jax.random.key(5), 10), *inputs)
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
