"""A local folder whose files are copied into a bucket: for writers that know local files alone.

TensorFlow's writers of events and profiles know no `s3://` and no endpoint but Google's. They write into the
folder of a `Mirror`, and `push` copies what has changed. Where the target is local, the folder is the target
itself and nothing is copied.
"""

import atexit
import os
import pathlib
import tempfile
import time

from absl import logging
from etils import epath

from dtm_jax.storage import paths

SECONDS = 30.0
"""Shortest time between two copies."""
BYTES_PER_SECOND = 200_000
"""Copies wait longer when they are large: an object is written anew each time, however little was added."""


class Mirror:
  """Attributes: `folder`, the local folder to write in."""

  def __init__(self, target: epath.Path):
    self._target = target
    self._temporary = tempfile.TemporaryDirectory(prefix="dtm_jax_") if paths.is_remote(target) else None
    self.folder = pathlib.Path(self._temporary.name if self._temporary else target)
    self._pushed: dict[pathlib.Path, tuple[int, int]] = {}
    self._next = 0.0
    if self._temporary:
      atexit.register(self.push, force=True)  # a run that ends with an error has written, too

  @property
  def due(self) -> bool:
    """Whether `push` would look for changed files now."""
    return self._temporary is not None and time.monotonic() >= self._next

  def push(self, *, force: bool = False) -> None:
    """Copy the files that have changed, now and then; with `force` at once.

    A failure is logged, because these files are no part of a run's state. The next push tries again.
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
        paths.upload(file, target)
      except Exception as error:  # each client of a bucket has errors of its own
        logging.warning("%s could not be written and is tried again: %s", os.fspath(target), error)
        continue
      self._pushed[file] = state
      num_bytes += stat.st_size
    self._next = time.monotonic() + SECONDS + num_bytes / BYTES_PER_SECOND

  def close(self) -> None:
    """Copy what is left and remove the local folder."""
    if self._temporary is not None:
      self.push(force=True)
      atexit.unregister(self.push)
      self._temporary.cleanup()
      self._temporary = None
