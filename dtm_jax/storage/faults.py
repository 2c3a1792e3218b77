"""Turn faults of the disk where a run writes into one message: no space, a quota, read-only, missing rights.

Libraries report them as `OSError`, or as other errors that only quote the system's text. This module finds
both forms.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from dtm_jax.errors import UserError

_RIGHTS = (errno.EACCES, errno.EPERM)
_DEVICE = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT)
_HINTS = {
  **dict.fromkeys(_DEVICE, "Check the disk or the connection to it"),
  errno.ENOSPC: "Free some space",
  errno.EDQUOT: "Free some space or raise the quota",
  errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
  errno.EROFS: "Make it writable or name another folder",
  errno.EACCES: "Make it writable or name another folder",
  errno.EPERM: "Make it writable or name another folder",
}


class StorageError(UserError):
  """The run cannot write, for a reason that a user can fix."""


def is_full_or_read_only(error: OSError) -> bool:
  """Return whether another way to write the same file would fail too.

  EPERM does not count, because some file systems raise it for links although they allow files. Neither do
  errors of the device, which may pass.
  """
  return error.errno in _HINTS and error.errno not in (errno.EPERM, *_DEVICE)


def chain(error: BaseException) -> Iterator[BaseException]:
  """Yield the error, its causes and contexts, and the members of its groups, each once."""
  waiting: list[BaseException | None] = [error]
  seen: set[int] = set()
  while waiting:
    current = waiting.pop(0)
    if current is None or id(current) in seen:
      continue
    seen.add(id(current))
    yield current
    waiting += [current.__cause__, current.__context__, *getattr(current, "exceptions", ())]


def explain(error: BaseException, path: str | os.PathLike, *, whole_run: bool = False) -> StorageError | None:
  """Return a fault of storage as an error with one message, or None if the error is something else.

  Args:
    error: what was raised while the run wrote.
    path: the place to name if the error itself names no file.
    whole_run: whether anything in a run can have raised the error, reading included. Then a missing right
      does not count, and an error of the device counts if it names `path` or a file below it. For a single
      write, errors of the device do not count: they may pass, so the caller tries again.
  """
  for cause in chain(error):
    if isinstance(cause, StorageError):
      return cause
    number = _number(cause)
    culprit = getattr(cause, "filename", None) or path
    if number is None or (whole_run and number in _RIGHTS):
      continue
    if number not in _DEVICE or (whole_run and os.fspath(path) in str(cause)):
      return StorageError(
        f"Cannot write {os.fspath(culprit)}: {os.strerror(number)}. What was saved before is intact. "
        f"{_HINTS[number]}; the same command then goes on from the newest checkpoint."
      )
  return None


@contextlib.contextmanager
def explained(path: str | os.PathLike, *, whole_run: bool = False) -> Iterator[None]:
  """Turn faults of storage inside the `with` block, or in the decorated function, into a `StorageError`.

  Other errors pass unchanged. See `explain` for the arguments.
  """
  try:
    yield
  except Exception as error:
    if isinstance(error, UserError) or (fault := explain(error, path, whole_run=whole_run)) is None:
      raise
    raise fault from error


def _number(error: BaseException) -> int | None:
  """Return the error number of a fault of storage, also from an error that quotes its text; else None."""
  if isinstance(error, OSError) and error.errno is not None:
    return error.errno if error.errno in _HINTS else None
  for number in _HINTS:
    if re.search(rf"(?i)\b{re.escape(os.strerror(number))}\b", str(error)):
      return number
  return None
