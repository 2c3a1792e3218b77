"""Derive random keys as a pure function of (seed, stream, step, example).

A checkpoint stores nothing random, so a run that resumes at step t draws what the uninterrupted run draws. A
stream is a name, such as "mask". A new stream does not change the draws of the others.

    key = rngs.stream(jax.random.key(seed), "mask", step)
"""

import zlib

import jax
import jax.numpy as jnp

from dtm_jax.arrays import Array, Int, Key, RandomKey


def stream(key: RandomKey, name: str, step: int | Int[Array, ""] | None = None) -> RandomKey:
  """Return the key of the stream `name` at `step`, or of the whole stream if there is no step.

  The key of a run is `jax.random.key(seed)`. It is an argument of the train step, so one compiled program
  serves every seed.
  """
  key = jax.random.fold_in(key, zlib.crc32(name.encode()))
  return key if step is None else jax.random.fold_in(key, step)


def per_example(key: RandomKey, batch_size: int) -> Key[Array, " B"]:
  """Return one key for each place in the global batch. The keys do not depend on how the batch is sharded."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))
