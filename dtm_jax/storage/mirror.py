"""Copy the files of a local folder into a bucket from time to time, for writers that know only local files.

TensorFlow's writers of events and profiles support neither `s3://` nor an endpoint other than Google's. They
write into the folder of a `Mirror`, and `push` copies what has changed. If the target is local, the folder is
the target itself and nothing is copied.
"""

import atexit
import os
import pathlib
import tempfile
import time

from absl import logging
from etils import epath

from dtm_jax.storage import writing
from dtm_jax.storage.paths import is_remote

SECONDS = 30.0
"""Shortest time between two copies."""
BYTES_PER_SECOND = 200_000
"""Large copies wait longer, because a bucket can only replace a whole object."""


class Mirror:
  """Copies a local folder into a bucket.

  Attributes:
    folder: the local folder to write in.
  """

  def __init__(self, target: epath.Path):
    self._target = target
    self._temporary = tempfile.TemporaryDirectory(prefix="dtm_jax_") if is_remote(target) else None
    self.folder = pathlib.Path(self._temporary.name if self._temporary else target)
    self._pushed: dict[pathlib.Path, tuple[int, int]] = {}
    self._next = 0.0
    if self._temporary:
      atexit.register(self.push, force=True)  # a run that ends with an error has written files, too

  @property
  def due(self) -> bool:
    """Whether `push` would look for changed files now."""
    return self._temporary is not None and time.monotonic() >= self._next

  def push(self, *, force: bool = False) -> None:
    """Copy the changed files if a copy is due; `force` copies at once.

    A failure is only logged, because these files are not part of the run's state. The next push tries again.
    """
    if not (self.due or (force and self._temporary)):
      return
    num_bytes = 0
    for file in sorted(self.folder.rglob("*")):
      if not file.is_file():
        continue
      stat = file.stat()
      state = (stat.st_size, stat.st_mtime_ns)
      if self._pushed.get(file) == state:
        continue
      target = self._target / file.relative_to(self.folder).as_posix()
      try:
        writing.upload(file, target)
      except Exception as error:  # each client of a bucket has its own errors
        logging.warning("%s could not be written and is tried again: %s", os.fspath(target), error)
        continue
      self._pushed[file] = state
      num_bytes += stat.st_size
    self._next = time.monotonic() + SECONDS + num_bytes / BYTES_PER_SECOND

  def close(self) -> None:
    """Copy the files that have changed and remove the local folder."""
    if self._temporary is not None:
      self.push(force=True)
      atexit.unregister(self.push)
      self._temporary.cleanup()
      self._temporary = None
