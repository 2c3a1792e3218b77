"""Evaluators: numbers about a state. One file each, with `class Evaluator`.

`Evaluator(predict, mesh, **options)` is made once; `run(state)` yields (name, value). `predict` maps a
name to `(state, batch on the device) -> array, the same on every process`.
Every example counts exactly once: `data.eval_batches` pads, `valid` says what is padding.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dtm_jax import data, datasets, plugins
from dtm_jax import mesh as meshes
from dtm_jax.arrays import Array, Batch, PyTree

Predict = Mapping[str, Callable[[PyTree, Batch], Array]]


def choose(predict: Predict, name: str) -> Callable[[PyTree, Batch], Array]:
  """`predict[name]`; an unknown name's error lists what the task offers."""
  if name not in predict:
    raise ValueError(f"Unknown predict function {name!r}. The task offers: {', '.join(sorted(predict))}.")
  return predict[name]


def dataset(options, split: str | None) -> data.Dataset:
  """The split of the data set `options`; None: "val", "validation" or "test", whichever it has first."""
  if split is None:
    split = datasets.evaluation_split(options)
    logging.info("Data set %r is evaluated on its split %r.", options["name"], split)
  return plugins.build("datasets", options, split=split)


def require_classes(num_scores: int, dataset: data.Dataset) -> None:
  """Raises ValueError where a classifier's scores are not one for each class of the data set."""
  if num_scores != len(dataset.class_names):
    raise ValueError(
      f"The classifier has {num_scores} classes, data set {dataset.name!r} has {len(dataset.class_names)}."
    )


def require_images(count: int, dataset: data.Dataset) -> None:
  """Raises ValueError where none of the data set's images could be read."""
  if not count:
    raise ValueError(
      f"All images of data set {dataset.name!r} are corrupt: 0 of {dataset.num_examples} count."
    )


def each_labelled(
  predict: Callable[[PyTree, Batch], Array], state: PyTree, dataset: data.Dataset, mesh: Mesh, **options
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """`each_batch` over all of a data set with classes; `options` are those of `data.eval_batches`.

  Raises:
    ValueError: a label is none of the data set's classes, or no image can be read.
  """
  batches = (data.require_labels(batch, dataset) for batch in data.eval_batches(dataset, **options))
  count = 0
  for output, label_B in each_batch(predict, state, batches, mesh):
    count += len(label_B)
    yield output, label_B
  require_images(count, dataset)


def each_batch(
  predict: Callable[[PyTree, Batch], Array], state: PyTree, batches: Iterable[Batch], mesh: Mesh
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Batch by batch the outputs and labels of all valid examples of all processes, in order, on every host.

  An output may be a tuple of arrays.
  """
  for batch in batches:
    on_device = meshes.to_device(batch, mesh)
    output = jax.device_get(predict(state, on_device))
    everyone = batch
    if jax.process_count() > 1:
      local = {name: batch[name] for name in ("label", "valid")}
      everyone = multihost_utils.process_allgather(local, tiled=True)
    rows = np.flatnonzero(everyone["valid"])
    yield jax.tree.map(lambda x, rows=rows: x[rows], output), everyone["label"][rows]
