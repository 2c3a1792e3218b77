"""A linear classifier of single tokens in closed form."""

import numpy as np

from dtm_jax.arrays import Array, Float, Int
from dtm_jax.evaluators._unit_norm import unit_norm


def classify(
  token_BNC: Float[Array | np.ndarray, "B N C"], weights_DG: Float[Array | np.ndarray, "D G"]
) -> Int[Array | np.ndarray, "B N"]:
  """Return the class of every token, argmax_g [u, 1] W with u the token at unit norm.

  Args:
    token_BNC: N tokens of B images, on the device or on the host. Their precision is kept.
    weights_DG: W with D = C + 1 rows. The last row is the bias.
  """
  return (unit_norm(token_BNC) @ weights_DG[:-1] + weights_DG[None, -1:]).argmax(axis=-1)


class LeastSquares:
  """Ridge regression of the one-hot class on x = [u, 1], where u is a token at unit norm.

  W = (X'X + λ tr(X'X)/D I)⁻¹ X'Y, exact and in float64, from sums over any number of batches. There is no
  learning rate to tune, so two kinds of tokens are compared on equal terms.

  Args:
    width: C, the width of a token. D = C + 1.
    num_classes: G.
    ridge: λ, relative to the mean square of an input.
  """

  def __init__(self, width: int, num_classes: int, ridge: float = 1e-6):
    self._gram = np.zeros((width + 1, width + 1))
    self._moment = np.zeros((width + 1, num_classes))
    self._ridge = ridge

  def add(self, token_BNC: Float[np.ndarray, "B N C"], label_B: Int[np.ndarray, " B"]) -> None:
    """Add the tokens of a batch. Every token has the class of its image."""
    unit_BNC = unit_norm(token_BNC.astype(np.float64))
    x_BND = np.concatenate([unit_BNC, np.ones((*unit_BNC.shape[:2], 1))], axis=-1)
    x_TD = x_BND.reshape(-1, len(self._gram))
    self._gram += x_TD.T @ x_TD
    self._moment += x_BND.sum(axis=1).T @ np.eye(self._moment.shape[1])[label_B]

  def solve(self, ridge: float | None = None) -> Float[np.ndarray, "D G"]:
    """Return the weights W for `classify`. `ridge` replaces the λ of the constructor."""
    size = len(self._gram)
    ridge = self._ridge if ridge is None else ridge
    penalty = ridge * np.trace(self._gram) / size * np.eye(size)
    return np.linalg.solve(self._gram + penalty, self._moment)
