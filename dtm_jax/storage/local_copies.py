"""Find the cache folder of this machine, and copy files of a bucket into it."""

import hashlib
import os
import pathlib
import tempfile
import urllib.parse
from collections.abc import Iterable
from typing import Any

from etils import epath

from dtm_jax.errors import NotThereError, OptionError, UserError
from dtm_jax.storage import object_stores
from dtm_jax.storage.paths import is_remote, resolve, without_scheme


def cache_folder(data_dir: str | os.PathLike | None = None) -> pathlib.Path:
  """Return `data_dir`, or else $DTM_JAX_CACHE, or else ~/.cache/dtm_jax.

  Raises:
    OptionError: it is in a bucket. Files of the cache are mapped into memory, so they have to be local.
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

  A local path is returned as it is. Files of a bucket are copied into the cache once for each state of the
  bucket: the place of the copy depends on names, sizes and generations.

  Args:
    path: a file or a folder.
    names: which files of the folder are copied; None copies all files that lie directly in it.

  Raises:
    NotThereError: there is no such file or folder.
    UserError: the bucket cannot be read; the message has the path and the error.
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
  is_file = [each["name"] for each in files.values()] == [without_scheme(source)]
  place = _place_in_cache(source.parent if is_file else source, files)
  if not place.is_dir():
    _fetch(filesystem, files, place)
  return place / source.name if is_file else place


def _place_in_cache(folder: epath.Path, files: dict[str, dict[str, Any]]) -> pathlib.Path:
  """Return the folder of the copy, which depends on the state of the files."""
  state = [os.fspath(folder)]
  for name, about in sorted(files.items()):
    version = [about.get(key) for key in ("generation", "ETag", "etag", "mtime", "LastModified")]
    state.append(f"{name} {about['size']} {version}")
  key = hashlib.sha256("\n".join(state).encode()).hexdigest()[:16]
  readable = urllib.parse.quote(without_scheme(folder), safe="/")
  return cache_folder() / "buckets" / key / readable


def _fetch(filesystem: Any, files: dict[str, dict[str, Any]], place: pathlib.Path) -> None:
  """Fill the folder `place` completely or not at all. Another process may do the same at this moment."""
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
