"""k-nearest-neighbour accuracy of frozen features: cosine similarity, votes weighted by exp(sim / T).

The bank stays where it was computed: each device keeps the features of its own rows of every batch, in
float32, and no host ever sees them. Queries come batch by batch; every device finds their k nearest among its
rows, block by block, so that no more than [queries of a batch, BLOCK] similarities exist at once, and then
the candidates of all devices are merged. ImageNet's bank (1,281,167 x 768) takes 3.9 GB over all devices.

What does not depend on the number of devices: of equal similarities the example that comes first in the
data set is the nearer one; votes are added in the order of the neighbours; the products of features have
one shape, [queries of a batch, D] x [D, rows of a block], wherever the rows lie. What may: the features
themselves, in their last bits, since each of many devices sees fewer images at once, and XLA promises the
same rounding for the same shapes only. Neighbours then change places only where their cosines are that close.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from dtm_jax import data, datasets, evaluators
from dtm_jax.arrays import Array, Batch, Bool, Float, Int, PyTree
from dtm_jax.errors import OptionError
from dtm_jax.evaluators import Context
from dtm_jax.training import mesh as meshes

BLOCK = 16384
NOBODY = np.iinfo(np.int32).max


class Evaluator:
  """Classifies every query by its k nearest examples of the bank (Wu et al., arXiv 1805.01978).

  Args:
    context: what the run gives; `features` names those to compare, one accuracy each.
    dataset: options of the data set, `name` among them; `bank` and `queries` are its splits. It must know its
      classes. `queries` of None: val or test, by any of their names, whichever there is first.
    k, temperature: neighbours that vote, and how sharply their votes fall with the distance. Several k, as
      a tuple, cost hardly more than the largest.
    max_bank, max_queries: only so many examples of the split, for quick looks: the first, or where these are
      not spread over the classes, evenly spaced ones (`datasets.spread`).
  """

  def __init__(
    self,
    context: Context,
    *,
    dataset,
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
    bank, queries = (evaluators.open_dataset(dataset, split) for split in (bank, queries))
    evaluators.require_same_classes(queries, bank)
    self._bank, self._queries = datasets.spread(bank, max_bank), datasets.spread(queries, max_queries)
    self._limits = {"bank": max_bank, "queries": max_queries}
    self._options = dict(batch_size=batch_size, image_size=image_size, resize=resize)
    self._ks = _ascending(k)
    self._vote = dict(temperature=temperature, num_classes=len(self._bank.class_names or ()))

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yields ("<features>_accuracy", share of the queries whose class wins the vote), right ones counted in
    integers; with several k ("<features>_accuracy_k<k>", ...).

    Raises:
      OptionError: the bank has fewer than k examples, or a label is none of the data set's classes, or all
        queries are corrupt.
    """
    for dataset in (self._bank, self._queries):
      data.require_known_labels(dataset)
    banks = self._fill_banks(state)
    right, count = dict.fromkeys(banks, 0), 0
    for batch in self._batches(self._queries, self._limits["queries"]):
      count += int(_count(batch["valid"]))
      for name, bank in banks.items():
        query_QD = self._predict[name](state, batch)
        class_KQ = classify(bank, query_QD, mesh=self._mesh, ks=self._ks, **self._vote)
        right[name] += np.asarray(_num_right(class_KQ, batch["label"], batch["valid"]), int)
    evaluators.require_images(count, self._queries)
    for name, right_K in right.items():
      for k, number in zip(self._ks, right_K, strict=True):
        yield f"{name}_accuracy" + (f"_k{k}" if len(self._ks) > 1 else ""), int(number) / count

  def _fill_banks(self, state: PyTree) -> dict[str, "Bank"]:
    """One for each kind of features, all in one pass over the images."""
    limit = self._limits["bank"] or self._bank.num_examples
    banks = {}
    for place, batch in enumerate(self._batches(self._bank, limit)):
      for name, predict in self._predict.items():
        feature_BD = predict(state, batch)
        if name not in banks:
          banks[name] = empty_bank(self._mesh, limit, *feature_BD.shape)
        banks[name] = _put(banks[name], place, feature_BD, batch["label"], batch["index"], batch["valid"])
    for bank in banks.values():
      _require(self._ks, int(_count(bank.index != NOBODY)), f" of data set {self._bank.name!r}")
    return banks

  def _batches(self, dataset: data.Dataset, limit: int | None) -> Iterator[Batch]:
    """On the devices; an example is valid if it is among the first `limit`."""
    in_sequence = isinstance(dataset.source, data.Stream)  # each process then reads a part of its own
    rows = self._options["batch_size"] // (jax.process_count() if in_sequence else 1)
    enough, seen = None if limit is None else math.ceil(limit / rows), set()
    for batch in data.eval_batches(dataset, max_batches=enough, **self._options):
      if limit is not None:
        batch["valid"] &= batch["index"] < limit
      seen.update(batch["label"][batch["valid"]].tolist())
      yield meshes.to_device(data.require_labels(batch, dataset), self._mesh)
    if in_sequence and limit is not None and limit < dataset.num_examples:
      _warn_of_few_classes(len(seen), limit, dataset)


