"""The confusion matrix of semantic segmentation and the scores that follow from it."""

import numpy as np

from dtm_jax.arrays import Int
from dtm_jax.data.label_maps import IGNORE, Map


def confusion_matrix(
  label: Map, predicted: Int[np.ndarray, "H W"], num_classes: int
) -> Int[np.ndarray, "G G"]:
  """Return how many pixels of the class of each row were given the class of each column.

  Ignored pixels do not count.
  """
  valid = label != IGNORE
  pair = label[valid].astype(np.int64) * num_classes + predicted[valid]
  return np.bincount(pair, minlength=num_classes**2).reshape(num_classes, num_classes)


def segmentation_scores(confusion_GG: Int[np.ndarray, "G G"]) -> dict[str, float]:
  """Return miou, pixel_accuracy and mean_accuracy. mmseg calls them mIoU, aAcc and mAcc.

  The IoU of a class is |label ∧ predicted| / |label ∨ predicted| over all pixels of the data set. The mean
  leaves out classes that occur neither in labels nor in predictions. The mean accuracy leaves out classes
  that no label has.

  Args:
    confusion_GG: the confusion matrix of the whole data set.

  Raises:
    ValueError: no pixel has a label.
  """
  right, labelled, predicted = confusion_GG.diagonal(), confusion_GG.sum(axis=1), confusion_GG.sum(axis=0)
  if not labelled.sum():
    raise ValueError("No pixel of the data set has a label: all pixels are ignored.")
  union = labelled + predicted - right
  return {
    "miou": float(np.mean(right[union > 0] / union[union > 0])),
    "pixel_accuracy": float(right.sum() / labelled.sum()),
    "mean_accuracy": float(np.mean(right[labelled > 0] / labelled[labelled > 0])),
  }
