"""Read a checkpoint until it is read, or proven corrupt, or given up. All processes come to the same end.

After each stage of a try the processes tell each other how it went. So a process that fails never leaves the
others in a collective computation that cannot end.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from dtm_jax import processes
from dtm_jax.checkpoints import evidence as checkpoint_evidence
from dtm_jax.errors import UserError

RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between two tries."""


class CorruptCheckpointError(UserError):
  """What was read is not what was written."""


class Failure(NamedTuple):
  """How the first process failed that did.

  kind: "refused" when a user must act, "doubt" when the bytes seem wrong, "failed" for everything else.
  """

  kind: str
  text: str
  error: Exception | None


def attempt(action: Callable[[], Any], *, alone: bool = False) -> tuple[Any, Failure | None]:
  """Run `action` and return its result, and how it failed on any process.

  Args:
    action: must not wait for other processes before something in it can fail.
    alone: whether only this process is concerned. Otherwise every process must call this together.

  Raises:
    UserError: a process refused; all raise.
  """
  result, error, kind = None, None, "done"
  try:
    result = action()
  except Exception as caught:  # libraries fail in many ways; which one it is shall not matter
    error = caught
    kind = "doubt" if isinstance(caught, CorruptCheckpointError) else "failed"
    kind = "refused" if isinstance(caught, UserError) and kind == "failed" else kind
  text = (
    ""
    if error is None
    else str(error)
    if isinstance(error, UserError)
    else f"{type(error).__name__}: {error}"
  )
  answers = [(kind, text)] if alone else processes.gather((kind, text))
  for worst in ("refused", "doubt", "failed"):
    for index, (kind, text) in enumerate(answers):
      if kind != worst:
        continue
      if worst == "refused":
        raise error if isinstance(error, UserError) and str(error) == text else UserError(text)
      return None, Failure(worst, text if len(answers) == 1 else f"process {index}: {text}", error)
  return result, None


def retry(what: str, action: Callable[[], Any], delays: Sequence[float], *, way_out: str) -> Any:
  """Return the result of `action`, tried again after each delay; every process must call this together.

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
  """Return what the stages read and None, or None and the proof that the checkpoint is corrupt.

  Args:
    checkpoint: the folder of one step.
    stages: functions that get the result of the one before. A `CorruptCheckpointError` counts as a proof when
      two tries in a row raise it.
    delays: seconds between the tries.
    alone: whether only this process reads. Otherwise every process must call this together.

  Raises:
    UserError: it could not be read, and nothing proves that it is corrupt; or a stage refused.
  """
  doubts = 0
  for number, delay in enumerate((*delays, None), 1):
    result, failure = None, None
    for stage in stages:
      result, failure = attempt(_stage(stage, result, checkpoint), alone=alone)
      if failure:
        break
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
        "proves that it is corrupt, so it stays untouched. Start the same command again when the cause is "
        "mended. To go on from an older checkpoint instead, move this folder away."
      ) from failure.error
    time.sleep(0 if failure.kind == "doubt" else delay)
  raise AssertionError


def _stage(stage: Callable[[Any], Any], previous: Any, checkpoint: epath.Path) -> Callable[[], Any]:
  def action():
    try:
      return stage(previous)
    except UserError:
      raise
    except Exception as error:
      # A checkpoint without a table of its files leaves only the library's word.
      if checkpoint_evidence.says_data_loss(error) and not checkpoint_evidence.has_table(checkpoint):
        raise CorruptCheckpointError(f"{type(error).__name__}: {error}") from error
      raise

  return action


def _find_proof(checkpoint: epath.Path, error: Exception | None, alone: bool) -> str | None:
  """Return the proof that process 0 (or this one, if `alone`) finds in the files."""
  proof = None
  if alone or processes.is_first():
    try:
      proof = checkpoint_evidence.find_damage(checkpoint, error)
    except Exception as unreadable:  # then nothing is proven
      logging.warning("The files of %s cannot be compared now: %s", checkpoint, unreadable)
  return proof if alone else processes.gather(proof)[0]


def _log_try(what: str, number: int, failure: Failure, delay: float | None) -> None:
  after = "giving up" if delay is None else f"next try in {delay:g} s"
  logging.warning("%s: try %d failed (%s), %s.", what, number, failure.text, after)
  logging.debug("The error of try %d:", number, exc_info=failure.error)