def _warn_of_few_classes(seen: int, limit: int, dataset: data.Dataset) -> None:
  """A set that is read in sequence may be sorted; nothing but its first examples can be had of it."""
  num_classes = len(dataset.class_names)
  if seen < 0.75 * num_classes * (1 - (1 - 1 / num_classes) ** (limit / jax.process_count())):
    logging.warning(
      "Of the %d classes of %r its first %d examples show this process %d: it seems to be sorted. Use all, "
      "or convert it with scripts/tfrecord_to_array_record.py.", num_classes, dataset.name, limit, seen,
    )  # fmt: skip


class Bank(NamedTuple):
  """J blocks of C batches of B rows, split over all devices along B. Rows of no example have index NOBODY.

  On a device a block has C·B/devices = (about) BLOCK rows, in the order of their index.
  """

  feature: Float[Array, "J C B D"]
  label: Int[Array, "J C B"]
  index: Int[Array, "J C B"]


def knn_predict(
  bank: Float[np.ndarray, "M D"],
  bank_labels: Int[np.ndarray, " M"],
  queries: Float[np.ndarray, "Q D"],
  *,
  num_classes: int,
  k: int,
  temperature: float,
  mesh: Mesh | None = None,
  block: int = 512,
) -> Int[np.ndarray, " Q"]:
  """The class of each query: argmax_g Σ_{i in its k nearest, y_i = g} exp(cos(q, b_i) / temperature).

  For features on this host, `block` queries at a time. The devices of `mesh` (default: one) share the bank.

  Raises:
    OptionError: the bank has fewer than k examples.
  """
  _require((k,), len(bank))
  mesh = mesh or meshes.make_mesh(devices=jax.local_devices()[:1])
  on_devices = bank_of(bank, bank_labels, mesh)
  classes = [
    classify(
      on_devices, _padded(queries[start : start + block], block),
      mesh=mesh, num_classes=num_classes, ks=(k,), temperature=temperature,
    )[0]
    for start in range(0, len(queries), block)
  ]  # fmt: skip
  return np.concatenate([np.asarray(part) for part in classes])[: len(queries)]


def bank_of(features: Float[np.ndarray, "M D"], labels: Int[np.ndarray, " M"], mesh: Mesh) -> Bank:
  """From features on this host."""
  count, width = features.shape
  size = math.ceil(min(count, BLOCK) / mesh.size) * mesh.size
  bank = empty_bank(mesh, count, size, width)
  for place, start in enumerate(range(0, count, size)):
    index = np.arange(start, start + size)
    rows = (_padded(np.asarray(x)[start : start + size], size) for x in (features, labels))
    bank = _put(bank, place, *rows, index, index < count)
  return bank


def empty_bank(mesh: Mesh, num_examples: int, batch_size: int, width: int) -> Bank:
  """Room for `num_examples` in batches of `batch_size`.

  A device's blocks have at most BLOCK rows, rounded up to whole batches, and for any number of devices as
  many: those that leave one device the least room to spare.
  """
  rows = num_examples / math.ceil(num_examples / BLOCK)
  in_block = math.ceil(rows / batch_size) * mesh.size
  shape = (math.ceil(num_examples / batch_size / in_block), in_block, batch_size)

  def empty() -> Bank:
    return Bank(jnp.zeros((*shape, width)), jnp.zeros(shape, jnp.int32), jnp.full(shape, NOBODY, jnp.int32))

  return jax.jit(empty, out_shardings=meshes.batch_sharding(mesh, axis=2))()


@functools.partial(jax.jit, donate_argnums=0)
def _put(bank: Bank, place: Array, feature_BD: Array, label_B: Array, index_B: Array, valid_B: Array) -> Bank:
  """The bank with one more batch, in place."""
  index_B = jnp.where(valid_B, index_B, NOBODY).astype(jnp.int32)
  rows = (feature_BD.astype(jnp.float32), label_B.astype(jnp.int32), index_B)
  block, batch = jnp.divmod(place, bank.index.shape[1])
  return Bank(*(old.at[block, batch].set(new) for old, new in zip(bank, rows, strict=True)))


@functools.partial(jax.jit, static_argnames=("mesh", "num_classes", "ks", "temperature"))
def classify(
  bank: Bank,
  query_QD: Float[Array, "Q D"],
  *,
  mesh: Mesh,
  num_classes: int,
  ks: tuple[int, ...],
  temperature: float,
) -> Int[Array, "K Q"]:
  """The class that wins the vote of the nearest k, for each k of the ascending `ks`, on every device.

  Equal votes go to the smallest class; a query whose features are not numbers gets -1.
  """
  found = nearest(bank, query_QD, mesh=mesh, k=ks[-1])
  classes = _vote(found.sim, found.label, num_classes, ks, temperature)
  return jax.lax.with_sharding_constraint(classes, meshes.replicated(mesh))


class Neighbours(NamedTuple):
  """Of each query some examples, the nearest first."""

  sim: Float[Array, "Q k"]
  index: Int[Array, "Q k"]
  label: Int[Array, "Q k"]


