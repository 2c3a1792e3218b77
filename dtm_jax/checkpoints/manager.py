"""Save, verify and restore the checkpoints of one run.

Orbax restores a flipped bit silently. Each checkpoint therefore stores a checksum of every array and a table
of all its files, and a restore verifies both. A step that is proven corrupt is moved aside, and the restore
tries the previous step. An error that does not prove corruption is retried. If the error persists, the run
stops and leaves the checkpoint where it is.
"""

import datetime
import signal
import threading
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging

from dtm_jax import processes
from dtm_jax.arrays import PyTree
from dtm_jax.checkpoints import contents, retries
from dtm_jax.checkpoints.saving import Saver
from dtm_jax.errors import UserError
from dtm_jax.storage import faults, paths, writing


class Checkpoints:
  """Manages the checkpoints of one run, in `folder`/<step>.

  The training loop decides when to save. The newest `keep` checkpoints stay, and so do those at multiples of
  `keep_every_steps`.

  Preemption: under `jax.distributed`, JAX's own service watches for SIGTERM and all processes agree on a
  step. A lone process has no such service, so this class handles SIGTERM until `close`. A second SIGTERM
  kills the process as usual.

  Args:
    folder: a local path or a place in a bucket.
    keep: how many of the newest checkpoints stay.
    keep_every_steps: also keep the checkpoints at multiples of this.
    retry_delays: seconds between the tries of an operation that fails. Default: `retries.RETRY_DELAYS`.

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
    self._delays = retries.RETRY_DELAYS if retry_delays is None else retry_delays
    self._saver = Saver(self._folder, keep=keep, keep_every_steps=keep_every_steps, delays=self._delays)
    self._terminated = threading.Event()
    self._previous_handler: Any = None
    alone = not jax.distributed.is_initialized()
    if alone and threading.current_thread() is threading.main_thread():
      self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)

  @property
  def all_steps(self) -> list[int]:
    """Return the saved steps and the step that is being saved, in ascending order."""
    return self._saver.all_steps

  def reached_preemption(self, step: int) -> bool:
    """Return whether to save and exit now, the same on all processes. All must call this at every step."""
    return self._terminated.is_set() or self._saver.orbax.reached_preemption(step)

  def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> bool:
    """Save in the background. If `step` is saved already, leave it as it is and return False.

    The arrays are copied to the host before this returns, so the caller may donate them. If the previous save
    failed, this save counts as its second try.

    Args:
      step: the name of the checkpoint.
      state: a tree of arrays.
      meta: a small dict that JSON can hold.

    Raises:
      UserError: the disk is full, the folder is not writable, or two saves in a row failed.
    """
    return self._saver.save(step, state, meta)

  def restore(self, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any], int] | None:
    """Return (state, meta, step) of the newest sound checkpoint, or None if the run never had any.

    A step with wrong bytes is moved to `corrupt/`, and the previous step is tried. All processes make the
    same decision.

    Args:
      abstract_state: `jax.ShapeDtypeStruct`s with the shardings to restore to. The mesh may differ from the
        one of the save.

    Raises:
      UserError: a checkpoint cannot be read, and nothing proves that it is corrupt. It stays where it is. The
        same error says that a folder's name is not its step, or that all checkpoints are corrupt.
      OptionError: a checkpoint is sound, but its arrays are not those of `abstract_state`. It stays where it
        is.
    """
    _check_shardings(abstract_state)
    steps, moved = self._saver.retry(f"Listing {self._folder}", self._list_steps)
    steps, moved = processes.gather((steps, moved))[0]  # network file systems may show others another list
    for step in sorted(steps, reverse=True):
      checkpoint = self._folder / str(step)
      stages = contents.stages_of_reading(checkpoint, abstract_state)
      restored, proof = retries.read_or_prove(checkpoint, stages, self._delays)
      if proof is None:
        return *restored, step
      moved.append(self._move_aside(step, proof))
    if moved:
      raise UserError(
        f"No checkpoint of {self._folder} can be restored. All were moved to {', '.join(moved)}. "
        "The run does not start over by itself. To start over at step 0, give another --workdir or remove "
        f"the folder {self._folder}."
      )
    return None

  def wait(self) -> None:
    """Wait until the current save is on disk. A failed save is tried once more if its state still exists.

    Raises:
      UserError: the save failed.
    """
    self._saver.wait()

  def close(self) -> None:
    """Wait for the current save, and restore the handler of SIGTERM. Raises the errors of `wait`."""
    try:
      self._saver.close()
    finally:
      if self._previous_handler is not None:
        signal.signal(signal.SIGTERM, self._previous_handler)
        self._previous_handler = None

  def _list_steps(self) -> tuple[list[int], list[str]]:
    """Return the steps, and the folders of those that were moved aside."""
    self._saver.orbax.reload()  # another process may have written since
    aside = self._folder / "corrupt"
    moved = list(aside.iterdir()) if aside.exists() else []
    return self.all_steps, sorted(str(path) for path in moved if path.name != writing.COMMIT_FILE)

  def _move_aside(self, step: int, proof: str) -> str:
    """Move a corrupt checkpoint to `corrupt/` and return its new place."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
    source, target = self._folder / str(step), self._folder / "corrupt" / f"{step}-{stamp}"
    logging.error("Checkpoint %s is corrupt and moves to %s: %s", source, target, proof)

    def move() -> None:
      if processes.is_first() and source.exists():
        with faults.explained(target):
          if paths.is_remote(target):  # in a bucket, Orbax deletes folders without this file
            (target.parent / writing.COMMIT_FILE).write_text("This folder keeps corrupt checkpoints.\n")
          writing.move_folder(source, target)

    self._saver.retry(f"Moving {source} to {target}", move)
    self._saver.retry(f"Listing {self._folder}", self._saver.orbax.reload)
    return str(target)

  def _on_sigterm(self, signum: int, frame: Any) -> None:
    logging.warning("SIGTERM: the run saves and exits at the end of this step. A second SIGTERM kills it.")
    self._terminated.set()
    signal.signal(signum, self._previous_handler)


def _check_shardings(abstract_state: PyTree) -> None:
  """Raise if a sharding does not fit its array. Later, the error would look like a corrupt file."""
  for leaf in jax.tree.leaves(abstract_state):
    if leaf.sharding is not None:
      leaf.sharding.shard_shape(leaf.shape)
