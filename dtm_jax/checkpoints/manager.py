"""Saving and restoring the training state: the only importer of Orbax.

Orbax restores a flipped bit silently. We store a checksum of every array and a table of all files in each
checkpoint and verify on restore. A step that is proven corrupt is moved aside, and the run goes on with the
one before. Errors that prove nothing are retried; then the run stops and leaves the checkpoint where it is.
"""

import contextlib
import datetime
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers as policies

from dtm_jax import processes
from dtm_jax.arrays import PyTree
from dtm_jax.checkpoints import (
  evidence as checkpoint_evidence,
)
from dtm_jax.checkpoints import (
  retries as checkpoint_retries,
)
from dtm_jax.checkpoints import (
  s3 as s3_checkpoints,
)
from dtm_jax.checkpoints import (
  stored as stored_checkpoints,
)
from dtm_jax.checkpoints.array_checksums import checksums
from dtm_jax.checkpoints.retries import CorruptCheckpointError
from dtm_jax.checkpoints.stored import load_params
from dtm_jax.errors import UserError
from dtm_jax.storage import faults as storage_faults
from dtm_jax.storage import paths

__all__ = ["Checkpoints", "CorruptCheckpointError", "checksums", "load_params"]

_UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's ending of a folder that becomes <step> at the end of a save


