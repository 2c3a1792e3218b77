"""Write files and folders, local or in a bucket, so that a crash leaves the old content or the new one."""

import contextlib
import os
import pathlib
import tempfile
import uuid
from collections.abc import Iterator

from etils import epath

from dtm_jax.errors import OptionError
from dtm_jax.storage import object_stores
from dtm_jax.storage.paths import is_remote, resolve, without_scheme

COMMIT_FILE = "commit_success.txt"
"""The file that marks a checkpoint in a bucket as complete. Orbax writes it last."""


def make_writable_folder(path: str | os.PathLike, option: str) -> epath.Path:
  """Make the folder, prove that it can be written to, and return its resolved path.

  Args:
    path: local or in a bucket. The bucket has to exist.
    option: what the user typed before the path, such as "--workdir", for messages.

  Raises:
    OptionError: the folder cannot be made or written to; the message has the path and the error.
  """
  folder = resolve(path)
  try:
    if not is_remote(folder):
      folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable-{uuid.uuid4().hex}"  # several processes may ask at once
    probe.write_text("This file shows that the folder can be written.\n")
    probe.unlink()
  except Exception as error:  # each client of a bucket has its own errors
    what = "No such bucket, or it cannot be written" if is_remote(folder) else "The folder cannot be written"
    raise OptionError(f"{option}={os.fspath(path)}: {what}: {type(error).__name__}: {error}") from error
  return folder


def create_file(path: epath.Path, text: str) -> bool:
  """Write a new file and return True, or return False if it exists. Of several processes, one succeeds."""
  if not is_remote(path):
    try:
      with open(path, "x", encoding="utf-8") as file:
        file.write(text)
    except FileExistsError:
      return False
    return True
  try:
    object_stores.filesystem(path).pipe_file(os.fspath(path), text.encode(), mode="create")
  except FileExistsError:
    return False
  except Exception as error:
    if any(word in f"{type(error).__name__} {error}" for word in ("Precondition", "412")):
      return False
    raise
  return True


def write_whole(path: epath.Path, content: str | bytes) -> None:
  """Replace the content of a file in one step. A reader or a crash sees the old content or the new one.

  In a bucket this writes one object. If the write fails, the old content stays.
  """
  if is_remote(path):
    path.write_text(content) if isinstance(content, str) else path.write_bytes(content)
    return
  new = f"{os.fspath(path)}.{uuid.uuid4().hex}.new"
  try:
    with open(new, "wb") as file:
      file.write(content.encode() if isinstance(content, str) else content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(new, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(new)
    raise


def move_folder(source: epath.Path, target: epath.Path) -> None:
  """Move a folder. A bucket cannot rename, so its objects are copied and then deleted."""
  if not is_remote(source):
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    return
  filesystem = object_stores.filesystem(source)
  start = len(without_scheme(source))
  names = sorted(filesystem.find(os.fspath(source)))
  for name in names:
    filesystem.cp_file(name, without_scheme(target) + name[start:])
  # If the deletion is cut short, the rest must not look like a whole checkpoint.
  for name in sorted(names, key=lambda name: not name.endswith(COMMIT_FILE)):
    filesystem.rm_file(name)


@contextlib.contextmanager
def local_folder_for(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yield a local folder for the content of `path`. If `path` is in a bucket, the end copies it there."""
  folder = resolve(path)
  if not is_remote(folder):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    yield pathlib.Path(folder)
    return
  make_writable_folder(path, "the folder to write")  # before any work is done
  with tempfile.TemporaryDirectory(prefix="dtm_jax_") as local:
    yield pathlib.Path(local)
    for file in sorted(pathlib.Path(local).rglob("*")):
      if file.is_file():
        upload(file, folder / file.relative_to(local).as_posix())


@contextlib.contextmanager
def local_file_for(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yield a local file for the content of `path`. If `path` is in a bucket, the end copies it there."""
  target = resolve(path)
  if not is_remote(target):
    yield pathlib.Path(target)
    return
  with tempfile.TemporaryDirectory(prefix="dtm_jax_") as local:
    yield pathlib.Path(local) / target.name
    upload(pathlib.Path(local) / target.name, target)


def upload(file: pathlib.Path, target: epath.Path) -> None:
  """Copy a local file into a bucket."""
  object_stores.filesystem(target).put_file(os.fspath(file), os.fspath(target))
