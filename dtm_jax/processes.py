"""Exchange small messages between the processes of a run, with a time limit.

Collectives of devices have no time limit: if one process fails before it reaches a collective, the others
wait for ever. These messages use the key-value store of `jax.distributed` instead.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the client of the key-value store has no public name

from dtm_jax.errors import UserError

TIME_LIMITS = {
  "heartbeat_timeout_seconds": 40,  # a process that is silent for longer counts as dead, and the others stop
  "shutdown_timeout_seconds": 15,  # a process that leaves stops the others after this time
}
"""Arguments of `jax.distributed.initialize`. If one process ends, all end within a minute."""

_messages = itertools.count()


def is_first() -> bool:
  """Return whether this is process 0, which writes for all."""
  return jax.process_index() == 0


def gather(value: Any, *, timeout_seconds: float = 1800.0) -> list[Any]:
  """Return the values of all processes, in the order of their indices. Every process must call this.

  Args:
    value: anything that JSON can hold. A tuple becomes a list.
    timeout_seconds: how long to wait for the slowest process. If a process dies, JAX notices sooner.

  Raises:
    UserError: a process did not answer in time.
  """
  value = json.loads(json.dumps(value))
  if jax.process_count() == 1:
    return [value]
  client, folder = distributed.global_state.client, f"dtm_jax/gather/{next(_messages)}"
  if client is None:
    raise AssertionError("several processes without jax.distributed")
  client.key_value_set(f"{folder}/{jax.process_index()}", json.dumps(value))
  try:
    client.wait_at_barrier(folder, int(timeout_seconds * 1000))
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"Not all processes answered within {timeout_seconds:.0f} s: {error}") from error
  values = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get(folder)}
  return [values[index] for index in range(jax.process_count())]


def from_first_process(function: Callable[[], Any]) -> Any:
  """Run `function` on process 0 and return its result on every process. Every process must call this.

  Args:
    function: returns anything that JSON can hold. A tuple becomes a list.

  Raises:
    UserError: process 0 raised one; all processes raise it with the same message and notes.
    RuntimeError: process 0 failed in another way; process 0 itself raises the original error.
  """
  if jax.process_count() == 1:
    return json.loads(json.dumps(function()))
  failure: Exception | None = None
  outcome: dict[str, Any] = {}
  if is_first():
    try:
      outcome = {"value": function()}
    except UserError as error:
      failure, outcome = error, {"user_error": str(error), "notes": getattr(error, "__notes__", [])}
    except Exception as error:
      failure, outcome = error, {"error": f"{type(error).__name__}: {error}"}
  outcome = gather(outcome)[0]
  if failure is not None:
    raise failure
  if "user_error" in outcome:
    told = UserError(outcome["user_error"])
    for note in outcome["notes"]:
      told.add_note(note)
    raise told
  if "error" in outcome:
    raise RuntimeError(f"Process 0 failed: {outcome['error']}")
  return outcome["value"]
