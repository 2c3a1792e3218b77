"""Every way to compute the rounds of matching finds the groups of the oracle and of the plain rounds.

Kernels run interpreted here. They are also lowered for their devices.
"""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import oracle_morphing as oracle
import pytest
from test_morphing import DECIDABLE, assert_canonical, clip_like_tokens

from dtm_jax import morphing
from dtm_jax.matching import gpu_kernel, gram, implementations, rounds, tpu_kernel
from dtm_jax.morphers import bipartite

WAYS = {
  "plain": rounds.match_rounds,
  "gram": gram.match_rounds,
  "TPU kernel": functools.partial(tpu_kernel.match_rounds, interpret=True),
  "GPU kernel": functools.partial(gpu_kernel.match_rounds, interpret=True),
}
OTHERS = [name for name in WAYS if name != "plain"]
CASES = [  # tokens, split, protect_first, merged_feature
  (49, "alternate", False, "size_weighted"),
  (50, "alternate", True, "mean_of_means"),
  (64, "random", False, "mean_of_means"),
  (196, "random", False, "size_weighted"),
  (7, "random", True, "mean_of_means"),
  (2, "random", True, "size_weighted"),
  (33, "random", True, "size_weighted"),
]
match = jax.jit(
  morphing.bipartite_match, static_argnames=("split", "protect_first", "merged_feature", "rounds")
)  # fmt: skip


