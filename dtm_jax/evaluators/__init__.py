"""Evaluators: each module of this folder measures numbers of a state.

A module defines a class `Evaluator`. The run makes it once as `Evaluator(context, **options)`, with the
options of its section in `config.evals`. Then it calls `run(state)`, which yields (name, value) pairs.
Modules that start with an underscore are helpers.

This is a complete evaluator. It measures the mean confidence of a classifier:

    class Evaluator:
      def __init__(self, context: Context, *, dataset, split=None, batch_size=512):
        self._predict, self._mesh = context.function("logits"), context.mesh
        self._dataset = evaluators.open_dataset(dataset, split)
        self._view = dict(batch_size=batch_size, image_size=context.image_size)

      def run(self, state):
        total, count = 0.0, 0
        for logits_BG, label_B in evaluators.labelled_outputs(
          self._predict, state, self._dataset, self._mesh, **self._view
        ):
          total += float(scipy.special.softmax(logits_BG, axis=1).max(axis=1).sum())
          count += len(label_B)
        yield "confidence", total / count
"""

from dtm_jax.evaluators._batches import batch_outputs, labelled_outputs, open_dataset, require_images
from dtm_jax.evaluators._classes import require_classes, require_same_classes
from dtm_jax.evaluators._context import Context, PredictFunction, Section
from dtm_jax.evaluators._schedule import Evaluator, Evaluators, make

__all__ = [
  "Context",
  "Evaluator",
  "Evaluators",
  "PredictFunction",
  "Section",
  "batch_outputs",
  "labelled_outputs",
  "make",
  "open_dataset",
  "require_classes",
  "require_images",
  "require_same_classes",
]
