"""Dynamic token morphing, in the order of the paper: schedule, matching, morphing, loss.

"Morphing Tokens Draw Strong Masked Image Models", arXiv 2401.00254. With v_1..v_N the teacher's patch
tokens and u_1..u_N the student's:

    1. schedule   n̄ groups shall remain after k rounds; round p merges r_p tokens         merges_K
    2. matching   the r_p most similar pairs merge, round after round                      label_BN
    3. morphing   û_i, v̂_i: the mean of u, of v over group i of w_i tokens
    4. loss       L = (1/N) Σ_i w_i d(û_i, v̂_i)

The paper's partition M ∈ {0,1}^{n̄×N} is kept as one integer a token: label[b, j] is the id of the group
that owns token j, and the id of a group is its smallest member. M is the one-hot of the label.

Every shape is static. n̄, k and r_p are values, not shapes, so one compilation serves every draw.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dtm_jax import rngs
from dtm_jax.arrays import Array, Bool, Float, Int, RandomKey

SPLITS = ("alternate", "random")
MERGED_FEATURES = ("size_weighted", "mean_of_means")

HIGHEST = jax.lax.Precision.HIGHEST
NO_DIRECTION = -2.0
"""The similarity of a token without direction: below every cosine, so that it merges last."""
MEAN_EPSILON = 1e-6
"""The reference divides a group's sum by w + 1e-6; so do we, to reproduce its losses to the last digits."""


# 1. Schedule -------------------------------------------------------------------------------------------


def paper_merges(
  num_groups: int | Int[Array, ""], rounds: int | Int[Array, ""], num_tokens: int, max_rounds: int
) -> Int[Array, "K"]:
  """The paper's R = {r_p}: n̄ = `num_groups` remain after k = `rounds`.

      r_p = ⌊(N - n̄)/k⌋ for p < k,    r_k = N - n̄ - (k - 1)⌊(N - n̄)/k⌋,    r_p = 0 for p > k

  Source: the paper's token reduction schedule.
  """
  merged = num_tokens - num_groups
  each = merged // rounds
  p_K = jnp.arange(1, max_rounds + 1)
  return jnp.where(p_K < rounds, each, jnp.where(p_K == rounds, merged - (rounds - 1) * each, 0))


