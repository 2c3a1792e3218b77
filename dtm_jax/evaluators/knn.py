"""k-nearest-neighbour accuracy of frozen features: cosine similarity, votes weighted by exp(sim / T)."""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dtm_jax import data, evaluators, plugins
from dtm_jax.arrays import Array, Float, Int, PyTree


class Evaluator:
  """Classifies every query by its k nearest examples of the bank (Wu et al., arXiv 1805.01978).

  Args:
    predict: the task's functions; `features` names those to compare, one accuracy each.
    dataset: options of the data set, `name` among them; `bank` and `queries` are its splits.
    k, temperature: neighbours that vote, and how sharply their votes fall with the distance.
    max_bank, max_queries: only so many first examples of the split, for quick looks.
  """

  def __init__(
    self,
    predict: evaluators.Predict,
    mesh: Mesh,
    *,
    dataset,
    features: tuple[str, ...] = ("student",),
    bank: str = "train",
    queries: str = "test",
    k: int = 20,
    temperature: float = 0.07,
    image_size: int,
    resize: int | None = None,
    batch_size: int = 512,
    max_bank: int | None = None,
    max_queries: int | None = None,
    tokenize=None,
  ):
    self._predict = {name: evaluators.choose(predict, name) for name in features}
    self._vote = functools.partial(knn_predict, k=k, temperature=temperature)

    def collect(predict, state: PyTree, split: str, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
      batches = data.eval_batches(
        plugins.build("datasets", dataset, split=split),
        batch_size=batch_size, image_size=image_size, resize=resize,
      )  # fmt: skip
      enough = itertools.islice(batches, None if limit is None else -(-limit // batch_size))
      outputs, labels = evaluators.collect(predict, state, enough, mesh)
      return outputs[:limit], labels[:limit]

    self._bank = functools.partial(collect, split=bank, limit=max_bank)
    self._queries = functools.partial(collect, split=queries, limit=max_queries)

  def run(self, state: PyTree) -> Iterator[tuple[str, float]]:
    """Yields ("<features>_accuracy", share of the queries whose class wins the vote)."""
    for name, predict in self._predict.items():
      bank, bank_labels = self._bank(predict, state)
      queries, labels = self._queries(predict, state)
      predicted = self._vote(bank, bank_labels, queries, num_classes=int(bank_labels.max()) + 1)
      yield f"{name}_accuracy", float(np.mean(predicted == labels))


def knn_predict(
  bank: Float[np.ndarray, "M D"],
  bank_labels: Int[np.ndarray, "M"],
  queries: Float[np.ndarray, "Q D"],
  *,
  num_classes: int,
  k: int,
  temperature: float,
  block: int = 500,
) -> Int[np.ndarray, "Q"]:
  """The class of each query: argmax_g Σ_{i in its k nearest, y_i = g} exp(cos(q, b_i) / temperature).

  Raises:
    ValueError: the bank has fewer than k examples.
  """
  if len(bank) < k:
    raise ValueError(f"kNN needs at least k = {k} examples in its bank, which has {len(bank)}.")
  vote = jax.jit(functools.partial(_vote, num_classes=num_classes, k=k, temperature=temperature))
  bank, bank_labels = jnp.asarray(bank), jnp.asarray(bank_labels)
  padded = np.pad(queries, ((0, -len(queries) % block), (0, 0)))
  classes = [vote(bank, bank_labels, rows) for rows in padded.reshape(-1, block, queries.shape[1])]
  return np.concatenate([np.asarray(part) for part in classes])[: len(queries)]


def _vote(bank: Array, bank_labels: Array, queries: Array, *, num_classes: int, k: int, temperature: float):
  unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  sim_QM = jnp.einsum("qd,md->qm", unit(queries), unit(bank), precision="highest")
  sim_Qk, nearest_Qk = jax.lax.top_k(sim_QM, k)
  votes_QkG = jax.nn.one_hot(bank_labels[nearest_Qk], num_classes) * jnp.exp(sim_Qk / temperature)[..., None]
  return jnp.argmax(votes_QkG.sum(axis=1), axis=-1)
