"""Keys as a pure function of (seed, stream, step, example).

Nothing random is stored in a checkpoint: a run that resumes at step t draws what the uninterrupted
run drew. A stream is a name; adding one never shifts another.
"""

import zlib

import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Int, Key, RandomKey


def stream(seed: int, name: str, step: int | Int[Array, ""] | None = None) -> RandomKey:
  """The key of the stream `name` at `step`; without a step, the key of the whole run."""
  key = substream(jax.random.key(seed), name)
  return key if step is None else jax.random.fold_in(key, step)


def substream(key: RandomKey, name: str) -> RandomKey:
  """The key of the stream `name` below `key`."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def per_example(key: RandomKey, batch_size: int) -> Key[Array, "B"]:
  """One key for each place in the global batch, the same however the batch is sharded."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))
