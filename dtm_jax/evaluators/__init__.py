"""Evaluators: numbers about a state. One file each, with `class Evaluator`.

`Evaluator(predict, mesh, **options)` is made once; `run(state)` yields (name, value). `predict` maps a
name to `(state, batch on the device) -> array, the same on every process`. The loop adds two options:
`tokenize`, of the task, and `training`, the data set that the run trains on.
Every example counts exactly once: `data.eval_batches` pads, `valid` says what is padding.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dtm_jax import data, datasets, plugins
from dtm_jax.arrays import Array, Batch, PyTree
from dtm_jax.errors import OptionError
from dtm_jax.training import mesh as meshes

Predict = Mapping[str, Callable[[PyTree, Batch], Array]]


def choose(predict: Predict, name: str) -> Callable[[PyTree, Batch], Array]:
  """`predict[name]`; an unknown name's error lists what the task offers."""
  if name not in predict:
    raise OptionError(f"Unknown predict function {name!r}. The task offers: {', '.join(sorted(predict))}.")
  return predict[name]


def dataset(options, split: str | None) -> data.Dataset:
  """The split of the data set `options`; None: val or test, by any name, whichever it has first."""
  if split is None:
    split = datasets.evaluation_split(options)
    logging.info("Data set %r is evaluated on its split %r.", options["name"], split)
  return plugins.build("datasets", options, split=split)


def require_same_classes(evaluated: data.Dataset, trained: data.Dataset | None) -> None:
  """Compare the classes of an evaluated data set, by name, with those that it is judged by.

  A line of the log names classes that the evaluated set lacks. Data sets without classes are not compared,
  and names that are the numbers 0, 1, ... stand for the labels.

  Raises:
    OptionError: the evaluated set has classes that the other has not, or numbers them in another way.
  """
  if trained is None or not trained.class_names or not evaluated.class_names:
    return
  if evaluated.class_names == trained.class_names:
    _require_examples(evaluated, trained)
    return
  if len(evaluated.class_names) == len(trained.class_names):
    for numbered, named in ((evaluated, trained), (trained, evaluated)):
      if _are_labels(numbered.class_names):
        logging.warning(
          "Class 0 of %r is taken for %r of %r, and so on: its classes have numbers for names.",
          numbered.name, named.class_names[0], named.name,
        )  # fmt: skip
        return
  known = {name: label for label, name in enumerate(trained.class_names)}
  _refuse_unknown([name for name in evaluated.class_names if name not in known], evaluated, trained)
  name, here = next(
    (name, here) for here, name in enumerate(evaluated.class_names) if known[name] != here
  )  # fmt: skip
  raise OptionError(
    f"Data sets {evaluated.name!r} and {trained.name!r} number their classes in two ways: {name!r} is {here} "
    f"of {len(evaluated.class_names)} in the first and {known[name]} of {len(known)} in the second. Place "
    "both in one data_dir, as its folders train/ and val/."
  )


def _require_examples(evaluated: data.Dataset, trained: data.Dataset) -> None:
  """Compares which of their classes two data sets have examples of, where their labels are known."""
  if evaluated.labels is None or trained.labels is None:
    return
  here, there = (set(each.labels.tolist()) for each in (evaluated, trained))
  names = lambda labels: [name for label, name in enumerate(trained.class_names) if label in labels]
  if unknown := names(here - there):
    if not datasets.is_part(trained):
      _refuse_unknown(unknown, evaluated, trained)
    logging.warning("%r has no example of %s of %r.", trained.name, _some(unknown), evaluated.name)
  if (lacking := names(there - here)) and not datasets.is_part(evaluated):
    logging.info("%r has no example of %s of %r.", evaluated.name, _some(lacking), trained.name)


def _refuse_unknown(names: list[str], evaluated: data.Dataset, trained: data.Dataset) -> None:
  if names:
    raise OptionError(
      f"Data set {evaluated.name!r} has {_some(names)} that {trained.name!r} does not have. The latter has "
      f"{_some(trained.class_names)}. If a folder such as 'images' is no class, sort its images into folders "
      "of classes, or tell their classes in a file val_annotations.txt beside it, '<file> <class>' on a line."
    )


def _some(names: Sequence[str], shown: int = 5) -> str:
  more = ", ..." if len(names) > shown else ""
  return f"{len(names)} class{'es' * (len(names) != 1)} ({', '.join(names[:shown])}{more})"


def _are_labels(names: Sequence[str]) -> bool:
  return all(name.isdecimal() and int(name) == label for label, name in enumerate(names))


def require_classes(num_scores: int, dataset: data.Dataset) -> None:
  """Raises OptionError where a classifier's scores are not one for each class of the data set."""
  if num_scores != len(dataset.class_names):
    raise OptionError(
      f"The classifier has {num_scores} classes, data set {dataset.name!r} has {len(dataset.class_names)}."
    )


def require_images(count: int, dataset: data.Dataset) -> None:
  """Raises OptionError where none of the data set's images could be read."""
  if not count:
    raise OptionError(
      f"All images of data set {dataset.name!r} are corrupt: 0 of {dataset.num_examples} count."
    )


def each_labelled(
  predict: Callable[[PyTree, Batch], Array], state: PyTree, dataset: data.Dataset, mesh: Mesh, **options
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """`each_batch` over all of a data set with classes; `options` are those of `data.eval_batches`.

  Raises:
    OptionError: a label is none of the data set's classes, or no image can be read.
  """
  data.require_known_labels(dataset)
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
