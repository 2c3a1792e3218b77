"""Build the library that makes system calls fail, and the environment that switches it on."""

import errno
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.campaign.trial import Skipped

SOURCE = Path(__file__).with_suffix(".c")


@functools.cache
def _library() -> Path:
  if shutil.which("cc") is None:
    raise Skipped("no C compiler")
  target = Path(tempfile.mkdtemp(prefix="dtm_jax_faulty_io_")) / "faulty_io.so"
  command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(target), str(SOURCE), "-ldl"]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise Skipped(f"the C compiler failed: {done.stderr[-200:]}")
  return target


def environment(
  path: str, calls: str, error: str, *, count: int = -1, after: Path | None = None
) -> dict[str, str]:
  """Return variables with which a process fails in its `calls`, "read" or "write", on files like `path`.

  Args:
    error: the name of the error number, "EIO".
    count: how many calls fail; -1 means all.
    after: a file that must exist before the first failure.
  """
  return {
    "LD_PRELOAD": str(_library()),
    "FAULT_PATH": path,
    "FAULT_CALLS": calls,
    "FAULT_ERRNO": str(getattr(errno, error)),
    "FAULT_COUNT": str(count),
    "FAULT_AFTER": str(after or ""),
  }
