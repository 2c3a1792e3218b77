"""Lock a workdir, so that one run at a time uses it.

`lock.json` names the run that holds the workdir, and a thread renews its heartbeat. Process 0 holds the lock,
and the other processes of the run learn its decision. A lock is stale if its process has ended on this
machine. If this machine cannot know that, the lock is stale if its heartbeat stops while we watch.
"""

import contextlib
import datetime
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath

from dtm_jax import processes
from dtm_jax.errors import UserError
from dtm_jax.records import process_identity
from dtm_jax.storage import faults, paths, writing

FILE = "lock.json"
BEAT = 15.0
"""Seconds between heartbeats."""
WATCH = 2.5
"""Number of beats for which a lock is watched before it counts as stale."""
SETTLE = 1.0
"""Seconds between taking over a stale lock and reading it back."""

Content = dict[str, Any]
"""A lock as JSON: the process that holds it, "since", "token" and "beat"."""


class Lock:
  """The lock of this run. `hold` makes it, and the training loop calls `require` at every step."""

  def __init__(self, path: epath.Path):
    self._path = path
    self._content: Content = process_identity.describe(os.getpid()) | {
      "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "token": uuid.uuid4().hex,
      "beat": 0,
    }
    self._lost_to: Content | None = None
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

  def acquire(self) -> None:
    """Take the lock.

    Raises:
      UserError: another run holds the workdir.
    """
    if not self._create():
      held = self._read()
      if held is not None:
        self._require_stale(held)
      self._take_over(held)
    self._thread.start()

  def release(self) -> None:
    """Remove the lock if it still belongs to this run."""
    self._stop.set()
    if self._thread.is_alive():
      self._thread.join(timeout=2 * BEAT)
    try:
      if (self._read() or {}).get("token") == self._content["token"]:
        self._path.unlink()
    except Exception as error:  # each client of a bucket has its own errors
      logging.warning("The lock %s could not be removed: %s", self._path, error)

  def require(self) -> None:
    """Raise UserError if another run has taken the lock because this run seemed dead."""
    if self._lost_to is not None:
      raise UserError(
        f"This run lost its workdir {self._path.parent} to another one ({_name(self._lost_to)}), which took "
        "it over because no heartbeat of this run arrived. This run stops."
      )

  def _create(self) -> bool:
    """Write the lock and return True, or return False if there is one."""
    if paths.is_remote(self._path):
      try:
        return writing.create_file(self._path, json.dumps(self._content))
      except Exception as error:  # a store without exclusive creation: `_take_over` writes and reads back
        logging.warning("%s cannot be created exclusively: %s", self._path, error)
        return False
    new = f"{os.fspath(self._path)}.{self._content['token']}.new"
    try:
      Path(new).write_text(json.dumps(self._content))
      os.link(new, self._path)  # a link is exclusive on NFS too, and nobody sees half a file
    except FileExistsError:
      return False
    except OSError as error:
      if faults.is_full_or_read_only(error):
        raise
      return writing.create_file(self._path, json.dumps(self._content))
    finally:
      Path(new).unlink(missing_ok=True)
    return True

  def _require_stale(self, held: Content) -> None:
    """Raise UserError if the run that holds the lock still runs."""
    if (alive := process_identity.is_alive(held)) is None:
      alive = self._heart_beats(held)
    if alive:
      raise UserError(
        f"Another run holds the workdir {self._path.parent}: {_name(held)}. Stop that run, or give this one "
        f"another --workdir. If you are sure that it has ended, remove {self._path}."
      )
    logging.warning(
      "Taking over the workdir %s from a run that has ended: %s.", self._path.parent, _name(held)
    )

  def _heart_beats(self, held: Content) -> bool:
    """Watch the lock and return whether it changes."""
    logging.warning(
      "The workdir %s is locked by another run: %s. Watching its heartbeat for %.0f seconds.",
      self._path.parent, _name(held), WATCH * BEAT,
    )  # fmt: skip
    deadline = time.monotonic() + WATCH * BEAT
    while time.monotonic() < deadline:
      time.sleep(BEAT / 10)
      now = self._read()
      if now != held:
        return now is not None
    return False

  def _take_over(self, held: Content | None) -> None:
    """Replace `held` by this run's lock, wait, and read it back. Of two such writers, the last one wins."""
    now = self._read()
    if now is None or now == held:
      writing.write_whole(self._path, json.dumps(self._content))
      time.sleep(SETTLE)
      now = self._read()
    if (now or {}).get("token") != self._content["token"]:
      raise UserError(f"Another run took the workdir {self._path.parent} just now: {_name(now or {})}.")

  def _beat(self) -> None:
    while not self._stop.wait(BEAT):
      try:
        held = self._read()
        if held is not None and held.get("token") != self._content["token"]:
          self._lost_to = held
          logging.error("The lock %s now belongs to another run: %s.", self._path, _name(held))
          return
        self._content["beat"] += 1
        writing.write_whole(self._path, json.dumps(self._content))
      except Exception as error:  # neither a full disk nor a broken network must end the run here
        logging.warning("The heartbeat of %s could not be written: %s", self._path, error)

  def _read(self) -> Content | None:
    """Return the lock as it is now, None if there is none, or {} if it cannot be parsed."""
    try:
      content = json.loads(self._path.read_text())
    except FileNotFoundError:
      return None
    except ValueError:
      return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[Lock]:
  """Make the workdir and hold its lock. The end of the `with` block releases it, also after an error.

  A workdir that was made here and is still empty at the end is removed.

  Raises:
    UserError: another run holds the workdir, or it cannot be written.
  """
  lock = Lock(workdir / FILE)
  made: list[epath.Path] = []

  def acquire() -> None:
    if not workdir.exists():
      made.append(workdir)
    writing.make_writable_folder(workdir, "--workdir")
    lock.acquire()

  processes.from_first_process(acquire)
  try:
    yield lock
  finally:
    if processes.is_first():
      lock.release()
      if made:
        with contextlib.suppress(OSError):
          os.rmdir(workdir)


def _name(held: Content) -> str:
  """Return the process that holds a lock, in words."""
  if "pid" not in held:
    return "its lock names no process"
  return f"process {held['pid']} on host {held.get('host')!r}, since {held.get('since')}"