def released_merges(
  m: int | Int[Array, ""], k: int | Int[Array, ""], num_tokens: int, max_rounds: int
) -> Int[Array, "K"]:
  """The released code's rule: the same r in each of k rounds, to merge m tokens.

      r = ⌈m/k⌉, or ⌊m/k⌋ where ⌈m/k⌉ k > N

  It merges more than m where k does not divide m. With a smaller upper end of the draw of m, that end stands
  for N = `num_tokens`. Source: the reference behaviour.
  """
  ceiling = -(-m // k)
  each = jnp.where(ceiling * k > num_tokens, m // k, ceiling)
  return jnp.where(jnp.arange(1, max_rounds + 1) <= k, each, 0)


def paper_schedule(
  key: RandomKey, num_tokens: int, min_groups: int, max_rounds: int, max_groups: int | None = None
) -> Int[Array, "K"]:
  """Draws n̄ ~ U{N̄..N} and k ~ U{1..K}, N̄ = `min_groups` and K = `max_rounds`: see `paper_merges`.

  `max_groups` takes the place of N as the most groups; equal to `min_groups`, it fixes n̄.
  """
  max_groups = num_tokens if max_groups is None else max_groups
  _check_range("max_groups", max_groups, 1, num_tokens)
  _check_range("min_groups", min_groups, 1, max_groups)
  _check_range("max_rounds", max_rounds, 1)
  groups_key, rounds_key = jax.random.split(key)
  num_groups = jax.random.randint(groups_key, (), min_groups, max_groups + 1)
  rounds = jax.random.randint(rounds_key, (), 1, max_rounds + 1)
  return paper_merges(num_groups, rounds, num_tokens, max_rounds)


def released_schedule(
  key: RandomKey, num_tokens: int, max_merged: int | None = None, max_rounds: int = 14
) -> Int[Array, "K"]:
  """Draws m ~ U{0..`max_merged`} (by default N) and k ~ U{1..K}: see `released_merges`."""
  max_merged = num_tokens if max_merged is None else max_merged
  _check_range("max_merged", max_merged, 0, num_tokens)
  _check_range("max_rounds", max_rounds, 1)
  merged_key, rounds_key = jax.random.split(key)
  merged = jax.random.randint(merged_key, (), 0, max_merged + 1)
  rounds = jax.random.randint(rounds_key, (), 1, max_rounds + 1)
  return released_merges(merged, rounds, max_merged, max_rounds)


# 2. Matching -------------------------------------------------------------------------------------------


class Live(NamedTuple):
  """The tokens alive in one image: the first `count` of N slots, in the live order."""

  feature_NC: Float[Array, "N C"]  # up to a factor, the mean of the tokens merged in this slot; 0 past count
  slot_N: Int[Array, "N"]  # where each of the N original tokens is now
  count: Int[Array, ""]


def bipartite_match(
  target_BNC: Float[Array, "B N C"],
  merges_BK: Int[Array, "..."],
  *,
  split: str = "alternate",
  protect_first: bool = False,
  merged_feature: str = "size_weighted",
  key: RandomKey | None = None,
  rounds: Callable[..., Array] | None = None,
) -> Int[Array, "B N"]:
  """Groups the tokens of each image by rounds of bipartite matching.

  In round p the t live tokens are split in two sets, ⌈t/2⌉ in the first and ⌊t/2⌋ in the second. Each token
  of the first finds its most similar counterpart, by cosine, in the second; the r_p most similar of these
  pairs merge, several perhaps into one counterpart. A round can merge ⌊t/2⌋ tokens, ⌊(t-1)/2⌋ with
  `protect_first`; a larger r_p merges as many as that. Of equals the first in the live order wins.

  A token that is zero or not finite has no direction: it merges only when every other pair has. The
  decisions are made in float32 and carry no gradient.

  Args:
    target_BNC: the teacher's tokens.
    merges_BK: [B, K], or [K] for all images alike: r_p, how many tokens to merge in round p.
    split: "alternate", by even and odd place in the live order, as released; or "random", by a permutation
      of the live tokens for each image and round, as in the paper's Algorithm 1.
    protect_first: the first token stays a group of its own: always in the first set, it is no counterpart,
      and it merges into none. The released code does this to the top left patch, since its flag for a class
      token is on although that token is gone.
    merged_feature: what the next round compares: "size_weighted", the mean of all tokens of a group; or
      "mean_of_means", the mean of what merged in the round, Algorithm 1's product of row-normalised M^p.
    key: of the random split; the permutations are `random_order(key, B, K, N)`.
    rounds: what carries the rounds out; by default `match_rounds`.

  Returns:
    label_BN, int32: the smallest member of each token's group.

  Raises:
    ValueError: an unknown option, a random split without a key, or `merges_BK` that do not fit the batch.
  """
  _check_choice("split", split, SPLITS)
  _check_choice("merged_feature", merged_feature, MERGED_FEATURES)
  batch_size, num_tokens, _ = target_BNC.shape
  if merges_BK.ndim not in (1, 2) or merges_BK.shape[:-1] not in ((), (batch_size,)):
    raise ValueError(f"merges_BK {merges_BK.shape} must be [B, K] or [K] for target_BNC {target_BNC.shape}.")
  if split == "random" and key is None:
    raise ValueError("split='random' needs a key.")
  if num_tokens == 1:
    return jnp.zeros((batch_size, 1), jnp.int32)

  max_rounds = merges_BK.shape[-1]
  merges_BK = jnp.broadcast_to(merges_BK, (batch_size, max_rounds))
  order_BKN = random_order(key, batch_size, max_rounds, num_tokens) if split == "random" else None
  target_BNC = jax.lax.stop_gradient(target_BNC).astype(jnp.float32)
  target_BNC = jnp.where(jnp.isfinite(target_BNC).all(-1, keepdims=True), target_BNC, 0.0)
  options = dict(protect_first=protect_first, merged_feature=merged_feature)
  return canonical_labels((rounds or match_rounds)(target_BNC, merges_BK, order_BKN, **options))


def match_rounds(
  target_BNC: Float[Array, "B N C"],
  merges_BK: Int[Array, "B K"],
  order_BKN: Float[Array, "B K N"] | None,
  *,
  protect_first: bool,
  merged_feature: str,
) -> Int[Array, "B N"]:
  """All rounds of `bipartite_match`, on finite tokens: the slot where each token ends.

  With `order_BKN` the live tokens of a round stand in its rising order.
  """
  match = functools.partial(_match_one, protect_first=protect_first, merged_feature=merged_feature)
  return jax.vmap(match)(target_BNC, merges_BK, order_BKN)


def random_order(key: RandomKey, batch_size: int, max_rounds: int, num_tokens: int) -> Float[Array, "B K N"]:
  """One number for each slot, round and image; the live slots stand in rising order of it."""
  keys_B = rngs.per_example(key, batch_size)
  return jax.vmap(lambda key: jax.random.uniform(key, (max_rounds, num_tokens)))(keys_B)


def _match_one(
  target_NC: Array, merges_K: Array, order_KN: Array | None, *, protect_first: bool, merged_feature: str
) -> Array:
  """The slot of each token of one image after all rounds.

  F and S are the places of the first set, slots 0, 2, 4..., and of the second, slots 1, 3, 5...
  """
  num_tokens = target_NC.shape[0]

  def round_(live: Live, this_round: tuple[Array, Array | None]) -> tuple[Live, None]:
    num_merges, order_N = this_round
    if order_N is not None:
      live = _shuffle(live, order_N, protect_first)
    sim_FS = _similarity(live.feature_NC[0::2], live.feature_NC[1::2])
    to_N, count = _pair(sim_FS, live.count, num_merges, protect_first)
    return _merge(live, to_N, count, merged_feature), None

  live = Live(target_NC, jnp.arange(num_tokens), jnp.array(num_tokens))
  live, _ = jax.lax.scan(round_, live, (merges_K, order_KN))
  return live.slot_N


def _shuffle(live: Live, order_N: Array, protect_first: bool) -> Live:
  """The live tokens in rising order of `order_N`; a protected first token remains first."""
  if protect_first:
    order_N = order_N.at[0].set(-1.0)
  order_N = jnp.where(jnp.arange(order_N.size) < live.count, order_N, jnp.inf)
  to_N = _rank(order_N)
  from_N = jnp.zeros_like(to_N).at[to_N].set(jnp.arange(to_N.size))
  return Live(live.feature_NC[from_N], to_N[live.slot_N], live.count)


def _rank(value_N: Array) -> Array:
  """The place of each value in rising order, from 0; of equals the first comes first.

  So few values are compared all with all sooner than they are sorted (benchmarks/morphing.py).
  """
  place_N = jnp.arange(value_N.size)
  smaller_NN = value_N[None, :] < value_N[:, None]
  equal_before_NN = (value_N[None, :] == value_N[:, None]) & (place_N[None, :] < place_N[:, None])
  return jnp.sum(smaller_NN | equal_before_NN, axis=1)


def _similarity(first_FC: Array, second_SC: Array) -> Array:
  """The cosine of every pair; NO_DIRECTION where one of the two is zero."""
  norm_F, norm_S = jnp.linalg.norm(first_FC, axis=1), jnp.linalg.norm(second_SC, axis=1)
  unit_FC = first_FC / jnp.where(norm_F, norm_F, 1.0)[:, None]
  unit_SC = second_SC / jnp.where(norm_S, norm_S, 1.0)[:, None]
  cosine_FS = jnp.einsum("fc,sc->fs", unit_FC, unit_SC, precision=HIGHEST)
  return jnp.where((norm_F[:, None] > 0) & (norm_S[None, :] > 0), cosine_FS, NO_DIRECTION)


def _pair(sim_FS: Array, count: Array, num_merges: Array, protect_first: bool) -> tuple[Array, Array]:
  """Where each slot goes in one round (N where nothing lives), and how many live then."""
  num_first, num_second = sim_FS.shape
  slot_N = jnp.arange(num_first + num_second)
  live_N = slot_N < count
  sim_FS = jnp.where(live_N[0::2, None] & live_N[None, 1::2], sim_FS, -jnp.inf)
  if protect_first:
    sim_FS = sim_FS.at[0].set(-jnp.inf)

  # The first of the largest, as argmax gives it, in a form that a CPU computes several at a time.
  highest_F = jnp.max(sim_FS, axis=1)
  place_S = jnp.arange(num_second)
  best_F = jnp.min(jnp.where(sim_FS == highest_F[:, None], place_S[None, :], num_second - 1), axis=1)
  rank_F = _rank(-highest_F)
  num_merges = jnp.minimum(num_merges, (count - protect_first) // 2)
  merges_F = rank_F < num_merges

  # The new order: what is left of the first set, then the second. Protected, the left keep their order;
  # else they stand by falling similarity. A round without merges changes nothing. All as released.
  num_left = (count + 1) // 2 - num_merges
  left_F = jnp.cumsum(~merges_F) - 1 if protect_first else rank_F - num_merges
  to_F = jnp.where(merges_F, num_left + best_F, left_F)
  to_S = num_left + place_S
  to_N = jnp.where(num_merges > 0, slot_N.at[0::2].set(to_F).at[1::2].set(to_S), slot_N)
  return jnp.where(live_N, to_N, slot_N.size), count - num_merges


def _merge(live: Live, to_N: Array, count: Array, merged_feature: str) -> Live:
  """Moves every slot to `to_N`; slots that meet there merge.

  A Gram matrix computed once and merged by rows and columns is no more exact and on a CPU no faster
  (benchmarks/morphing.py). Every round is scanned: with a schedule for each image, nearly always one of them
  takes all K.
  """
  # A sum stands for the size-weighted mean: the cosine does not see its factor.
  feature_NC = _sum_at(to_N, live.feature_NC)
  if merged_feature == "mean_of_means":
    feature_NC /= jnp.maximum(group_sizes(to_N[None])[0], 1)[:, None]
  return Live(feature_NC, to_N[live.slot_N], count)


def _sum_at(place_N: Array, x_NC: Array) -> Array:
  """Row i: the sum of the rows of x whose place is i; the place N is nowhere.

  On a CPU by a scatter, which takes two fifths of a product's time (benchmarks/morphing.py). Elsewhere by a
  product: a scatter adds in any order on a GPU, and is slow on a TPU.
  """
  return jax.lax.platform_dependent(place_N, x_NC, cpu=_scatter_at, default=_product_at)


def _scatter_at(place_N: Array, x_NC: Array) -> Array:
  return jax.ops.segment_sum(x_NC, place_N, num_segments=place_N.size)


def _product_at(place_N: Array, x_NC: Array) -> Array:
  into_NN = jax.nn.one_hot(place_N, place_N.size, axis=0, dtype=jnp.float32)
  return jnp.einsum("ij,jc->ic", into_NN, x_NC, precision=HIGHEST)


# Partitions --------------------------------------------------------------------------------------------


def canonical_labels(label_BN: Int[Array, "B N"]) -> Int[Array, "B N"]:
  """The same partition, each group named by its smallest member."""
  return jnp.argmax(_same_group(label_BN), axis=2).astype(jnp.int32)


def group_sizes(label_BN: Int[Array, "B N"]) -> Int[Array, "B N"]:
  """w_i: how many tokens the group with id i owns; 0 where there is no such group."""
  return (label_BN[:, None, :] == jnp.arange(label_BN.shape[1])[None, :, None]).sum(axis=2)


def num_groups(label_BN: Int[Array, "B N"]) -> Int[Array, "B"]:
  """n̄: how many groups each image has."""
  return (group_sizes(label_BN) > 0).sum(axis=1)


def _same_group(label_BN: Array) -> Bool[Array, "B N N"]:
  return label_BN[:, :, None] == label_BN[:, None, :]


# 3. Morphing -------------------------------------------------------------------------------------------


def morph(tokens_BND: Float[Array, "B N D"], label_BN: Int[Array, "..."]) -> Float[Array, "B N D"]:
  """Every token becomes the mean of its group: v̂_{g(j)} at j, in float32.

      v̂_i = (1/w_i) Σ_j M_ij v_j,    w_i = Σ_j M_ij

  With one place for each token, not each group, the sum of w_i x_i over groups is the sum of x over places.
  (The paper writes the sum over j and lets w_i weigh the distance; the authors' code takes the mean.)

  Raises:
    ValueError: tokens and label differ in B or N.
  """
  _check_shapes("tokens_BND", tokens_BND.shape[:2], "label_BN", label_BN.shape)
  same_BNN = _same_group(label_BN).astype(jnp.float32)
  size_BN1 = same_BNN.sum(axis=2, keepdims=True)
  # With its gradient a product is faster than a scatter even on a CPU.
  sum_BND = jnp.einsum("bij,bjd->bid", same_BNN, tokens_BND.astype(jnp.float32), precision=HIGHEST)
  return sum_BND / (size_BN1 + MEAN_EPSILON)


# 4. Loss -----------------------------------------------------------------------------------------------


def smooth_l1(x: Float[Array, "*N C"], y: Float[Array, "*N C"], beta: float = 2.0) -> Float[Array, "*N"]:
  """Mean over C of e²/2β where |e| < β, |e| - β/2 elsewhere; e = x - y."""
  error = jnp.abs(x - y)
  return jnp.mean(jnp.where(error < beta, error**2 / (2 * beta), error - beta / 2), axis=-1)


def l1(x: Float[Array, "*N C"], y: Float[Array, "*N C"]) -> Float[Array, "*N"]:
  """Mean over C of |x - y|."""
  return jnp.mean(jnp.abs(x - y), axis=-1)


def l2(x: Float[Array, "*N C"], y: Float[Array, "*N C"]) -> Float[Array, "*N"]:
  """Mean over C of (x - y)²."""
  return jnp.mean((x - y) ** 2, axis=-1)


def cosine(x: Float[Array, "*N C"], y: Float[Array, "*N C"], epsilon: float = 1e-6) -> Float[Array, "*N"]:
  """1 - cos(x, y), norms not below `epsilon`."""
  norm = lambda z: jnp.sqrt(jnp.maximum(jnp.sum(z**2, axis=-1), epsilon**2))
  return 1.0 - jnp.sum(x * y, axis=-1) / (norm(x) * norm(y))


DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
  "smooth_l1": smooth_l1, "l1": l1, "l2": l2, "cosine": cosine,
}  # fmt: skip
OF_THE_DIFFERENCE = ("smooth_l1", "l1", "l2")
"""Distances that see x - y alone."""


def dtm_loss(
  student_BNC: Float[Array, "B N C"],
  target_BNC: Float[Array, "..."],
  label_SBN: Int[Array, "..."],
  *,
  distance: str = "smooth_l1",
  normalize_target: bool = False,
) -> Float[Array, ""]:
  """The distance of the morphed student to the morphed target, averaged over images and label maps.

      L = (1/N) Σ_i w_i d(û_i, v̂_i) = (1/N) Σ_j d(û_{g(j)}, v̂_{g(j)})

  n̄ = N gives the token-wise loss, n̄ = 1 the image-level one. Every token counts, masked or not. In float32,
  with no gradient to the target.

  Args:
    student_BNC, target_BNC: u and v.
    label_SBN: S partitions of the N tokens of each image.
    distance: d, one of DISTANCES. By default the released smooth_l1 with β = 2, that at the scale of CLIP's
      features is e²/4 nearly everywhere.
    normalize_target: standardises v̂ over C (unbiased variance + 1e-6), so that no channel's scale rules.

  Raises:
    ValueError: an unknown distance, or shapes that do not fit.
  """
  _check_choice("distance", distance, tuple(DISTANCES))
  _check_shapes("student_BNC", student_BNC.shape, "target_BNC", target_BNC.shape)
  _check_shapes("student_BNC", student_BNC.shape[:2], "label_SBN", label_SBN.shape[1:])
  target_BNC = jax.lax.stop_gradient(target_BNC)

  def loss(label_BN: Array) -> Array:
    if distance in OF_THE_DIFFERENCE and not normalize_target:
      # û - v̂ is u - v morphed: one product where two would do the same.
      morphed = morph(student_BNC.astype(jnp.float32) - target_BNC.astype(jnp.float32), label_BN)
      return jnp.mean(DISTANCES[distance](morphed, jnp.zeros_like(morphed)))
    morphed_student = morph(student_BNC, label_BN)
    morphed_target = morph(target_BNC, label_BN)
    if normalize_target:
      morphed_target = _standardize(morphed_target)
    return jnp.mean(DISTANCES[distance](morphed_student, morphed_target))

  return jnp.mean(jax.vmap(loss)(label_SBN))


def _standardize(x_BNC: Array) -> Array:
  mean = jnp.mean(x_BNC, axis=-1, keepdims=True)
  variance = jnp.var(x_BNC, axis=-1, keepdims=True, ddof=1)
  return (x_BNC - mean) / jnp.sqrt(variance + 1e-6)


# Errors ------------------------------------------------------------------------------------------------


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f"Unknown {option} {value!r}. Available: {', '.join(choices)}.")


def _check_shapes(x: str, x_shape: tuple[int, ...], y: str, y_shape: tuple[int, ...]) -> None:
  if x_shape != y_shape:
    raise ValueError(f"Shape mismatch: {x} has {x_shape} where {y} has {y_shape}.")


def _check_range(option: str, value: int, low: int, high: int | None = None) -> None:
  if value < low or (high is not None and value > high):
    raise ValueError(f"{option}={value} must be at least {low}" + (f" and at most {high}." if high else "."))
