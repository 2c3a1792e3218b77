"""Paths that users give: local ones, or places in a bucket (`gs://bucket/x`, `s3://bucket/x`)."""

import contextlib
import hashlib
import os
import pathlib
import tempfile
import urllib.parse
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from dtm_jax.errors import NotThereError, OptionError, UserError
from dtm_jax.storage import object_stores

COMMIT_FILE = "commit_success.txt"  # Orbax takes a folder in a bucket for a checkpoint only if it has this


def is_remote(path: str | os.PathLike) -> bool:
  """Whether the path is a URL such as `gs://bucket/x`, so not of this machine's file system."""
  return "://" in os.fspath(path)


def resolve(path: str | os.PathLike) -> epath.Path:
  """Return the path as an absolute one; `~` is expanded, and a URL stays as it is.

  Raises:
    OptionError: the path is a URL of an unknown kind, names no bucket, or needs a package that is missing.
  """
  text = os.fspath(path)
  scheme, _, rest = text.partition(":")
  if scheme in object_stores.PACKAGES and not rest.startswith("//"):
    raise OptionError(f"{text!r}: a bucket is written {scheme}://BUCKET/..., with two slashes.")
  if not is_remote(text):
    return epath.Path(os.path.abspath(os.path.expanduser(text)))
  if scheme not in object_stores.PACKAGES:
    kinds = ", ".join(f"{kind}://" for kind in object_stores.PACKAGES)
    raise OptionError(
      f"{text!r}: {scheme}:// is not supported. A path is local, or begins with one of {kinds}."
    )
  if not rest.strip("/"):
    raise OptionError(f"{text!r} names no bucket. Write {scheme}://BUCKET/FOLDER.")
  object_stores.connect(scheme, text)
  return epath.Path(f"{scheme}://{rest.strip('/')}")


def require_local(path: str | os.PathLike, option: str, reason: str) -> epath.Path:
  """Return the path as an absolute local one.

  Raises:
    OptionError: it is in a bucket; the message says that `option` has to be local and why.
  """
  resolved = resolve(path)
  if is_remote(resolved):
    raise OptionError(
      f"{option}={os.fspath(path)}: this path has to be local, because {reason}. Copy it to a disk of this "
      "machine, or mount the bucket as a folder (gcsfuse, mountpoint-s3)."
    )
  return resolved


# Folders that are written -------------------------------------------------------------------------------


def make_writable_folder(path: str | os.PathLike, option: str) -> epath.Path:
  """Make the folder and prove that it can be written to; returns it resolved.

  Args:
    path: local or in a bucket. The bucket has to exist.
    option: how the user named the path, such as "--workdir", for messages.

  Raises:
    OptionError: the folder cannot be made or written; gives the path and the error.
  """
  folder = resolve(path)
  try:
    if not is_remote(folder):
      folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable-{uuid.uuid4().hex}"  # several processes may ask at once
    probe.write_text("This file shows that the folder can be written.\n")
    probe.unlink()
  except Exception as error:  # each client of a bucket has errors of its own
    what = "No such bucket, or it cannot be written" if is_remote(folder) else "The folder cannot be written"
    raise OptionError(f"{option}={os.fspath(path)}: {what}: {type(error).__name__}: {error}") from error
  return folder


def create_file(path: epath.Path, text: str) -> bool:
  """Write a new file, of which only one of several processes succeeds; returns False if it is there."""
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