def schedules(num_tokens):
  """Make schedules from none to all merged, one with a gap, and one with more than a round can merge."""
  n = num_tokens
  merges = [[0, 0, 0, 0], oracle.paper_merges(1, 4, n), oracle.paper_merges(n // 3 + 1, 3, n), [n, n, n, n]]
  merges += [oracle.released_merges(n // 2, 3, n), [n // 4, 0, n // 4, 1]]
  return np.stack([np.pad(m, (0, 4 - len(m))) for m in merges]).astype(np.int32)


@functools.cache
def expected_groups(num_tokens, split, protect_first, merged_feature):
  """Return tokens, schedules, key, and the oracle's (label, margin) of each image."""
  merges_BK = schedules(num_tokens)
  target_BNC = clip_like_tokens(num_tokens, len(merges_BK), num_tokens)
  key = jax.random.key(num_tokens)
  order_BKN = [None] * len(merges_BK)
  if split == "random":
    order_BKN = np.array(rounds.random_order(key, *merges_BK.shape, num_tokens))
  found = [
    oracle.match(*image, protect_first=protect_first, merged_feature=merged_feature)
    for image in zip(target_BNC, merges_BK, order_BKN, strict=True)
  ]
  return target_BNC, merges_BK, key, found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("way", WAYS)
def test_groups_equal_the_oracle(way, case):
  """This is the contract of a way. Where float32 can decide, it also equals the plain rounds."""
  _, split, protect_first, merged_feature = case
  target_BNC, merges_BK, key, expected = expected_groups(*case)
  label_BN = np.array(
    match(
      jnp.array(target_BNC), jnp.array(merges_BK), split=split, protect_first=protect_first,
      merged_feature=merged_feature, key=key, rounds=WAYS[way],
    )
  )  # fmt: skip
  decidable = 0
  for found_N, merges_K, (label_N, margin) in zip(label_BN, merges_BK, expected, strict=True):
    assert len(np.unique(found_N)) == len(np.unique(label_N))
    if margin > DECIDABLE:
      decidable += 1
      np.testing.assert_array_equal(found_N, label_N, err_msg=f"{merges_K}")
  assert decidable >= len(merges_BK) - 1
  assert_canonical(label_BN)


@pytest.mark.parametrize("protect_first", [False, True])
@pytest.mark.parametrize("way", OTHERS)
def test_ties_and_tokens_without_direction_equal_the_plain_rounds(way, protect_first):
  target_BNC = np.ones((3, 6, 2), np.float32)
  target_BNC[1, [2, 3]], target_BNC[2] = np.nan, 0.0
  merges_BK = jnp.array([[2, 0], [3, 1], [2, 2]])
  groups = lambda name: match(
    jnp.array(target_BNC), merges_BK, protect_first=protect_first, rounds=WAYS[name]
  )
  np.testing.assert_array_equal(groups(way), groups("plain"))


@pytest.mark.parametrize("way", ["gram", "GPU kernel", "TPU kernel"])
def test_schedules_share_one_gram_matrix(way):
  """Mapped over schedules as in a step, a way finds the same groups, and multiplies the tokens only once."""
  target_BNC, merges_BK, _, _ = expected_groups(*CASES[0])
  keys_S = jax.random.split(jax.random.key(3), 2)
  draw = lambda key: morphing.bipartite_match(
    jnp.array(target_BNC), jnp.array(merges_BK), split="random", key=key, rounds=WAYS[way]
  )
  found_SBN = jax.jit(jax.vmap(draw))(keys_S)
  for key, found_BN in zip(keys_S, found_SBN, strict=True):
    plain = match(jnp.array(target_BNC), jnp.array(merges_BK), split="random", key=key)
    np.testing.assert_array_equal(found_BN, plain)
  grams = [
    line for line in str(jax.make_jaxpr(jax.vmap(draw))(keys_S)).splitlines()
    if f"f32[{len(target_BNC)},49,49] = dot_general" in line
  ]  # fmt: skip
  assert len(grams) == 1


@pytest.mark.parametrize("shape", [(196, 512), (7, 16), (1024, 64)])
@pytest.mark.parametrize("options", [
  {}, {"split": "alternate", "protect_first": True, "merged_feature": "mean_of_means"},
])  # fmt: skip
def test_the_kernels_lower_for_their_devices_only(options, shape):
  """Lower them as the morpher calls them, with two schedules per image. CPUs get the plain rounds."""
  assign = bipartite.build(implementation="pallas", **options)
  keys_S = jax.random.split(jax.random.key(0), 2)
  traced = jax.jit(jax.vmap(assign, (0, None, None))).trace(
    keys_S, jnp.zeros((2, *shape)), jnp.zeros((2, 224, 224, 3))
  )

  def kernels(platform):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return text.count("tpu_custom_call"), text.count("__gpu$xla.gpu.triton")

  assert {platform: kernels(platform) for platform in ("tpu", "cuda", "cpu")} == {
    "tpu": (1, 0), "cuda": (0, 1), "cpu": (0, 0),
  }  # fmt: skip


class Memory:
  """An array of a program of the GPU kernel, run without JIT, which notes who reads and writes which numbers.

  The lane is known if an access has one number for each lane. Any lane may make the other accesses.
  """

  def __init__(self, values, lanes, accesses):
    self.values, self.lanes, self.accesses = np.array(values), lanes, accesses
    self.shape, self.at = self.values.shape, self

  def _note(self, index, writes):
    index = index if isinstance(index, tuple) else (index,)
    whole = np.arange(self.lanes)
    index = tuple(whole if isinstance(each, slice) else np.asarray(each) for each in index)
    places = np.broadcast_arrays(*index)
    for lane, place in enumerate(zip(*(each.ravel().tolist() for each in places), strict=True)):
      who = lane if places[0].shape == (self.lanes,) else "any"
      self.accesses.setdefault((id(self), place), []).append((writes, who))
    return index

  def __getitem__(self, index):
    return jnp.array(self.values[self._note(index, False)])

  def __setitem__(self, index, values):
    self.values[self._note(index, True)] = np.asarray(values)


@pytest.mark.parametrize(
  ("shuffled", "merged_feature"),
  [(True, "mean_of_means"), (False, "size_weighted"), (False, "mean_of_means")],
)
def test_no_lane_of_the_gpu_kernel_reads_what_another_has_just_written(shuffled, merged_feature, monkeypatch):
  """Interpreted kernels have one lane. Here, between two barriers, a number that is written has one user."""
  num_tokens, lanes, accesses = 20, 32, {}
  rng = np.random.default_rng(0)
  target_NC = rng.normal(size=(num_tokens, 8)).astype(np.float32)
  order_KN = rng.random((3, num_tokens)).astype(np.float32)
  rules, merges_K = rounds.Rules(True, merged_feature), jnp.array([7, 0, 4])

  def barrier():
    for (_, place), each in accesses.items():
      if any(writes for writes, _ in each) and len(each) > 1:
        users = {who for _, who in each}
        assert len(users) == 1, (place, each)
        assert "any" not in users, (place, each)
    accesses.clear()

  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # loops without JIT count with ints
  monkeypatch.setattr(gpu_kernel.plgpu, "debug_barrier", barrier)
  monkeypatch.setattr(
    gpu_kernel.plgpu, "load", lambda ref, mask, other: jnp.where(mask, ref, other)
  )  # fmt: skip
  live_K, merges_K = gpu_kernel._live_counts(num_tokens, rules, merges_K)
  places = jax.vmap(functools.partial(rounds.places, protect_first=True))(order_KN, live_K)
  to_KZ = np.concatenate([places, np.tile(np.arange(num_tokens, lanes), (3, 1))], axis=1)
  make = lambda values: Memory(values, lanes, accesses)
  inputs = [[3], live_K, merges_K, target_NC @ target_NC.T, *([to_KZ] if shuffled else [])]
  row = make(np.zeros(lanes, np.int32))
  scratch = [np.zeros(2 * lanes, np.int32)] * len(gpu_kernel.WHOLE_NUMBERS)
  scratch += [np.zeros(2 * lanes, np.float32)] * len(gpu_kernel.NUMBERS)
  with jax.disable_jit():
    gpu_kernel._match_image(
      rules, shuffled, False, *map(make, inputs), row, make(np.zeros((lanes, lanes), np.float32)),
      *map(make, scratch),
    )  # fmt: skip
  barrier()
  plain_BN = rounds.match_rounds(
    jnp.array(target_NC)[None], jnp.array([[7, 0, 4]]), jnp.array(order_KN)[None] if shuffled else None, rules
  )
  assert same_groups(row.values[:num_tokens], np.array(plain_BN[0]))


def same_groups(x_N, y_N):
  return np.array_equal(x_N[:, None] == x_N[None, :], y_N[:, None] == y_N[None, :])


def test_long_rows_are_computed_by_the_gram_matrix():
  target_BNC, merges_BK = jnp.array(clip_like_tokens(0, 1, 1030, 8)), jnp.array([[3]])
  rules = rounds.Rules(False, "size_weighted")
  traced = jax.make_jaxpr(lambda x, m: gpu_kernel.match_rounds(x, m, None, rules))(target_BNC, merges_BK)
  assert "pallas_call" not in str(traced)


def test_every_device_runs_the_kernel_on_its_own_images(monkeypatch):
  """XLA cannot split a kernel. Without a mesh in sight, every device would compute the whole batch."""
  monkeypatch.setattr(rounds, "match_rounds", WAYS["GPU kernel"])  # what CPUs get
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  target_BNC = jax.device_put(clip_like_tokens(1, 8, 8), jax.NamedSharding(mesh, jax.P("data")))
  merges_K = jnp.array([3])

  @jax.jit
  def groups(target_BNC, keys_S):
    draw = lambda key: morphing.bipartite_match(
      target_BNC, merges_K, split="random", key=key, rounds=implementations.kernel_rounds
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return jax.vmap(draw)(keys_S)

  keys_S = jax.random.split(jax.random.key(0), 2)
  compiled = groups.lower(target_BNC, keys_S).compile()
  assert "all-gather" not in compiled.as_text()
  for key, found_BN in zip(keys_S, compiled(target_BNC, keys_S), strict=True):
    np.testing.assert_array_equal(found_BN, match(target_BNC, merges_K, split="random", key=key))


@pytest.mark.parametrize("name", implementations.IMPLEMENTATIONS)
def test_the_morpher_names_every_way(name):
  inputs = jnp.array(clip_like_tokens(0, 4, 50)), jnp.zeros((4, 8, 8, 3))
  label = lambda name: jax.jit(bipartite.build(implementation=name))(jax.random.key(0), *inputs)
  np.testing.assert_array_equal(label(name), label("plain"))


def test_the_morpher_refuses_an_unknown_way():
  with pytest.raises(ValueError, match=r"'triton'.*plain, gram, pallas"):
    bipartite.build(implementation="triton")
