"""Define Dynamic Token Morphing in the order of the paper: schedule, matching, morphing, loss.

"Morphing Tokens Draw Strong Masked Image Models", arXiv 2401.00254. v_1..v_N are the teacher's patch tokens
and u_1..u_N are the student's:

    1. schedule   n̄ groups remain after k rounds; round p merges r_p tokens               merges_K
    2. matching   each round merges the r_p most similar pairs of tokens                   label_BN
    3. morphing   û_i and v̂_i are the means of u and v over group i, which has w_i tokens
    4. loss       L = (1/N) Σ_i w_i d(û_i, v̂_i)

The paper's partition M ∈ {0,1}^{n̄×N} is stored as one integer per token, the label (partitions.py). The
rounds are computed in matching/. All shapes are static: n̄, k and r_p are traced values, so one compilation
serves every draw. docs/method.md explains the two modes, "paper" and "released", and names the option behind
each difference.

    merges_K = paper_schedule(key, num_tokens=196, min_groups=1, max_rounds=14)
    label_BN = bipartite_match(target_BNC, merges_K, split="random", key=key)
    loss = dtm_loss(student_BNC, target_BNC, label_BN[None])
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Float, Int, RandomKey
from dtm_jax.errors import OptionError, check_choice
from dtm_jax.matching.rounds import HIGHEST, Rounds, Rules, match_rounds, random_order
from dtm_jax.partitions import canonical_labels, same_group

SPLITS = ("alternate", "random")
MERGED_FEATURES = ("size_weighted", "mean_of_means")
MEAN_EPSILON = 1e-6
"""Added to the size of a group before the division, as in the released code, to reproduce its losses."""


# 1. Schedule -------------------------------------------------------------------------------------------


def paper_merges(
  num_groups: int | Int[Array, ""], num_rounds: int | Int[Array, ""], num_tokens: int, max_rounds: int
) -> Int[Array, " K"]:
  """Return the paper's R = {r_p}, which leaves n̄ = `num_groups` groups after k = `num_rounds` rounds.

      r_p = ⌊(N - n̄)/k⌋ for p < k,    r_k = N - n̄ - (k - 1)⌊(N - n̄)/k⌋,    r_p = 0 for p > k

  Source: the token reduction schedule of the paper (docs/method.md, 1).

  >>> paper_merges(num_groups=5, num_rounds=3, num_tokens=16, max_rounds=4).tolist()
  [3, 3, 5, 0]
  """
  merged = num_tokens - num_groups
  each = merged // num_rounds
  p_K = jnp.arange(1, max_rounds + 1)
  return jnp.where(p_K < num_rounds, each, jnp.where(p_K == num_rounds, merged - (num_rounds - 1) * each, 0))


def released_merges(
  m: int | Int[Array, ""], k: int | Int[Array, ""], num_tokens: int, max_rounds: int
) -> Int[Array, " K"]:
  """Return the merges of the released code: the same r in each of k rounds, to merge m tokens.

      r = ⌈m/k⌉, or ⌊m/k⌋ if ⌈m/k⌉ k > N

  If k does not divide m, the rounds merge more than m tokens. If m is drawn below a smaller limit than N,
  pass this limit as `num_tokens`. Source: docs/method.md, 1.

  >>> released_merges(m=11, k=3, num_tokens=16, max_rounds=4).tolist()
  [4, 4, 4, 0]
  """
  ceiling = -(-m // k)
  each = jnp.where(ceiling * k > num_tokens, m // k, ceiling)
  return jnp.where(jnp.arange(1, max_rounds + 1) <= k, each, 0)


def paper_schedule(
  key: RandomKey, num_tokens: int, min_groups: int, max_rounds: int, max_groups: int | None = None
) -> Int[Array, " K"]:
  """Draw n̄ ~ U{N̄..N} and k ~ U{1..K}, and return `paper_merges`.

  >>> merges_K = paper_schedule(jax.random.key(0), num_tokens=16, min_groups=4, max_rounds=3, max_groups=4)
  >>> int(merges_K.sum())
  12

  Args:
    num_tokens: N.
    min_groups: N̄.
    max_rounds: K.
    max_groups: replaces N as the largest n̄. If it equals `min_groups`, n̄ is fixed.

  Raises:
    OptionError: a number is outside its range.
  """
  max_groups = num_tokens if max_groups is None else max_groups
  _check_range("max_groups", max_groups, 1, num_tokens)
  _check_range("min_groups", min_groups, 1, max_groups)
  _check_range("max_rounds", max_rounds, 1)
  groups_key, rounds_key = jax.random.split(key)
  num_groups = jax.random.randint(groups_key, (), min_groups, max_groups + 1)
  num_rounds = jax.random.randint(rounds_key, (), 1, max_rounds + 1)
  return paper_merges(num_groups, num_rounds, num_tokens, max_rounds)


def released_schedule(
  key: RandomKey, num_tokens: int, max_merged: int | None = None, max_rounds: int = 14
) -> Int[Array, " K"]:
  """Draw m ~ U{0..`max_merged`} (default N) and k ~ U{1..K}, and return `released_merges`.

  >>> released_schedule(jax.random.key(0), num_tokens=16, max_rounds=3).shape
  (3,)

  Raises:
    OptionError: a number is outside its range.
  """
  max_merged = num_tokens if max_merged is None else max_merged
  _check_range("max_merged", max_merged, 0, num_tokens)
  _check_range("max_rounds", max_rounds, 1)
  merged_key, rounds_key = jax.random.split(key)
  merged = jax.random.randint(merged_key, (), 0, max_merged + 1)
  num_rounds = jax.random.randint(rounds_key, (), 1, max_rounds + 1)
  return released_merges(merged, num_rounds, max_merged, max_rounds)


# 2. Matching -------------------------------------------------------------------------------------------


def bipartite_match(
  target_BNC: Float[Array, "B N C"],
  merges_BK: Int[Array, "*B K"],
  *,
  split: str = "alternate",
  protect_first: bool = False,
  merged_feature: str = "size_weighted",
  key: RandomKey | None = None,
  rounds: Rounds | None = None,
) -> Int[Array, "B N"]:
  """Group the tokens of each image by rounds of bipartite matching.

  Round p splits the t live tokens into two sets, ⌈t/2⌉ tokens in the first and ⌊t/2⌋ in the second. Each
  token of the first set finds its counterpart: the token of the second set with the highest cosine
  similarity. The r_p most similar of these pairs merge, and several may share a counterpart. Of equal
  similarities, the first in the live order wins. A round can merge at most ⌊t/2⌋ tokens, or ⌊(t-1)/2⌋ with
  `protect_first`. If r_p is larger, it merges that many.

  A token that is zero or not finite has no direction. It merges only after every other pair has merged. The
  decisions are made in float32 and carry no gradient.

  >>> token_BNC = jnp.array([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]])
  >>> bipartite_match(token_BNC, jnp.array([2])).tolist()  # tokens 0 and 1 merge, and tokens 2 and 3
  [[0, 0, 2, 2]]

  Args:
    target_BNC: the teacher's tokens.
    merges_BK: r_p, the number of tokens to merge in round p: [B, K], or [K] for all images alike.
    split: "alternate" splits by even and odd place in the live order, as the released code does. "random"
      permutes the live tokens first, independently for each image and round, as Algorithm 1 does.
    protect_first: keep the first token in a group by itself. It stays in the first set and does not merge.
      The released code does this to the top left patch, because its class token flag is on without a class
      token.
    merged_feature: the feature of a group in the next round. "size_weighted" is the mean of all its tokens.
      "mean_of_means" is the mean of the features that merged in the round, as in Algorithm 1's product of
      row-normalised M^p.
    key: for the random split; the permutations are `random_order(key, B, K, N)`.
    rounds: the function that computes the rounds, by default `matching.rounds.match_rounds`.

  Returns:
    label_BN, int32, in canonical form: the smallest member of each token's group.

  Raises:
    OptionError: an option is unknown, or a random split has no key.
    ValueError: `merges_BK` does not fit the batch.
  """
  check_choice("split", split, SPLITS)
  check_choice("merged_feature", merged_feature, MERGED_FEATURES)
  batch_size, num_tokens, _ = target_BNC.shape
  if merges_BK.ndim not in (1, 2) or merges_BK.shape[:-1] not in ((), (batch_size,)):
    raise ValueError(f"merges_BK {merges_BK.shape} must be [B, K] or [K] for target_BNC {target_BNC.shape}.")
  max_rounds = merges_BK.shape[-1]
  order_BKN = None
  if split == "random":
    if key is None:
      raise OptionError("split='random' needs a key.")
    order_BKN = random_order(key, batch_size, max_rounds, num_tokens)
  if num_tokens == 1:
    return jnp.zeros((batch_size, 1), jnp.int32)

  merges_BK = jnp.broadcast_to(merges_BK, (batch_size, max_rounds))
  target_BNC = jax.lax.stop_gradient(target_BNC).astype(jnp.float32)
  target_BNC = jnp.where(jnp.isfinite(target_BNC).all(-1, keepdims=True), target_BNC, 0.0)
  slot_BN = (rounds or match_rounds)(target_BNC, merges_BK, order_BKN, Rules(protect_first, merged_feature))
  return canonical_labels(slot_BN)


# 3. Morphing -------------------------------------------------------------------------------------------


def morph(tokens_BND: Float[Array, "B N D"], label_BN: Int[Array, "B N"]) -> Float[Array, "B N D"]:
  """Replace every token j by the mean of its group, v̂_{g(j)}, in float32.

      v̂_i = (1/w_i) Σ_j M_ij v_j,    w_i = Σ_j M_ij

  Every token gets a value, not every group, so the sum of w_i v̂_i over groups is the sum over tokens. The
  paper writes the sum over j in place of the mean; docs/method.md, 3, says why this is the mean.

  >>> token_BND = jnp.array([[[1.0], [3.0], [8.0]]])
  >>> np.round(morph(token_BND, jnp.array([[0, 0, 2]])), 4).tolist()
  [[[2.0], [2.0], [8.0]]]

  Raises:
    ValueError: tokens and label differ in B or N.
  """
  _check_shapes("tokens_BND", tokens_BND.shape[:2], "label_BN", label_BN.shape)
  same_BNN = same_group(label_BN).astype(jnp.float32)
  size_BN1 = same_BNN.sum(axis=2, keepdims=True)
  # With its gradient, a product is faster than a scatter even on a CPU.
  sum_BND = jnp.einsum("bij,bjd->bid", same_BNN, tokens_BND.astype(jnp.float32), precision=HIGHEST)
  return sum_BND / (size_BN1 + MEAN_EPSILON)


# 4. Loss -----------------------------------------------------------------------------------------------


def smooth_l1(x: Float[Array, "*N C"], y: Float[Array, "*N C"], beta: float = 2.0) -> Float[Array, "*N"]:
  """Return the mean over C of e²/2β if |e| < β and |e| - β/2 otherwise, with e = x - y.

  >>> smooth_l1(jnp.array([[1.0], [5.0]]), jnp.zeros((2, 1))).tolist()
  [0.25, 4.0]
  """
  error = jnp.abs(x - y)
  return jnp.mean(jnp.where(error < beta, error**2 / (2 * beta), error - beta / 2), axis=-1)


def l1(x: Float[Array, "*N C"], y: Float[Array, "*N C"]) -> Float[Array, "*N"]:
  """Return the mean over C of |x - y|.

  >>> l1(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))).tolist()
  [2.0]
  """
  return jnp.mean(jnp.abs(x - y), axis=-1)


def l2(x: Float[Array, "*N C"], y: Float[Array, "*N C"]) -> Float[Array, "*N"]:
  """Return the mean over C of (x - y)².

  >>> l2(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2))).tolist()
  [5.0]
  """
  return jnp.mean((x - y) ** 2, axis=-1)


def cosine(x: Float[Array, "*N C"], y: Float[Array, "*N C"], epsilon: float = 1e-6) -> Float[Array, "*N"]:
  """Return 1 - cos(x, y), with norms of at least `epsilon`.

  >>> cosine(jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])).tolist()
  [0.0, 1.0]
  """
  norm = lambda z: jnp.sqrt(jnp.maximum(jnp.sum(z**2, axis=-1), epsilon**2))
  return 1.0 - jnp.sum(x * y, axis=-1) / (norm(x) * norm(y))


DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
  "smooth_l1": smooth_l1, "l1": l1, "l2": l2, "cosine": cosine,
}  # fmt: skip
OF_THE_DIFFERENCE = ("smooth_l1", "l1", "l2")
"""Distances that depend on x - y alone."""


def dtm_loss(
  student_BNC: Float[Array, "B N C"],
  target_BNC: Float[Array, "B N C"],
  label_SBN: Int[Array, "S B N"],
  *,
  distance: str = "smooth_l1",
  normalize_target: bool = False,
) -> Float[Array, ""]:
  """Return the distance of the morphed student to the morphed target, averaged over images and label maps.

      L = (1/N) Σ_i w_i d(û_i, v̂_i) = (1/N) Σ_j d(û_{g(j)}, v̂_{g(j)})

  n̄ = N gives the token-wise loss and n̄ = 1 the image-level loss. Every token counts, masked or not. The
  loss is computed in float32, and no gradient reaches the target.

  >>> student_BNC, target_BNC = jnp.zeros((1, 2, 1)), jnp.array([[[1.0], [-1.0]]])
  >>> one_each, together = jnp.array([[[0, 1]]]), jnp.array([[[0, 0]]])  # S = 1 partition
  >>> f"{dtm_loss(student_BNC, target_BNC, one_each):.4f} {dtm_loss(student_BNC, target_BNC, together):.4f}"
  '0.2500 0.0000'

  Args:
    student_BNC, target_BNC: u and v.
    label_SBN: S partitions of the N tokens of each image.
    distance: d, one of DISTANCES. The default is smooth_l1 with β = 2, as in the released code. At the scale
      of CLIP's features, nearly all of its values are e²/4.
    normalize_target: standardise v̂ over C (unbiased variance + 1e-6), so that all tokens have the same
      scale.

  Raises:
    OptionError: the distance is unknown.
    ValueError: the shapes do not fit.
  """
  check_choice("distance", distance, DISTANCES)
  _check_shapes("student_BNC", student_BNC.shape, "target_BNC", target_BNC.shape)
  _check_shapes("student_BNC", student_BNC.shape[:2], "label_SBN", label_SBN.shape[1:])
  target_BNC = jax.lax.stop_gradient(target_BNC)

  def loss(label_BN: Array) -> Array:
    if distance in OF_THE_DIFFERENCE and not normalize_target:
      # û - v̂ is the morphed u - v, so one product gives both.
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


def _check_shapes(x: str, x_shape: tuple[int, ...], y: str, y_shape: tuple[int, ...]) -> None:
  if x_shape != y_shape:
    raise ValueError(f"Shape mismatch: {x} has {x_shape} where {y} has {y_shape}.")


def _check_range(option: str, value: int, low: int, high: int | None = None) -> None:
  if value < low or (high is not None and value > high):
    at_most = "" if high is None else f" and at most {high}"
    raise OptionError(f"{option}={value} must be at least {low}{at_most}.")
