"""Measures frozen features by k nearest neighbours: cosine similarity, with votes of weight exp(sim / T).

The bank stays on the devices: each keeps the features of its own rows of every batch, in float32. No host
receives them. Queries come batch by batch. ImageNet's bank (1,281,167 x 768) takes 3.9 GB over all devices.

The method is that of Wu et al., arXiv 1805.01978, section 3.4.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from dtm_jax import data, datasets, evaluators
from dtm_jax.arrays import Batch, PyTree
from dtm_jax.errors import OptionError
from dtm_jax.evaluators import Context, Section
from dtm_jax.evaluators._knn_bank import NOBODY, Bank, add_batch, count_true, empty_bank, require_neighbours
from dtm_jax.evaluators._knn_search import classify, num_right
from dtm_jax.training import mesh as meshes


class Evaluator:
  """Classifies every query by the vote of its k nearest examples in the bank.

  Args:
    context: needs the predict functions `features`, [B, D] each.
    dataset: options of the data set, with its "name". It must have class names.
    features: names of the features to compare, with one accuracy each.
    bank: the split of the labelled examples.
    queries: the split to measure. Default: val or test, by any of their usual names.
    k: the number of neighbours that vote, or several numbers. Several cost hardly more than the largest.
    temperature: T, how sharply a vote falls with the distance.
    image_size: pixels of a side that the model sees.
    resize: pixels of the shorter side before the central crop. Default: `image_size`.
    batch_size: images in a batch, of all devices together.
    max_bank: the number of examples in the bank, for a quick look. Default: all. They are the first ones, or
      evenly spaced ones if the first are not spread over the classes.
    max_queries: the number of queries, chosen in the same way. Default: all.

  Raises:
    OptionError: there is no such split or function, the splits have different classes, or k is below 1.
  """

  def __init__(
    self,
    context: Context,
    *,
    dataset: Section,
    features: tuple[str, ...] = ("student",),
    bank: str = "train",
    queries: str | None = None,
    k: int | tuple[int, ...] = 20,
    temperature: float = 0.07,
    image_size: int,
    resize: int | None = None,
    batch_size: int = 512,
    max_bank: int | None = None,
    max_queries: int | None = None,
  ):
    self._predict = {name: context.function(name) for name in features}
    self._mesh = context.mesh
    bank_set, query_set = (evaluators.open_dataset(dataset, split) for split in (bank, queries))
    evaluators.require_same_classes(query_set, bank_set)
    self._bank, self._queries = datasets.spread(bank_set, max_bank), datasets.spread(query_set, max_queries)
    self._max_bank, self._max_queries = max_bank, max_queries
    self._view: dict[str, Any] = dict(batch_size=batch_size, image_size=image_size, resize=resize)
    self._ks = _ascending(k)
    self._vote: dict[str, Any] = dict(temperature=temperature, num_classes=len(self._bank.class_names or ()))

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yield "<features>_accuracy", or "<features>_accuracy_k<k>" for each of several k.

    Right answers are counted in integers.

    Raises:
      OptionError: the bank has fewer than k examples, a label is not one of the data set's classes, or no
        image can be read.
    """
    for dataset in (self._bank, self._queries):
      data.require_known_labels(dataset)
    banks = self._fill_banks(state)
    right, count = {name: np.zeros(len(self._ks), int) for name in banks}, 0
    for batch in self._batches(self._queries, self._max_queries):
      count += int(count_true(batch["valid"]))
      for name, bank in banks.items():
        query_QD = self._predict[name](state, batch)
        class_KQ = classify(bank, query_QD, mesh=self._mesh, ks=self._ks, **self._vote)
        right[name] += np.asarray(num_right(class_KQ, batch["label"], batch["valid"]), int)
    evaluators.require_images(count, self._queries)
    for name, right_K in right.items():
      for k, number in zip(self._ks, right_K, strict=True):
        yield f"{name}_accuracy" + (f"_k{k}" if len(self._ks) > 1 else ""), int(number) / count

  def _fill_banks(self, state: PyTree) -> dict[str, Bank]:
    """Return a bank for each kind of features, filled in one pass over the images."""
    limit = self._max_bank or self._bank.num_examples
    banks: dict[str, Bank] = {}
    for place, batch in enumerate(self._batches(self._bank, limit)):
      for name, predict in self._predict.items():
        feature_BD = predict(state, batch)
        if name not in banks:
          banks[name] = empty_bank(self._mesh, limit, *feature_BD.shape)
        rows = (batch["label"], batch["index"], batch["valid"])
        banks[name] = add_batch(banks[name], place, feature_BD, *rows)
    for bank in banks.values():
      require_neighbours(self._ks, int(count_true(bank.index != NOBODY)), self._bank.name)
    return banks

  def _batches(self, dataset: data.Dataset, limit: int | None) -> Iterator[Batch]:
    """Yield the batches on the devices. An example is valid if it is among the first `limit`."""
    in_sequence = isinstance(dataset.source, data.Stream)  # then each process reads its own part
    rows = self._view["batch_size"] // (jax.process_count() if in_sequence else 1)
    enough = None if limit is None else math.ceil(limit / rows)
    seen: set[int] = set()
    for batch in data.eval_batches(dataset, max_batches=enough, **self._view):
      if limit is not None:
        batch["valid"] &= batch["index"] < limit
      seen.update(batch["label"][batch["valid"]].tolist())
      yield meshes.to_device(data.require_labels(batch, dataset), self._mesh)
    if in_sequence and limit is not None and limit < dataset.num_examples:
      _warn_of_few_classes(len(seen), limit, dataset)


def _warn_of_few_classes(num_seen: int, limit: int, dataset: data.Dataset) -> None:
  """Warn if the first examples of a data set show too few classes, because it may be sorted by class.

  A data set that is read in sequence gives only its first examples.
  """
  num_classes = len(dataset.class_names or ())
  expected = num_classes * (1 - (1 - 1 / num_classes) ** (limit / jax.process_count()))
  if num_seen < 0.75 * expected:
    logging.warning(
      "Data set %r has %d classes. Its first %d examples show this process %d of them, so it seems to be "
      "sorted. Use all its examples, or convert it with scripts/tfrecord_to_array_record.py.",
      dataset.name, num_classes, limit, num_seen,
    )  # fmt: skip


def _ascending(k: int | Sequence[int]) -> tuple[int, ...]:
  """Return the different numbers of neighbours in ascending order."""
  ks = tuple(sorted({k} if isinstance(k, int) else set(k)))
  if not ks or ks[0] < 1:
    raise OptionError(f"kNN needs at least one neighbour, got k={k}.")
  return ks
