"""The search of kNN: every device finds candidates among its rows of the bank, and then they are merged.

The result does not depend on the number of devices: the example with the smaller index is the nearer one of
two with equal similarities, and votes are added in the order of the neighbours. The products of features have
one shape, [queries of a batch, D] x [D, rows of a block], on any number of devices.

The features themselves may differ in their last bits. Each of many devices sees fewer images at once, and
XLA promises equal rounding only for equal shapes. Neighbours with nearly equal similarities may then change
places.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dtm_jax.arrays import Array, Bool, Float, Int
from dtm_jax.evaluators._knn_bank import NOBODY, Bank
from dtm_jax.evaluators._unit_norm import unit_norm
from dtm_jax.training import mesh as meshes


class Neighbours(NamedTuple):
  """The nearest k examples of each of Q queries, the nearest first.

  Attributes:
    sim: cosine similarity to the query, -inf for no example.
    index: place in the data set.
    label: class.
  """

  sim: Float[Array, "Q k"]
  index: Int[Array, "Q k"]  # type: ignore[assignment]  # hides tuple.index
  label: Int[Array, "Q k"]


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
  """Return the class of each query for each k: argmax_g Σ_{i in its k nearest, y_i = g} exp(sim_i / T).

  The smallest class wins if votes are equal. A query with NaN among its features gets class -1. The result is
  replicated over the devices.

  Args:
    bank: the labelled features.
    query_QD: the features of Q queries.
    mesh: the devices that share the bank.
    num_classes: G.
    ks: the numbers of neighbours that vote, ascending.
    temperature: T.
  """
  found = nearest(bank, query_QD, mesh=mesh, k=ks[-1])
  class_KQ = _vote(found.sim, found.label, num_classes, ks, temperature)
  return jax.lax.with_sharding_constraint(class_KQ, meshes.replicated(mesh))


def nearest(bank: Bank, query_QD: Float[Array, "Q D"], *, mesh: Mesh, k: int) -> Neighbours:
  """Return the k nearest examples of each query. The smaller index comes first if similarities are equal.

  Call it under `jax.jit`.
  """
  everywhere = meshes.replicated(mesh)
  search = jax.shard_map(
    functools.partial(_nearest_on_device, k=k),
    mesh=mesh,
    in_specs=(meshes.batch_sharding(mesh, axis=2).spec, everywhere.spec),
    out_specs=meshes.batch_sharding(mesh, axis=1).spec,
    check_vma=False,  # the scan starts from constants
  )
  candidates = search(bank, query_QD.astype(jnp.float32))
  sim, *others = jax.lax.with_sharding_constraint(candidates, everywhere)
  distance, *others = jax.lax.sort((-sim, *others), dimension=1, num_keys=2)
  return Neighbours(*(x[:, :k] for x in (-distance, *others)))


def _nearest_on_device(bank: Bank, query_QD: Float[Array, "Q D"], *, k: int) -> Neighbours:
  """Return the k nearest of this device's rows. At most [Q, rows of a block] similarities exist at once."""
  query_QD, (num_queries, width) = unit_norm(query_QD), query_QD.shape
  feature_JRD = bank.feature.reshape(len(bank.feature), -1, width)
  label_JR, index_JR = (x.reshape(feature_JRD.shape[:2]) for x in (bank.label, bank.index))

  def merge_block(best: Neighbours, block: tuple[Array, Array, Array]) -> tuple[Neighbours, None]:
    feature_RD, label_R, index_R = block
    sim_QR = jnp.einsum("qd,rd->qr", query_QD, unit_norm(feature_RD), precision="highest")
    nobody_QR = (index_R == NOBODY)[None] | jnp.isnan(sim_QR)
    # top_k takes the first of equals. Rows are in the order of their index.
    sim_Qk, place_Qk = jax.lax.top_k(jnp.where(nobody_QR, -jnp.inf, sim_QR), min(k, len(index_R)))
    both = jax.tree.map(
      lambda *x: jnp.concatenate(x, axis=1), best, Neighbours(sim_Qk, index_R[place_Qk], label_R[place_Qk])
    )
    sim_Qk, place_Qk = jax.lax.top_k(both.sim, k)
    index_Qk, label_Qk = (jnp.take_along_axis(x, place_Qk, axis=1) for x in both[1:])
    return Neighbours(sim_Qk, index_Qk, label_Qk), None

  shape = (num_queries, k)
  none_yet = Neighbours(jnp.full(shape, -jnp.inf), jnp.full(shape, NOBODY), jnp.zeros(shape, jnp.int32))
  return jax.lax.scan(merge_block, none_yet, (feature_JRD, label_JR, index_JR))[0]


def _vote(
  sim_Qk: Float[Array, "Q k"],
  label_Qk: Int[Array, "Q k"],
  num_classes: int,
  ks: tuple[int, ...],
  temperature: float,
) -> Int[Array, "K Q"]:
  """Return the winners. Votes are relative to that of the nearest, so no temperature makes them infinite."""
  query_Q = jnp.arange(len(sim_Qk))
  weight_Qk = jnp.exp((sim_Qk - sim_Qk[:, :1]) / temperature)

  def add(votes_QG: Array, neighbour: tuple[Array, Array]) -> tuple[Array, None]:
    label_Q, weight_Q = neighbour
    return votes_QG.at[query_Q, label_Q].add(weight_Q, unique_indices=True), None

  votes_QG, classes, first = jnp.zeros((len(query_Q), num_classes)), [], 0
  for k in ks:  # one neighbour after another, so that the sum has a fixed order
    votes_QG, _ = jax.lax.scan(add, votes_QG, (label_Qk.T[first:k], weight_Qk.T[first:k]))
    classes.append(jnp.where(jnp.isfinite(sim_Qk[:, 0]), jnp.argmax(votes_QG, axis=1), -1))
    first = k
  return jnp.stack(classes)


@jax.jit
def num_right(
  class_KQ: Int[Array, "K Q"], label_Q: Int[Array, " Q"], valid_Q: Bool[Array, " Q"]
) -> Int[Array, " K"]:
  """Return how many valid queries got their own class, for each k, on every process."""
  return jnp.sum((class_KQ == label_Q[None]) & valid_Q[None], axis=1, dtype=jnp.int32)
