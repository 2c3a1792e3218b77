"""One decision for all processes of a run: process 0 takes it, the others receive it."""

import json
from collections.abc import Callable
from typing import Any

import jax

from dtm_jax import processes
from dtm_jax.errors import UserError


def from_first_process(function: Callable[[], Any]) -> Any:
  """Run `function` on process 0 and return its result on every process. Every process must call this.

  The result is JSON (so a tuple becomes a list).

  Raises:
    UserError: process 0 raised one; all processes raise it with the same message.
    RuntimeError: process 0 failed in another way; process 0 itself raises the original error.
  """
  if jax.process_count() == 1:
    return json.loads(json.dumps(function()))
  failure, outcome = None, {}
  if jax.process_index() == 0:
    try:
      outcome = {"value": function()}
    except UserError as error:
      failure, outcome = error, {"user_error": str(error)}
    except Exception as error:
      failure, outcome = error, {"error": f"{type(error).__name__}: {error}"}
  outcome = processes.gather(outcome)[0]
  if failure is not None:
    raise failure
  if "user_error" in outcome:
    raise UserError(outcome["user_error"])
  if "error" in outcome:
    raise RuntimeError(f"Process 0 failed: {outcome['error']}")
  return outcome["value"]