class Checkpoints:
  """The checkpoints of one run, in `folder`/<step>.

  When to save is the loop's decision. Keeps the newest `keep`, and besides them those at multiples of
  `keep_every_steps`.

  Preemption: under `jax.distributed` JAX's own service watches for SIGTERM and all processes agree on a
  step. In a lone process SIGTERM would simply kill, so a handler is installed until `close`; a second
  SIGTERM kills as ever.

  Args:
    folder: a local path or a place in a bucket.
    keep: how many of the newest checkpoints stay.
    keep_every_steps: keep also the checkpoints at multiples of this.
    retry_delays: seconds between the tries of an operation that fails; default `RETRY_DELAYS`.

  Raises:
    UserError: the folder cannot be made or read.
  """

  def __init__(
    self,
    folder: str,
    *,
    keep: int = 2,
    keep_every_steps: int | None = None,
    retry_delays: Sequence[float] | None = None,
  ):
    self._folder = paths.resolve(folder)
    self._delays = checkpoint_retries.RETRY_DELAYS if retry_delays is None else retry_delays
    self._preserve = [policies.LatestN(keep)]
    if keep_every_steps:
      self._preserve.append(policies.EveryNSteps(keep_every_steps))
    self._pending: tuple[int, PyTree, dict[str, Any]] | None = None
    self._failed_saves = 0
    self._manager = self._open()
    self._terminated = threading.Event()
    self._previous_handler = None
    alone = not jax.distributed.is_initialized()
    if alone and threading.current_thread() is threading.main_thread():
      self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)

  @property
  def all_steps(self) -> list[int]:
    """The steps that are saved or being saved, ascending."""
    return sorted(self._manager.all_steps())

  @property
  def latest_step(self) -> int | None:
    """The newest of them."""
    return self._manager.latest_step()

  def reached_preemption(self, step: int) -> bool:
    """Return whether to save now and leave. Every process must ask at every step; all get the same answer."""
    return self._terminated.is_set() or self._manager.reached_preemption(step)

  def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> bool:
    """Save in the background. Return False where `step` is there already, which is left as it is.

    The arrays are copied to the host before this returns, so the caller may donate them.

    If the save before failed, this one is its second try.

    Args:
      step: names the checkpoint.
      state: arrays.
      meta: small and JSON.

    Raises:
      UserError: there is no room or no right to write, or two saves in a row failed.
    """
    self._finish()
    if step in self._manager.all_steps():
      return False
    self._pending = (step, state, stored_checkpoints.make_contents(step, state, meta))
    try:
      return self._start_save()
    except Exception as error:
      self._note_failed_save(error)
      return self._save_again()

  def restore(self, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any], int] | None:
    """Return (state, meta, step) of the newest sound checkpoint; None if the run never had any.

    A step whose bytes are proven wrong is moved to `corrupt/` and the one before is tried. All processes take
    the same decision.

    Args:
      abstract_state: `jax.ShapeDtypeStruct`s with the shardings wanted now, on whatever mesh.

    Raises:
      UserError: a checkpoint cannot be read although nothing proves it corrupt (it stays where it is); or its
        folder's name and its step differ; or the run had checkpoints and none can be restored.
      OptionError: a checkpoint is sound but holds other arrays than `abstract_state`. It stays where it is.
    """
    _check_shardings(abstract_state)
    steps, moved = self._retry(f"Listing {self._folder}", self._list_steps)
    steps, moved = processes.gather((steps, moved))[0]  # a network file system may show others another list
    for step in sorted(steps, reverse=True):
      checkpoint = self._folder / str(step)
      stages = stored_checkpoints.stages_of_reading(checkpoint, abstract_state)
      restored, proof = checkpoint_retries.read_or_prove(checkpoint, stages, self._delays)
      if proof is None:
        return *restored, step
      moved.append(self._move_aside(step, proof))
    if moved:
      raise UserError(
        f"None of the checkpoints of {self._folder} can be restored; they were moved to {', '.join(moved)}. "
        "The run does not start over by itself. To start over at step 0, give another --workdir or remove "
        f"the folder {self._folder}."
      )
    return None

  def wait(self) -> None:
    """Wait until the save under way is on disk. A save that failed is tried once more if its state is there.

    Raises:
      UserError: the save failed.
    """
    if not self._finish():
      self._save_again()
      if not self._finish():
        raise AssertionError("a second failure raises")

  def close(self) -> None:
    """Wait, and give SIGTERM back its meaning. Raises as `wait` does."""
    try:
      self.wait()
      self._manager.close()
    finally:
      if self._previous_handler is not None:
        signal.signal(signal.SIGTERM, self._previous_handler)
        self._previous_handler = None

  def _open(self) -> ocp.CheckpointManager:
    self._retry(f"Making {self._folder}", self._make_folder)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(self._preserve),
      cleanup_tmp_directories=True,
      lightweight_initialize=True,
      atomicity_options=s3_checkpoints.atomicity_of(self._folder),
      async_options=ocp.AsyncOptions(
        post_finalization_callback=self._write_table,
        # In the background, a folder that cannot be made lets Orbax's other threads wait for five minutes.
        create_directories_asynchronously=False,
      ),
    )
    make = lambda: ocp.CheckpointManager(self._folder, item_names=("state", "meta"), options=options)
    if jax.process_count() > 1:  # the processes wait for each other in there
      return make()
    return self._retry(f"Opening {self._folder}", make)

  def _make_folder(self) -> None:
    if processes.is_first():
      with storage_faults.explained(self._folder):
        self._folder.mkdir(parents=True, exist_ok=True)

  def _retry(self, what: str, action: Callable[[], Any]) -> Any:
    way_out = "No checkpoint was touched. Start the same command again when the cause is mended."
    return checkpoint_retries.retry(what, action, self._delays, way_out=way_out)

  def _list_steps(self) -> tuple[list[int], list[str]]:
    self._manager.reload()  # another process may have written since
    aside = self._folder / "corrupt"
    moved = list(aside.iterdir()) if aside.exists() else []
    return self.all_steps, sorted(str(path) for path in moved if path.name != paths.COMMIT_FILE)

  def _move_aside(self, step: int, proof: str) -> str:
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
    source, target = self._folder / str(step), self._folder / "corrupt" / f"{step}-{stamp}"
    logging.error("Checkpoint %s is corrupt and moves to %s: %s", source, target, proof)

    def move():
      if processes.is_first() and source.exists():
        with storage_faults.explained(target):
          if paths.is_remote(target):  # in a bucket, Orbax deletes folders without this file
            (target.parent / paths.COMMIT_FILE).write_text("This folder keeps what is corrupt.\n")
          paths.move_folder(source, target)

    self._retry(f"Moving {source} to {target}", move)
    self._retry(f"Listing {self._folder}", self._manager.reload)
    return str(target)

  def _start_save(self) -> bool:
    step, state, contents = self._pending
    return self._manager.save(
      step,
      force=True,  # when to save is the caller's decision
      args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(contents)),
    )

  def _write_table(self) -> None:
    """Orbax calls this on process 0 when all files are written and before the checkpoint counts as whole."""
    step = self._pending[0]
    unfinished = self._folder / f"{step}{_UNFINISHED}"  # object stores have none
    checkpoint = unfinished if unfinished.exists() else self._folder / str(step)
    try:
      checkpoint_evidence.write_table(checkpoint)
    except OSError as error:
      if storage_faults.explain(error, checkpoint):
        raise
      logging.warning("Checkpoint %d is saved without the table of its files: %s", step, error)

  def _finish(self) -> bool:
    """Wait for the save under way and return whether it succeeded."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      self._note_failed_save(error)
      return False
    self._pending, self._failed_saves = None, 0
    return True

  def _note_failed_save(self, error: Exception) -> None:
    """Prepare for another try; raise where there should be none.

    Several processes do not try again: some may still be in the save that failed on this one.
    """
    step, self._failed_saves = self._pending[0], self._failed_saves + 1
    unfinished = self._folder / f"{step}{_UNFINISHED}"
    if jax.process_count() == 1:
      with contextlib.suppress(OSError):  # the next start removes it otherwise
        unfinished.rmtree(missing_ok=True)  # its room may be what is missing
    if fault := storage_faults.explain(error, unfinished):
      raise fault from error
    if jax.process_count() > 1 or self._failed_saves > 1:
      raise UserError(
        f"Checkpoint {step} could not be saved in {self._folder}: {type(error).__name__}: {error}. The "
        "earlier checkpoints are intact. Start the same command again when the cause is mended."
      ) from error
    logging.error("Saving checkpoint %d failed and is tried once more at the next save: %s", step, error)
    self._manager = self._open()

  def _save_again(self) -> bool:
    step, state, _ = self._pending
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(state)):
      raise UserError(f"Checkpoint {step} could not be saved in {self._folder}; the earlier ones are intact.")
    try:
      return self._start_save()
    except Exception as error:
      self._note_failed_save(error)
      raise AssertionError("a second failure raises") from error

  def _on_sigterm(self, signum: int, frame: Any) -> None:
    logging.warning("SIGTERM: saving and leaving at the end of this step; a second one kills.")
    self._terminated.set()
    signal.signal(signum, self._previous_handler)


def _check_shardings(abstract_state: PyTree) -> None:
  """An impossible sharding is the caller's mistake: found before it can be taken for a corrupt file."""
  for leaf in jax.tree.leaves(abstract_state):
    if leaf.sharding is not None:
      leaf.sharding.shard_shape(leaf.shape)
