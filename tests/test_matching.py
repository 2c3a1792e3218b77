"""Every way to compute the rounds of matching finds the groups of the oracle and of the plain rounds.

Kernels run interpreted here. They are also lowered for their devices.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import oracle_morphing as oracle
import pytest
from test_morphing import DECIDABLE, assert_canonical, clip_like_tokens

from dtm_jax import morphing, partitions
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


def is_long(way, case):
  """Return whether other tests are enough: 7 and 49 tokens for 33, and test_morphing.py for plain rounds."""
  return case == CASES[6] or (way == "plain" and case in (CASES[0], CASES[2], CASES[5]))


@functools.partial(jax.jit, static_argnums=(0, 4))
def groups(way, target_BNC, merges_BK, order_BKN, rules):
  return partitions.canonical_labels(WAYS[way](target_BNC, merges_BK, order_BKN, rules))


def schedules(num_tokens):
  """Make schedules from none to all merged, one with a gap, and one with more than a round can merge."""
  n = num_tokens
  merges = [[0, 0, 0, 0], oracle.paper_merges(1, 4, n), oracle.paper_merges(n // 3 + 1, 3, n), [n, n, n, n]]
  merges += [oracle.released_merges(n // 2, 3, n), [n // 4, 0, n // 4, 1]]
  return np.stack([np.pad(m, (0, 4 - len(m))) for m in merges]).astype(np.int32)


@functools.cache
def expected_groups(num_tokens, split, protect_first, merged_feature):
  """Return the inputs of a way, and the oracle's (label, margin) of each image."""
  merges_BK = schedules(num_tokens)
  target_BNC = clip_like_tokens(num_tokens, len(merges_BK), num_tokens)
  order_BKN, orders = None, [None] * len(merges_BK)
  if split == "random":
    order_BKN = np.random.default_rng(1).random((*merges_BK.shape, num_tokens)).astype(np.float32)
    orders = order_BKN
  found = [
    oracle.match(*image, protect_first=protect_first, merged_feature=merged_feature)
    for image in zip(target_BNC, merges_BK, orders, strict=True)
  ]
  return (target_BNC, merges_BK, order_BKN, rounds.Rules(protect_first, merged_feature)), found


@pytest.mark.parametrize(
  ("way", "case"),
  [
    pytest.param(
      way, case, id="-".join(map(str, (way, *case))), marks=[pytest.mark.long] * is_long(way, case)
    )
    for way, case in itertools.product(WAYS, CASES)
  ],
)
def test_groups_equal_the_oracle(way, case):
  """This is the contract of a way. Where float32 can decide, it also equals the plain rounds."""
  inputs, expected = expected_groups(*case)
  label_BN, merges_BK = np.array(groups(way, *inputs)), inputs[1]
  decidable = 0
  for found_N, merges_K, (label_N, margin) in zip(label_BN, merges_BK, expected, strict=True):
    assert len(np.unique(found_N)) == len(np.unique(label_N))
    if margin > DECIDABLE:
      decidable += 1
      np.testing.assert_array_equal(found_N, label_N, err_msg=f"{merges_K}")
  assert decidable >= len(merges_BK) - 1
  assert_canonical(label_BN)


@pytest.mark.parametrize("case", CASES[:2], ids=["alternate", "alternate-protected"])
@pytest.mark.parametrize("way", OTHERS)
def test_ties_and_tokens_without_direction_equal_the_plain_rounds(way, case):
  (target_BNC, _, *rest), _ = expected_groups(*case)
  # The groups of the second round have 1 or 4 tokens, so equal cosines are equal in float32.
  merges_BK = np.array([[3, 1, 0, 0], [24, 0, 0, 0]] * 3, np.int32)
  target_BNC = np.zeros_like(target_BNC)
  target_BNC[:4, :, 0] = 1.0
  target_BNC[2:4, [2, 3]] = 0.0
  target_BNC[2:4, 4] *= -1.0  # merges with an opposite token before one without direction
  inputs = target_BNC, merges_BK, *rest
  np.testing.assert_array_equal(groups(way, *inputs), groups("plain", *inputs))


@pytest.mark.parametrize("way", ["gram", "GPU kernel", "TPU kernel"])
def test_schedules_share_one_gram_matrix(way):
  """Mapped over schedules as in a step, a way finds the same groups, and multiplies the tokens only once."""
  (target_BNC, merges_BK, order_BKN, rules), _ = expected_groups(*CASES[4])
  order_SBKN = np.stack([order_BKN, order_BKN[..., ::-1]])
  draw = lambda order_BKN: WAYS[way](jnp.array(target_BNC), jnp.array(merges_BK), order_BKN, rules)
  traced = jax.jit(jax.vmap(lambda order_BKN: partitions.canonical_labels(draw(order_BKN)))).trace(order_SBKN)
  for order_BKN, found_BN in zip(order_SBKN, traced.lower().compile()(order_SBKN), strict=True):
    plain_BN = groups("plain", target_BNC, merges_BK, order_BKN, rules)
    np.testing.assert_array_equal(found_BN, plain_BN)
  grams = [
    line for line in str(traced.jaxpr).splitlines()
    if f"f32[{len(target_BNC)},7,7] = dot_general" in line
  ]  # fmt: skip
  assert len(grams) == 1


OPTIONS = {"split": "alternate", "protect_first": True, "merged_feature": "mean_of_means"}


@pytest.mark.parametrize(
  ("options", "shape"),
  [
    ({}, (196, 512)),
    ({}, (1024, 64)),
    (OPTIONS, (7, 16)),
    # These combine what the others have.
    pytest.param({}, (7, 16), marks=pytest.mark.long),
    pytest.param(OPTIONS, (196, 512), marks=pytest.mark.long),
    pytest.param(OPTIONS, (1024, 64), marks=pytest.mark.long),
  ],
)
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
  merges_K, rules = jnp.array([3]), rounds.Rules(False, "size_weighted")

  @jax.jit
  def draws(target_BNC, keys_S):
    draw = lambda key: morphing.bipartite_match(
      target_BNC, merges_K, split="random", key=key, rounds=implementations.kernel_rounds
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return jax.vmap(draw)(keys_S)

  keys_S = jax.random.split(jax.random.key(0), 2)
  compiled = draws.lower(target_BNC, keys_S).compile()
  assert "all-gather" not in compiled.as_text()
  for key, found_BN in zip(keys_S, compiled(target_BNC, keys_S), strict=True):
    order_BKN = rounds.random_order(key, 8, 1, 8)
    plain_BN = groups("plain", np.array(target_BNC), np.full((8, 1), 3), order_BKN, rules)
    np.testing.assert_array_equal(found_BN, plain_BN)


def test_the_morpher_names_every_way():
  target_BNC, images_BHW3 = clip_like_tokens(0, 4, 50), np.zeros((4, 8, 8, 3), np.float32)
  target_BNC[1, [2, 3]] = np.nan
  plain_BN, *others = (
    jax.jit(bipartite.build(implementation=name, split="alternate"))(
      jax.random.key(0), target_BNC, images_BHW3
    )
    for name in ("plain", *(implementations.IMPLEMENTATIONS.keys() - {"plain"}))
  )
  for label_BN in others:
    np.testing.assert_array_equal(label_BN, plain_BN)


def test_the_morpher_refuses_an_unknown_way():
  with pytest.raises(ValueError, match=r"'triton'.*plain, gram, pallas"):
    bipartite.build(implementation="triton")
