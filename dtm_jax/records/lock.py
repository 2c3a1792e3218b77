"""The lock of a workdir: one run at a time.

`lock.json` names the run that holds the workdir, and a thread renews its heartbeat. Process 0 holds the lock;
the other processes of the run learn its decision. A lock is stale when its process is gone from this machine,
or, where this machine cannot know that, when its heartbeat stands still while we watch.
"""

import contextlib
import datetime
import errno
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging
from etils import epath

from dtm_jax.errors import UserError
from dtm_jax.records import agreement
from dtm_jax.storage import paths

FILE = "lock.json"
BEAT = 15.0
"""Seconds between heartbeats."""
WATCH = 2.5
"""How many beats a lock is watched before it counts as stale."""
SETTLE = 1.0
"""Seconds between taking over a stale lock and reading it back."""
_FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


class Lock:
  """The lock of this run. `hold` makes it; the loop asks `require` at every step."""

  def __init__(self, path: epath.Path):
    self._path = path
    self._content = {
      "host": platform.node(), "pid": os.getpid(), **_place_of_process(os.getpid()), "since": _now(),
      "token": uuid.uuid4().hex, "beat": 0,
    }  # fmt: skip
    self._lost_to: dict | None = None
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
    """Remove the lock, if it is still this run's."""
    self._stop.set()
    if self._thread.is_alive():
      self._thread.join(timeout=2 * BEAT)
    try:
      if (self._read() or {}).get("token") == self._content["token"]:
        self._path.unlink()
    except Exception as error:  # each client of a bucket has errors of its own
      logging.warning("The lock %s could not be removed: %s", self._path, error)

  def require(self) -> None:
    """Raise UserError if another run has taken the lock, because this one seemed dead to it."""
    if self._lost_to is not None:
      raise UserError(
        f"This run lost its workdir {self._path.parent} to another one ({_name(self._lost_to)}), which took "
        "it over because no heartbeat of this run arrived. This run stops."
      )

  def _create(self) -> bool:
    """Make the file with its content if there is none."""
    if paths.is_remote(self._path):
      try:
        return paths.create_file(self._path, json.dumps(self._content))
      except Exception as error:  # a store that has no exclusive creation: written and read back instead
        logging.warning("%s cannot be created exclusively: %s", self._path, error)
        return False
    new = f"{os.fspath(self._path)}.{self._content['token']}.new"
    try:
      Path(new).write_text(json.dumps(self._content))
      os.link(new, self._path)  # is exclusive on NFS too, and nobody sees half a file
    except FileExistsError:
      return False
    except OSError as error:
      if error.errno in _FULL_OR_READ_ONLY:
        raise
      return paths.create_file(self._path, json.dumps(self._content))
    finally:
      Path(new).unlink(missing_ok=True)
    return True

  def _require_stale(self, held: dict[str, Any]) -> None:
    if (alive := _is_alive(held)) is None:
      alive = self._heart_beats(held)
    if alive:
      raise UserError(
        f"Another run holds the workdir {self._path.parent}: {_name(held)}. Stop that run, or give this one "
        f"another --workdir. If that run is gone for certain, remove {self._path}."
      )
    logging.warning("Taking over the workdir %s from a run that is gone: %s.", self._path.parent, _name(held))

  def _heart_beats(self, held: dict[str, Any]) -> bool:
    """Whether the lock changes while we watch."""
    logging.warning(
      "The workdir %s is locked by another run: %s. Watching for %.0f seconds whether that run is alive.",
      self._path.parent, _name(held), WATCH * BEAT,
    )  # fmt: skip
    deadline = time.monotonic() + WATCH * BEAT
    while time.monotonic() < deadline:
      time.sleep(BEAT / 10)
      now = self._read()
      if now != held:
        return now is not None
    return False

  def _take_over(self, held: dict[str, Any] | None) -> None:
    """Write this run's lock in place of `held`, wait, and read it back: of two such writers the last wins."""
    now = self._read()
    if now is None or now == held:
      paths.write_whole(self._path, json.dumps(self._content))
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
        paths.write_whole(self._path, json.dumps(self._content))
      except Exception as error:  # a full disk or a network that is away must not end the run here
        logging.warning("The heartbeat of %s could not be written: %s", self._path, error)

  def _read(self) -> dict[str, Any] | None:
    """The lock as it is now; None if there is none, {} if it cannot be parsed."""
    try:
      content = json.loads(self._path.read_text())
    except FileNotFoundError:
      return None
    except ValueError:
      return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[Lock]:
  """Make the workdir and hold its lock; release it at the end, also after an error.

  A workdir that was made here and stayed empty is removed again.

  Raises:
    UserError: another run holds the workdir, or it cannot be written.
  """
  lock, made = Lock(workdir / FILE), []

  def acquire() -> None:
    if not workdir.exists():
      made.append(workdir)
    paths.make_writable_folder(workdir, "--workdir")
    lock.acquire()

  agreement.from_first_process(acquire)
  try:
    yield lock
  finally:
    if jax.process_index() == 0:
      lock.release()
      if made:
        with contextlib.suppress(OSError):
          os.rmdir(workdir)


def _name(held: dict[str, Any]) -> str:
  if "pid" not in held:
    return "its lock names no process"
  return f"process {held['pid']} on host {held.get('host')!r}, since {held.get('since')}"


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _is_alive(held: dict[str, Any]) -> bool | None:
  """Whether the holder's process runs here; None where this machine cannot tell.

  A pid means the same process only on one machine, in one boot and one namespace of processes, and only with
  the same start time.
  """
  here = platform.node(), *_namespace()
  if "pid" not in held or (held.get("host"), held.get("boot"), held.get("namespace")) != here:
    return None
  if not os.path.exists("/proc/self/stat"):
    return _exists(held["pid"])
  return _place_of_process(held["pid"])["started"] == held.get("started")


def _exists(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True


def _place_of_process(pid: int) -> dict[str, Any]:
  boot, namespace = _namespace()
  try:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    started = None if fields[0] in "ZX" else int(fields[19])  # in clock ticks after boot
  except OSError:
    started = None
  return {"started": started, "boot": boot, "namespace": namespace}


def _namespace() -> tuple[str | None, str | None]:
  """Identifiers of this boot of the machine and of this namespace of processes; None where there are none."""
  try:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
  except OSError:
    return None, None
