"""How well an image's tokens agree: with their neighbours, with their group, and with the image's class."""

import jax.numpy as jnp
import numpy as np

from dtm_jax.arrays import Array, Float, Int

AnyArray = Array | np.ndarray  # of the device and in its precision, or of the host


def unit(tokens: Float[AnyArray, "*B C"]) -> Float[AnyArray, "*B C"]:
  """Of length one."""
  return tokens / ((tokens**2).sum(axis=-1, keepdims=True) ** 0.5).clip(1e-12)


def neighbour_cosine(tokens_BNC: Float[AnyArray, "B N C"], grid: tuple[int, int]) -> Float[AnyArray, " B"]:
  """The mean cosine of the pairs of tokens that touch along a side: R(Q-1) + (R-1)Q pairs of R x Q tokens."""
  rows, columns = grid
  token_BRQC = unit(tokens_BNC).reshape(len(tokens_BNC), rows, columns, -1)
  across = (token_BRQC[:, :, 1:] * token_BRQC[:, :, :-1]).sum(axis=(1, 2, 3))
  down = (token_BRQC[:, 1:] * token_BRQC[:, :-1]).sum(axis=(1, 2, 3))
  pairs = rows * (columns - 1) + (rows - 1) * columns
  return (across + down) / pairs


def agreeing(predicted_BN: Int[Array, "B N"], label_BN: Int[Array, "B N"]) -> Int[Array, " B"]:
  """How many tokens are predicted to be of the class that most tokens of their group are predicted to be of.

  Divided by N this is the purity of the groups, if a token's class is what a classifier says of it. It is 1
  for groups of one token; compare it with that of random groups of the same number.

  Counted from pairs of tokens, [B, N, N] whatever the number of classes: a group's most votes are those of
  the token in it that most tokens of the group agree with.
  """
  group_BNN = label_BN[:, :, None] == label_BN[:, None, :]
  same_BNN = group_BNN & (predicted_BN[:, :, None] == predicted_BN[:, None, :])
  votes_BN = same_BNN.sum(axis=2)
  owner_BNN = label_BN[:, None, :] == jnp.arange(label_BN.shape[1])[None, :, None]
  return jnp.where(owner_BNN, votes_BN[:, None, :], 0).max(axis=2).sum(axis=1)


def classify(
  tokens_BNC: Float[AnyArray, "B N C"], weights_DG: Float[AnyArray, "D G"]
) -> Int[AnyArray, "B N"]:
  """argmax_g of [unit token, 1] W: the class of every token; the last row of W is the bias, D = C + 1."""
  return (unit(tokens_BNC) @ weights_DG[:-1] + weights_DG[None, -1:]).argmax(axis=-1)


class LeastSquares:
  """A linear classifier of single tokens: ridge regression of the one-hot class on the unit token and 1.

  W = (X'X + λ tr(X'X)/D I)^-1 X'Y, exact and in float64, from sums over any number of batches. It needs no
  learning rate, so that two kinds of tokens are compared with nothing tuned for either.
  """

  def __init__(self, width: int, num_classes: int, ridge: float = 1e-6):
    self._gram = np.zeros((width + 1, width + 1))
    self._moment = np.zeros((width + 1, num_classes))
    self._ridge = ridge

  def add(self, tokens_BNC: Float[np.ndarray, "B N C"], label_B: Int[np.ndarray, " B"]) -> None:
    """Every token of an image has the image's class."""
    unit_BNC = unit(tokens_BNC.astype(np.float64))
    x_BND = np.concatenate([unit_BNC, np.ones((*unit_BNC.shape[:2], 1))], axis=-1)
    x_TD = x_BND.reshape(-1, len(self._gram))
    self._gram += x_TD.T @ x_TD
    self._moment += x_BND.sum(axis=1).T @ np.eye(self._moment.shape[1])[label_B]

  def solve(self, ridge: float | None = None) -> Float[np.ndarray, "D G"]:
    """The weights for `classify`; the last row is the bias. `ridge` takes the place of λ."""
    size = len(self._gram)
    ridge = self._ridge if ridge is None else ridge
    penalty = ridge * np.trace(self._gram) / size * np.eye(size)
    return np.linalg.solve(self._gram + penalty, self._moment)
