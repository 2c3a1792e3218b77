"""Small messages between the processes of a run, with a time limit.

Collectives of devices have no time limit: when one process fails before it reaches one, the others wait for
ever. These messages go through the key-value store of `jax.distributed` instead.
"""

import itertools
import json
from typing import Any

import jax
from jax._src import distributed  # the client of the key-value store has no public name

from dtm_jax.errors import UserError

TIME_LIMITS = {
  "heartbeat_timeout_seconds": 40,  # a process without a sign of life for so long is dead; the others stop
  "shutdown_timeout_seconds": 15,  # a process that leaves stops those that have not left so much later
}
"""Arguments of `jax.distributed.initialize` with which one process's end ends all within a minute."""

_messages = itertools.count()


def gather(value: Any, *, timeout_seconds: float = 1800) -> list[Any]:
  """Return the values of all processes, in the order of their indices. Every process must call it.

  Args:
    value: anything that JSON can hold.
    timeout_seconds: how long to wait for the slowest process. JAX notices a process that died earlier.

  Raises:
    UserError: a process did not answer in time.
  """
  value = json.loads(json.dumps(value))
  if jax.process_count() == 1:
    return [value]
  client, folder = distributed.global_state.client, f"dtm_jax/gather/{next(_messages)}"
  client.key_value_set(f"{folder}/{jax.process_index()}", json.dumps(value))
  try:
    client.wait_at_barrier(folder, int(timeout_seconds * 1000))
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"Not all processes answered within {timeout_seconds:.0f} s: {error}") from error
  values = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get(folder)}
  return [values[index] for index in range(jax.process_count())]


def is_first() -> bool:
  """Return whether this process writes for all."""
  return jax.process_index() == 0
