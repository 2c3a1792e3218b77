"""How well an image's tokens agree: with their neighbours, with their group, and with the image's class."""

import numpy as np

from dtm_jax.arrays import Float, Int


def unit(tokens: Float[np.ndarray, "*B C"]) -> Float[np.ndarray, "*B C"]:
  """Of length one."""
  return tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)


def neighbour_cosine(tokens_BNC: Float[np.ndarray, "B N C"], grid: tuple[int, int]) -> Float[np.ndarray, "B"]:
  """The mean cosine of the pairs of tokens that touch along a side: R(Q-1) + (R-1)Q pairs of R x Q tokens."""
  rows, columns = grid
  token_BRQC = unit(tokens_BNC).reshape(len(tokens_BNC), rows, columns, -1)
  across = np.einsum("brqc,brqc->brq", token_BRQC[:, :, 1:], token_BRQC[:, :, :-1])
  down = np.einsum("brqc,brqc->brq", token_BRQC[:, 1:], token_BRQC[:, :-1])
  pairs = rows * (columns - 1) + (rows - 1) * columns
  return (across.sum(axis=(1, 2)) + down.sum(axis=(1, 2))) / pairs


def agreeing(
  predicted_BN: Int[np.ndarray, "B N"], label_BN: Int[np.ndarray, "B N"], num_classes: int
) -> Int[np.ndarray, "B"]:
  """How many tokens are predicted to be of the class that most tokens of their group are predicted to be of.

  Divided by N this is the purity of the groups, if a token's class is what a classifier says of it. It is 1
  for groups of one token; compare it with that of random groups of the same number.
  """
  batch_size, num_tokens = label_BN.shape
  votes_BMG = np.zeros((batch_size, num_tokens, num_classes), np.int64)
  np.add.at(votes_BMG, (np.arange(batch_size)[:, None], label_BN, predicted_BN), 1)
  return votes_BMG.max(axis=2).sum(axis=1)


class LeastSquares:
  """A linear classifier of single tokens: ridge regression of the one-hot class on the unit token and 1.

  W = (X'X + λ tr(X'X)/D I)^-1 X'Y, exact and in float64, from sums over any number of batches. It needs no
  learning rate, so that two kinds of tokens are compared with nothing tuned for either.
  """

  def __init__(self, width: int, num_classes: int, ridge: float = 1e-6):
    self._gram = np.zeros((width + 1, width + 1))
    self._moment = np.zeros((width + 1, num_classes))
    self._ridge = ridge

  def add(self, tokens_BNC: Float[np.ndarray, "B N C"], label_B: Int[np.ndarray, "B"]) -> None:
    """Every token of an image has the image's class."""
    x_TD = self._inputs(tokens_BNC).reshape(-1, len(self._gram))
    y_TG = np.eye(self._moment.shape[1])[np.repeat(label_B, tokens_BNC.shape[1])]
    self._gram += x_TD.T @ x_TD
    self._moment += x_TD.T @ y_TG

  def solve(self, ridge: float | None = None) -> Float[np.ndarray, "D G"]:
    """The weights; the last row is the bias. `ridge` takes the place of λ."""
    size = len(self._gram)
    ridge = self._ridge if ridge is None else ridge
    penalty = ridge * np.trace(self._gram) / size * np.eye(size)
    return np.linalg.solve(self._gram + penalty, self._moment)

  @classmethod
  def predict(cls, weights_DG: Float[np.ndarray, "D G"], tokens_BNC: Float[np.ndarray, "B N C"]):
    """The class of every token, [B, N]."""
    return np.argmax(cls._inputs(tokens_BNC) @ weights_DG, axis=-1)

  @staticmethod
  def _inputs(tokens_BNC: np.ndarray) -> np.ndarray:
    tokens_BNC = unit(tokens_BNC.astype(np.float64))
    return np.concatenate([tokens_BNC, np.ones((*tokens_BNC.shape[:2], 1))], axis=-1)
