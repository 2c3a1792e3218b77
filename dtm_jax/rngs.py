"""Keys as a pure function of (seed, stream, step, example).

Nothing random is stored in a checkpoint: a run that resumes at step t draws what the uninterrupted
run drew. A stream is a name; adding one never shifts another.
"""

import zlib

import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Int, Key, RandomKey


def stream(key: RandomKey, name: str, step: int | Int[Array, ""] | None = None) -> RandomKey:
  """The key of the stream `name` below `key`, at `step`; without a step, the stream's own.

  A run's key is `jax.random.key(seed)`. The train step is given it as an argument, so that one compiled
  program serves every seed.
  """
  key = jax.random.fold_in(key, zlib.crc32(name.encode()))
  return key if step is None else jax.random.fold_in(key, step)


def per_example(key: RandomKey, batch_size: int) -> Key[Array, "B"]:
  """One key for each place in the global batch, the same however the batch is sharded."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))
