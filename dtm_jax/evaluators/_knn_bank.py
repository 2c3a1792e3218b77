"""The bank of kNN: labelled features that stay on the devices that computed them."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dtm_jax.arrays import Array, Bool, Float, Int
from dtm_jax.errors import OptionError
from dtm_jax.training import mesh as meshes

BLOCK = 16384
"""Most rows of a device that are searched at once, up to whole batches."""

NOBODY = np.iinfo(np.int32).max
"""Index of a row without an example."""


class Bank(NamedTuple):
  """Features of examples in J blocks of C batches of B rows. All devices share axis B.

  A block has C·B/devices rows on each device, in the order of their index. This is about BLOCK.

  Attributes:
    feature: features of width D in float32.
    label: the class of each row.
    index: the place of each row in the data set, or NOBODY for a row without an example.
  """

  feature: Float[Array, "J C B D"]
  label: Int[Array, "J C B"]
  index: Int[Array, "J C B"]  # type: ignore[assignment]  # hides tuple.index


def empty_bank(mesh: Mesh, num_examples: int, batch_size: int, width: int) -> Bank:
  """Return a bank with room for `num_examples` features of this width in batches of `batch_size`.

  The blocks are equal and as small as possible for their number. Their number does not depend on the devices.
  """
  rows = num_examples / math.ceil(num_examples / BLOCK)
  in_block = math.ceil(rows / batch_size) * mesh.size
  shape = (math.ceil(num_examples / batch_size / in_block), in_block, batch_size)

  def empty() -> Bank:
    return Bank(jnp.zeros((*shape, width)), jnp.zeros(shape, jnp.int32), jnp.full(shape, NOBODY, jnp.int32))

  return jax.jit(empty, out_shardings=meshes.batch_sharding(mesh, axis=2))()


@functools.partial(jax.jit, donate_argnums=0)
def add_batch(
  bank: Bank, place: int | Array, feature_BD: Array, label_B: Array, index_B: Array, valid_B: Array
) -> Bank:
  """Return the bank with one more batch at `place`, 0 for the first batch. The old bank is donated.

  Args:
    bank: the bank, with batches of the same size.
    place: the number of batches before this one.
    feature_BD: the features of the batch.
    label_B: their classes.
    index_B: their places in the data set.
    valid_B: False for rows without an example.
  """
  index_B = jnp.where(valid_B, index_B, NOBODY).astype(jnp.int32)
  rows = (feature_BD.astype(jnp.float32), label_B.astype(jnp.int32), index_B)
  block, batch = jnp.divmod(place, bank.index.shape[1])
  return Bank(*(old.at[block, batch].set(new) for old, new in zip(bank, rows, strict=True)))


def require_neighbours(ks: Sequence[int], num_examples: int, dataset_name: str) -> None:
  """Check that a bank has enough examples for the largest k.

  Raises:
    OptionError: it has fewer.
  """
  if num_examples < max(ks):
    raise OptionError(
      f"kNN needs at least k = {max(ks)} examples in its bank of data set {dataset_name!r}, which has "
      f"{num_examples}."
    )


@jax.jit
def count_true(condition: Bool[Array, "..."]) -> Int[Array, ""]:
  """Return how many entries are True, on every process."""
  return jnp.sum(condition, dtype=jnp.int32)
