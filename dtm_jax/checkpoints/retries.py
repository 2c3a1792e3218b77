"""Repeat a read until it succeeds, the bytes are proven wrong, or the tries run out.

All processes reach the same decision, because they exchange their results after each stage of a try. So if
one process fails, the others do not wait for it forever in a collective computation.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from dtm_jax import processes
from dtm_jax.checkpoints import evidence
from dtm_jax.errors import UserError

RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between two tries."""


class CorruptCheckpointError(UserError):
  """Raised if the bytes that were read are not the bytes that were written."""


class Failure(NamedTuple):
  """Describes the failure of the first process that failed.

  Attributes:
    kind: "refused" if a user must act, "doubt" if the bytes seem wrong, "failed" for everything else.
    text: the message, with the number of the process if there are several.
    error: what this process raised; None if it succeeded.
  """

  kind: str
  text: str
  error: Exception | None


def attempt(action: Callable[[], Any], *, alone: bool = False) -> tuple[Any, Failure | None]:
  """Run `action` and return its result, and the failure if it failed on any process.

  Args:
    action: the function to run. If it waits for other processes, nothing in it may fail before that point.
      Otherwise the other processes would wait forever.
    alone: whether only this process takes part. Otherwise every process must call this together.

  Raises:
    UserError: a process raised a UserError other than `CorruptCheckpointError`. Then all processes raise.
  """
  result: Any = None
  error: Exception | None = None
  try:
    result = action()
  except Exception as caught:  # libraries fail in many ways, and all are treated alike
    error = caught
  answer = _describe(error)
  answers = [answer] if alone else processes.gather(answer)
  for worst in ("refused", "doubt", "failed"):
    for index, (kind, text) in enumerate(answers):
      if kind != worst:
        continue
      if worst == "refused":
        raise error if isinstance(error, UserError) and str(error) == text else UserError(text)
      return None, Failure(worst, text if len(answers) == 1 else f"process {index}: {text}", error)
  return result, None


def _describe(error: Exception | None) -> tuple[str, str]:
  """Return the kind of an outcome, "done" or a kind of `Failure`, and its text."""
  if error is None:
    return "done", ""
  if isinstance(error, CorruptCheckpointError):
    return "doubt", str(error)
  if isinstance(error, UserError):
    return "refused", str(error)
  return "failed", f"{type(error).__name__}: {error}"


def retry(what: str, action: Callable[[], Any], delays: Sequence[float], *, way_out: str) -> Any:
  """Call `action` until it succeeds, with one more try after each delay, and return its result.

  All processes must call this together.

  Args:
    what: the name of the action, which starts a sentence of the messages.
    way_out: what the user can do. This is the last sentence of the error.

  Raises:
    UserError: all tries failed, or a process refused.
  """
  for number, delay in enumerate((*delays, None), 1):
    result, failure = attempt(action)
    if failure is None:
      return result
    _log_try(what, number, failure, delay)
    if delay is None:
      raise UserError(f"{what} failed {number} times, last with {failure.text}. {way_out}") from failure.error
    time.sleep(delay)
  raise AssertionError


def read_or_prove(
  checkpoint: epath.Path,
  stages: Sequence[Callable[[Any], Any]],
  delays: Sequence[float],
  *,
  alone: bool = False,
) -> tuple[Any, str | None]:
  """Read a checkpoint. Return (result, None), or (None, proof) if the checkpoint is proven corrupt.

  Args:
    checkpoint: the folder of one step.
    stages: functions that run in order. Each one gets the result of the one before. A
      `CorruptCheckpointError` counts as a proof if two tries in a row raise it.
    delays: seconds between the tries.
    alone: whether only this process reads. Otherwise every process must call this together.

  Raises:
    UserError: the checkpoint cannot be read, and nothing proves that it is corrupt; or a stage raised a
      UserError other than `CorruptCheckpointError`.
  """
  doubts = 0
  for number, delay in enumerate((*delays, None), 1):
    result, failure = _run_stages(checkpoint, stages, alone)
    if failure is None:
      return result, None
    doubts = doubts + 1 if failure.kind == "doubt" else 0
    proof = _find_proof(checkpoint, failure.error, alone)
    if failure.kind == "doubt" and (proof or doubts == 2):
      return None, failure.text + (f"; {proof}" if proof else "")
    if proof:
      return None, proof
    _log_try(f"Reading checkpoint {checkpoint}", number, failure, delay)
    if delay is None:
      raise UserError(
        f"Checkpoint {checkpoint} could not be read in {number} tries, last with {failure.text}. Nothing "
        "proves that it is corrupt, so it stays untouched. Fix the cause and start the same command again. "
        "To continue from an older checkpoint instead, move this folder away."
      ) from failure.error
    time.sleep(0 if failure.kind == "doubt" else delay)
  raise AssertionError


def _run_stages(
  checkpoint: epath.Path, stages: Sequence[Callable[[Any], Any]], alone: bool
) -> tuple[Any, Failure | None]:
  """Return the result of the last stage, or the failure of the first stage that fails."""
  result: Any = None
  for stage in stages:
    result, failure = attempt(_stage(stage, result, checkpoint), alone=alone)
    if failure:
      return None, failure
  return result, None


def _stage(stage: Callable[[Any], Any], previous: Any, checkpoint: epath.Path) -> Callable[[], Any]:
  """Return the action of a stage. It raises CorruptCheckpointError if a library reports wrong bytes."""

  def action() -> Any:
    try:
      return stage(previous)
    except UserError:
      raise
    except Exception as error:
      # Without a table of files, the library's report is the only evidence.
      if evidence.says_data_loss(error) and not evidence.has_table(checkpoint):
        raise CorruptCheckpointError(f"{type(error).__name__}: {error}") from error
      raise

  return action


def _find_proof(checkpoint: epath.Path, error: Exception | None, alone: bool) -> str | None:
  """Return the proof that process 0 finds in the files; with `alone`, this process looks for it."""
  proof = None
  if alone or processes.is_first():
    try:
      proof = evidence.find_damage(checkpoint, error)
    except Exception as unreadable:  # then nothing is proven
      logging.warning("The files of %s cannot be compared now: %s", checkpoint, unreadable)
  return proof if alone else processes.gather(proof)[0]


def _log_try(what: str, number: int, failure: Failure, delay: float | None) -> None:
  after = "giving up" if delay is None else f"next try in {delay:g} s"
  logging.warning("%s: try %d failed (%s), %s.", what, number, failure.text, after)
  logging.debug("The error of try %d:", number, exc_info=failure.error)