def nearest(bank: Bank, query_QD: Float[Array, "Q D"], *, mesh: Mesh, k: int) -> Neighbours:
  """The k nearest of all devices; of equals that of the smaller index. To be jitted."""
  everywhere = meshes.replicated(mesh)
  search = jax.shard_map(
    functools.partial(_nearest_here, k=k),
    mesh=mesh,
    in_specs=(meshes.batch_sharding(mesh, axis=2).spec, everywhere.spec),
    out_specs=meshes.batch_sharding(mesh, axis=1).spec,
    check_vma=False,  # the scan starts from constants
  )
  candidates = search(bank, query_QD.astype(jnp.float32))
  sim, *others = jax.lax.with_sharding_constraint(candidates, everywhere)
  distance, *others = jax.lax.sort((-sim, *others), dimension=1, num_keys=2)
  return Neighbours(*(x[:, :k] for x in (-distance, *others)))


def _nearest_here(bank: Bank, query_QD: Float[Array, "Q D"], *, k: int) -> Neighbours:
  """The k nearest of this device's rows, a block at a time."""
  query_QD, (num_queries, width) = _unit(query_QD), query_QD.shape
  feature_JRD = bank.feature.reshape(len(bank.feature), -1, width)
  label_JR, index_JR = (x.reshape(feature_JRD.shape[:2]) for x in (bank.label, bank.index))

  def nearer(best: Neighbours, block) -> tuple[Neighbours, None]:
    feature_RD, label_R, index_R = block
    sim_QR = jnp.einsum("qd,rd->qr", query_QD, _unit(feature_RD), precision="highest")
    nobody_QR = (index_R == NOBODY)[None] | jnp.isnan(sim_QR)
    # Of equals top_k takes the first, which is the one of smaller index.
    sim_Qk, place_Qk = jax.lax.top_k(jnp.where(nobody_QR, -jnp.inf, sim_QR), min(k, len(index_R)))
    both = jax.tree.map(
      lambda *x: jnp.concatenate(x, axis=1), best, Neighbours(sim_Qk, index_R[place_Qk], label_R[place_Qk])
    )
    sim_Qk, place_Qk = jax.lax.top_k(both.sim, k)
    chosen = (jnp.take_along_axis(x, place_Qk, axis=1) for x in both[1:])
    return Neighbours(sim_Qk, *chosen), None

  shape = (num_queries, k)
  none_yet = Neighbours(jnp.full(shape, -jnp.inf), jnp.full(shape, NOBODY), jnp.zeros(shape, jnp.int32))
  return jax.lax.scan(nearer, none_yet, (feature_JRD, label_JR, index_JR))[0]


def _vote(
  sim_Qk: Array, label_Qk: Array, num_classes: int, ks: tuple[int, ...], temperature: float
) -> Int[Array, "K Q"]:
  """Votes are relative to the nearest's, so that no temperature makes them infinite."""
  query_Q = jnp.arange(len(sim_Qk))
  weight_Qk = jnp.exp((sim_Qk - sim_Qk[:, :1]) / temperature)

  def add(votes_QG: Array, neighbour: tuple[Array, Array]) -> tuple[Array, None]:
    label_Q, weight_Q = neighbour
    return votes_QG.at[query_Q, label_Q].add(weight_Q, unique_indices=True), None

  votes_QG, classes, first = jnp.zeros((len(query_Q), num_classes)), [], 0
  for k in ks:  # one neighbour after another: a sum in a fixed order
    votes_QG, _ = jax.lax.scan(add, votes_QG, (label_Qk.T[first:k], weight_Qk.T[first:k]))
    classes.append(jnp.where(jnp.isfinite(sim_Qk[:, 0]), jnp.argmax(votes_QG, axis=1), -1))
    first = k
  return jnp.stack(classes)


def _unit(x: Float[Array, "_ D"]) -> Float[Array, "_ D"]:
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@jax.jit
def _count(condition: Bool[Array, "..."]) -> Int[Array, ""]:
  return jnp.sum(condition, dtype=jnp.int32)


@jax.jit
def _num_right(class_KQ: Array, label_Q: Array, valid_Q: Array) -> Int[Array, " K"]:
  return jnp.sum((class_KQ == label_Q[None]) & valid_Q[None], axis=1, dtype=jnp.int32)


def _ascending(k: int | tuple[int, ...]) -> tuple[int, ...]:
  ks = tuple(sorted({k} if isinstance(k, int) else set(k)))
  if not ks or ks[0] < 1:
    raise OptionError(f"kNN needs at least one neighbour, got k={k}.")
  return ks


def _require(ks: tuple[int, ...], num_examples: int, whose: str = "") -> None:
  if num_examples < ks[-1]:
    raise OptionError(
      f"kNN needs at least k = {ks[-1]} examples in its bank{whose}, which has {num_examples}."
    )


def _padded(x: np.ndarray, size: int) -> np.ndarray:
  return np.pad(x, ((0, size - len(x)), *((0, 0),) * (x.ndim - 1)))
