"""Save checkpoints in the background with Orbax, and try a failed save once more."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dtm_jax import processes
from dtm_jax.arrays import PyTree
from dtm_jax.checkpoints import contents, evidence, retries, s3
from dtm_jax.errors import UserError
from dtm_jax.storage import faults

_LEAST_SLICE = 2**20
"""Bytes of an array that each replica writes. Orbax compiles and writes a slice for each replica of an array;
for the many small arrays of a transformer that costs more than one replica takes for the whole array."""

# Orbax's manager takes no such option for its saves, and warns if another handler is registered.
ocp.type_handlers.get_type_handler(jax.Array)._min_slice_bytes_for_replica_parallel = _LEAST_SLICE

_UNFINISHED = ".orbax-checkpoint-tmp"  # after a save, Orbax renames <step> + this suffix to <step>


class Saver:
  """Writes the checkpoints of a run. See `manager.Checkpoints` for the arguments and errors.

  Attributes:
    orbax: Orbax's manager. A failed save replaces it.
  """

  def __init__(self, folder: epath.Path, *, keep: int, keep_every_steps: int | None, delays: Sequence[float]):
    self._folder, self._delays = folder, delays
    self._preserve: list[Any] = [policies.LatestN(keep)]
    if keep_every_steps:
      self._preserve.append(policies.EveryNSteps(keep_every_steps))
    self._pending: tuple[int, PyTree, dict[str, Any]] | None = None
    self._failed_saves = 0
    self.orbax = self._open()

  @property
  def all_steps(self) -> list[int]:
    """Return the saved steps and the step that is being saved, in ascending order."""
    return sorted(self.orbax.all_steps())

  def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> bool:
    """Start a save. Return False if `step` is saved already."""
    self._finish()
    if step in self.orbax.all_steps():
      return False
    self._pending = (step, state, contents.describe_checkpoint(step, state, meta))
    try:
      return self._start()
    except Exception as error:
      self._note_failure(error)
      return self._start_again()

  def wait(self) -> None:
    """Wait for the current save. If it failed, try it once more."""
    if not self._finish():
      self._start_again()
      if not self._finish():
        raise AssertionError("a second failure raises")

  def close(self) -> None:
    """Wait for the current save, and close Orbax's manager."""
    self.wait()
    self.orbax.close()

  def retry(self, what: str, action: Callable[[], Any]) -> Any:
    """Call `action` until it succeeds, with one more try after each delay, and return its result."""
    way_out = "No checkpoint was touched. Fix the cause and start the same command again."
    return retries.retry(what, action, self._delays, way_out=way_out)

  def _open(self) -> ocp.CheckpointManager:
    self.retry(f"Making {self._folder}", self._make_folder)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(self._preserve),
      cleanup_tmp_directories=True,
      lightweight_initialize=True,
      atomicity_options=s3.atomicity_of(self._folder),
      async_options=ocp.AsyncOptions(
        post_finalization_callback=self._write_table,
        # If Orbax fails to make a folder in the background, its other threads wait for five minutes.
        create_directories_asynchronously=False,
      ),
    )
    make = lambda: ocp.CheckpointManager(self._folder, item_names=("state", "meta"), options=options)
    if jax.process_count() > 1:  # in this call the processes wait for each other
      return make()
    return self.retry(f"Opening {self._folder}", make)

  def _make_folder(self) -> None:
    if processes.is_first():
      with faults.explained(self._folder):
        self._folder.mkdir(parents=True, exist_ok=True)

  def _start(self) -> bool:
    step, state, table = self._under_way()
    return self.orbax.save(
      step,
      force=True,  # the caller decides when to save
      args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(table)),
    )

  def _write_table(self) -> None:
    """Write the table of files. Orbax calls this on process 0 just before the checkpoint is complete."""
    step = self._under_way()[0]
    unfinished = self._folder / f"{step}{_UNFINISHED}"  # object stores have no such folder
    checkpoint = unfinished if unfinished.exists() else self._folder / str(step)
    try:
      evidence.write_table(checkpoint)
    except OSError as error:
      if faults.explain(error, checkpoint):
        raise
      logging.warning("Checkpoint %d is saved without the table of its files: %s", step, error)

  def _finish(self) -> bool:
    """Wait for the current save and return whether it succeeded."""
    try:
      self.orbax.wait_until_finished()
    except Exception as error:
      self._note_failure(error)
      return False
    self._pending, self._failed_saves = None, 0
    return True

  def _note_failure(self, error: Exception) -> None:
    """Prepare for the second try, or raise if there must be no second try.

    With several processes there is none, because other processes may still be in the save that failed here.
    """
    step, self._failed_saves = self._under_way()[0], self._failed_saves + 1
    unfinished = self._folder / f"{step}{_UNFINISHED}"
    if jax.process_count() == 1:
      with contextlib.suppress(OSError):  # if this fails, the next start removes the folder
        unfinished.rmtree(missing_ok=True)  # the disk may be full, and this frees space
    if fault := faults.explain(error, unfinished):
      raise fault from error
    if jax.process_count() > 1 or self._failed_saves > 1:
      raise UserError(
        f"Checkpoint {step} could not be saved in {self._folder}: {type(error).__name__}: {error}. The "
        "earlier checkpoints are intact. Fix the cause and start the same command again."
      ) from error
    logging.error("Saving checkpoint %d failed and is tried once more at the next save: %s", step, error)
    self.orbax = self._open()

  def _start_again(self) -> bool:
    step, state, _ = self._under_way()
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(state)):
      raise UserError(f"Checkpoint {step} could not be saved in {self._folder}; the earlier ones are intact.")
    try:
      return self._start()
    except Exception as error:
      self._note_failure(error)
      raise AssertionError("a second failure raises") from error

  def _under_way(self) -> tuple[int, PyTree, dict[str, Any]]:
    """Return step, state and metadata of the current save."""
    if self._pending is None:
      raise AssertionError("no save is under way")
    return self._pending
