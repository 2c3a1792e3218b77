"""The rank of the true class among the scores of a classifier."""

import numpy as np

from dtm_jax.arrays import Float, Int


def label_rank(logits_BG: Float[np.ndarray, "B G"], label_B: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
  """Return the number of classes that rank before the true class. A rank below k is a top-k answer.

  Classes rank by falling score. The lower index comes first if scores are equal. A score of NaN ranks before
  all others, and a true class with this score ranks last. So a model that gives NaN is never right.
  """
  own_B1 = np.take_along_axis(logits_BG, label_B[:, None], axis=1)
  lower_index_BG = np.arange(logits_BG.shape[1])[None] < label_B[:, None]
  before_BG = np.where(lower_index_BG, ~(logits_BG < own_B1), ~(logits_BG <= own_B1))
  np.put_along_axis(before_BG, label_B[:, None], np.isnan(own_B1), axis=1)
  return before_BG.sum(axis=1)
