"""Faults of the place where a run writes: a full disk, a quota, a read-only file system, missing rights.

Libraries report them as `OSError`, or as other errors that only quote the system's text. This module finds
them in either form and turns them into one message.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from dtm_jax.errors import UserError

_RIGHTS = (errno.EACCES, errno.EPERM)
_WAYS_OUT = {
  errno.ENOSPC: "Free some space",
  errno.EDQUOT: "Free some space or raise the quota",
  errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
  errno.EROFS: "Make it writable or name another folder",
  errno.EACCES: "Make it writable or name another folder",
  errno.EPERM: "Make it writable or name another folder",
}


class StorageError(UserError):
  """Nothing can be written, for a reason that a user can mend."""


def chain(error: BaseException) -> Iterator[BaseException]:
  """Yield the error, its causes and contexts, and the members of its groups, each once."""
  waiting, seen = [error], set()
  while waiting:
    current = waiting.pop(0)
    if current is None or id(current) in seen:
      continue
    seen.add(id(current))
    yield current
    waiting += [current.__cause__, current.__context__, *getattr(current, "exceptions", ())]


def explain(error: BaseException, path: str | os.PathLike, *, rights: bool = True) -> StorageError | None:
  """Return the message for a fault of storage, or None if the error is something else.

  Args:
    error: what was raised while the run wrote.
    path: the place to name when the error itself names no file.
    rights: whether a missing right counts. Reading also fails for this reason, writing alone for the others.
  """
  for cause in chain(error):
    if isinstance(cause, StorageError):
      return cause
    number = _number(cause)
    if number is not None and (rights or number not in _RIGHTS):
      culprit = getattr(cause, "filename", None) or path
      return StorageError(
        f"Cannot write {os.fspath(culprit)}: {os.strerror(number)}. What was saved before is intact. "
        f"{_WAYS_OUT[number]}; the same command then goes on from the newest checkpoint."
      )
  return None


@contextlib.contextmanager
def explained(path: str | os.PathLike, *, rights: bool = True) -> Iterator[None]:
  """Turn faults of storage inside the `with` block into a `StorageError`. It can decorate a function.

  Other errors pass as they are. See `explain` for the arguments.
  """
  try:
    yield
  except Exception as error:
    if isinstance(error, UserError) or (fault := explain(error, path, rights=rights)) is None:
      raise
    raise fault from error


def _number(error: BaseException) -> int | None:
  if isinstance(error, OSError) and error.errno is not None:
    return error.errno if error.errno in _WAYS_OUT else None
  for number in _WAYS_OUT:
    if re.search(rf"(?i)\b{re.escape(os.strerror(number))}\b", str(error)):
      return number
  return None
