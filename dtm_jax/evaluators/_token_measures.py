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
