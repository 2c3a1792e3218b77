"""Measures how the tokens of an image agree with their neighbours and with their group."""

import jax.numpy as jnp
import numpy as np

from dtm_jax.arrays import Array, Float, Int
from dtm_jax.evaluators._unit_norm import unit_norm


def neighbour_cosine(
  token_BNC: Float[Array | np.ndarray, "B N C"], grid: tuple[int, int]
) -> Float[Array | np.ndarray, " B"]:
  """Return the mean cosine similarity of the pairs of tokens that share a side.

  Args:
    token_BNC: the tokens of B images, row by row.
    grid: (R, Q), the rows and columns of tokens, N = R·Q. There are R(Q-1) + (R-1)Q pairs.
  """
  rows, columns = grid
  unit_BRQC = unit_norm(token_BNC).reshape(len(token_BNC), rows, columns, -1)
  across = (unit_BRQC[:, :, 1:] * unit_BRQC[:, :, :-1]).sum(axis=(1, 2, 3))
  down = (unit_BRQC[:, 1:] * unit_BRQC[:, :-1]).sum(axis=(1, 2, 3))
  pairs = rows * (columns - 1) + (rows - 1) * columns
  return (across + down) / pairs


def majority_size(predicted_BN: Int[Array, "B N"], group_BN: Int[Array, "B N"]) -> Int[Array, " B"]:
  """Return the number of tokens that agree with the most frequent class of their group.

  This number divided by N is the purity of the groups, where a classifier gives the class of a token. Groups
  of one token have a purity of 1, so compare the purity with that of as many random groups.

  The votes are counted over pairs of tokens, because [B, N, N] does not grow with the number of classes. The
  most votes of a group are those of its token that agrees with most others.

  Args:
    predicted_BN: the predicted class of each token.
    group_BN: the group of each token, 0..N-1.
  """
  group_BNN = group_BN[:, :, None] == group_BN[:, None, :]
  same_BNN = group_BNN & (predicted_BN[:, :, None] == predicted_BN[:, None, :])
  votes_BN = same_BNN.sum(axis=2)
  owner_BNN = group_BN[:, None, :] == jnp.arange(group_BN.shape[1])[None, :, None]
  return jnp.where(owner_BNN, votes_BN[:, None, :], 0).max(axis=2).sum(axis=1)


def effective_rank(feature_BC: Float[np.ndarray, "B C"], epsilon: float = 1e-7) -> float:
  """Return RankMe of B features: exp of the entropy of their normalised singular values.

      RankMe = exp(-Σ_k p_k log p_k),    p_k = σ_k / Σ_j σ_j + ε

  It is between 1 and min(B, C). Source: arXiv 2210.02885, equation 1. Features that are all zero have rank 0.
  """
  singular = np.linalg.svd(feature_BC.astype(np.float64), compute_uv=False)
  if not singular.sum() > 0:
    return 0.0
  share = singular / singular.sum() + epsilon
  return float(np.exp(-(share * np.log(share)).sum()))


def adjusted_rand_index(label_N: Int[np.ndarray, " N"], other_N: Int[np.ndarray, " N"]) -> float:
  """Return how well two partitions of N tokens agree: 1 if they are equal, 0 on average by chance.

  It is the share of pairs that both partitions treat alike, corrected for chance (Hubert and Arabie, 1985).
  """
  pairs = lambda counts: float((counts * (counts - 1) // 2).sum())
  _, label_N = np.unique(label_N, return_inverse=True)
  _, other_N = np.unique(other_N, return_inverse=True)
  table = np.zeros((label_N.max() + 1, other_N.max() + 1), np.int64)
  np.add.at(table, (label_N, other_N), 1)
  together, rows, columns = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
  expected = rows * columns / max(len(label_N) * (len(label_N) - 1) / 2, 1.0)
  most = (rows + columns) / 2
  return 1.0 if most == expected else (together - expected) / (most - expected)
