"""Runs a predict function over the images of a data set, so that every example counts exactly once."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dtm_jax import data, datasets, plugins
from dtm_jax.arrays import Batch, PyTree
from dtm_jax.errors import OptionError
from dtm_jax.evaluators._context import PredictFunction, Section
from dtm_jax.training import mesh as meshes


def open_dataset(options: Section, split: str | None) -> data.Dataset:
  """Return a split of a data set.

  Args:
    options: the options of the data set, with its name under "name".
    split: the name of the split. None means its val or test split, by any of their usual names.

  Raises:
    OptionError: there is no such data set or split, or an option does not fit it.
  """
  if split is None:
    split = datasets.evaluation_split(options)
    logging.info("Data set %r is evaluated on its split %r.", options["name"], split)
  return plugins.build("datasets", options, split=split)


def labelled_outputs(
  predict: PredictFunction, state: PyTree, dataset: data.Dataset, mesh: Mesh, **view: Any
) -> Iterator[tuple[Any, np.ndarray]]:
  """Yield the outputs and labels of a whole data set, batch by batch.

  Padding and corrupt images are left out. Every process sees the examples of all processes.

  Args:
    predict: (state, batch on the devices) -> an array [B, ...] or a tuple of such arrays.
    state: first argument of `predict`.
    dataset: a data set with class names.
    mesh: the devices that share each batch.
    view: the other arguments of `data.eval_batches`: batch_size, image_size and resize.

  Yields:
    The outputs on the host and the labels [B] of one batch, for its valid examples.

  Raises:
    OptionError: a label is not one of the data set's classes, or no image can be read.
  """
  data.require_known_labels(dataset)
  batches = (data.require_labels(batch, dataset) for batch in data.eval_batches(dataset, **view))
  count = 0
  for output, label_B in batch_outputs(predict, state, batches, mesh):
    count += len(label_B)
    yield output, label_B
  require_images(count, dataset)


def batch_outputs(
  predict: PredictFunction, state: PyTree, batches: Iterable[Batch], mesh: Mesh
) -> Iterator[tuple[Any, np.ndarray]]:
  """Yield the outputs and labels of the valid examples of each batch, in order.

  Each process passes the batches with its own rows. Every process sees the examples of all processes.

  Args:
    predict: (state, batch on the devices) -> an array [B, ...] or a tuple of such arrays.
    state: first argument of `predict`.
    batches: batches of `data.eval_batches`, with "label" and "valid".
    mesh: the devices that share each batch.
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


def require_images(count: int, dataset: data.Dataset) -> None:
  """Check that at least one image of a data set could be read.

  Raises:
    OptionError: `count`, the number of valid images, is 0.
  """
  if not count:
    raise OptionError(
      f"All images of data set {dataset.name!r} are corrupt: 0 of {dataset.num_examples} count."
    )