def write_whole(path: epath.Path, text: str) -> None:
  """Replace the content of a file in one step: a reader, or a crash, sees the old text or the new one.

  In a bucket this is the write of one object. When the write fails, the old text stays.
  """
  if is_remote(path):
    path.write_text(text)
    return
  new = f"{os.fspath(path)}.{uuid.uuid4().hex}.new"
  try:
    with open(new, "w") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(new, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(new)
    raise


def move_folder(source: epath.Path, target: epath.Path) -> None:
  """Move a folder. In a bucket, where nothing can be renamed, its objects are copied and then deleted."""
  if not is_remote(source):
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    return
  filesystem = object_stores.filesystem(source)
  start = len(_without_scheme(source))
  names = sorted(filesystem.find(os.fspath(source)))
  for name in names:
    filesystem.cp_file(name, _without_scheme(target) + name[start:])
  # Without its commit file the rest is no checkpoint, should the deletion be cut short.
  for name in sorted(names, key=lambda name: not name.endswith(COMMIT_FILE)):
    filesystem.rm_file(name)


def _without_scheme(path: epath.Path) -> str:
  return os.fspath(path).partition("://")[2]


@contextlib.contextmanager
def local_folder_for(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A local folder to write what belongs in `path`; at the end it is copied there if that is in a bucket."""
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
  """A local file to write what belongs in `path`; at the end it is copied there if that is in a bucket."""
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


# Files that are read ------------------------------------------------------------------------------------


def cache_folder(data_dir: str | os.PathLike | None = None) -> pathlib.Path:
  """`data_dir`, or else $DTM_JAX_CACHE, or else ~/.cache/dtm_jax.

  Raises:
    OptionError: it is in a bucket. What lies there is mapped into memory, which needs a local file.
  """
  folder = data_dir or os.environ.get("DTM_JAX_CACHE") or "~/.cache/dtm_jax"
  if is_remote(folder):
    name = "data_dir" if data_dir else "DTM_JAX_CACHE"
    raise OptionError(
      f"{name}={folder}: this folder has to be local, because its files are mapped into memory."
    )
  return pathlib.Path(folder).expanduser()


def local_copy(path: str | os.PathLike, names: Iterable[str] | None = None) -> pathlib.Path:
  """Return a local path with the content of `path`, for libraries that read only local files.

  A local path is returned as it is. From a bucket, the file, or the files `names` of the folder (all those
  directly in it by default), are copied into the cache once for each state of the bucket: the copy's place
  is a function of names, sizes and generations.

  Raises:
    NotThereError: there is no such file or folder.
    UserError: the bucket cannot be read; gives the path and the error.
  """
  source = resolve(path)
  if not is_remote(source):
    return pathlib.Path(source)
  filesystem = object_stores.filesystem(source)
  try:
    found = filesystem.ls(os.fspath(source), detail=True)
  except FileNotFoundError as error:
    raise NotThereError(f"There is no file or folder {source}.") from error
  except Exception as error:
    raise UserError(f"{source} cannot be read: {type(error).__name__}: {error}") from error
  files = {each["name"].rpartition("/")[2]: each for each in found if each["type"] == "file"}
  if names is not None:
    files = {name: files[name] for name in names if name in files}
  if not files:
    raise NotThereError(f"There is no file in {source}.")
  is_file = [each["name"] for each in files.values()] == [_without_scheme(source)]
  place = _place_in_cache(source.parent if is_file else source, files)
  if not place.is_dir():
    _fetch(filesystem, files, place)
  return place / source.name if is_file else place


def _place_in_cache(folder: epath.Path, files: dict[str, dict]) -> pathlib.Path:
  state = [os.fspath(folder)]
  for name, about in sorted(files.items()):
    version = [about.get(key) for key in ("generation", "ETag", "etag", "mtime", "LastModified")]
    state.append(f"{name} {about['size']} {version}")
  key = hashlib.sha256("\n".join(state).encode()).hexdigest()[:16]
  readable = urllib.parse.quote(_without_scheme(folder), safe="/")
  return cache_folder() / "buckets" / key / readable


def _fetch(filesystem: Any, files: dict[str, dict], place: pathlib.Path) -> None:
  """Fill the folder `place`, all or nothing: another process may do the same."""
  place.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=place.parent) as work:
    partial = pathlib.Path(work) / "files"
    partial.mkdir()
    for name, about in files.items():
      filesystem.get_file(about["name"], os.fspath(partial / name))
    try:
      os.replace(partial, place)
    except OSError:  # another process was first
      if not place.is_dir():
        raise
