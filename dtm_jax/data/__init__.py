"""What feeds a run: data sets of images, and batches as functions of (seed, step)."""

from dtm_jax.data.batches import (
  Dataset,
  Example,
  Source,
  Stream,
  corrupt_count,
  eval_batches,
  require_known_labels,
  require_labels,
  require_maps,
  train_batches,
  whole_examples,
)

__all__ = [
  "Dataset",
  "Example",
  "Source",
  "Stream",
  "corrupt_count",
  "eval_batches",
  "require_known_labels",
  "require_labels",
  "require_maps",
  "train_batches",
  "whole_examples",
]
