"""Prove that a checkpoint is corrupt: its bytes differ from what was saved.

An error while reading proves nothing, because a short fault of a network or a disk also stops the reading of
a sound file. Every save therefore ends with a table of its files (name, size, crc32), and `find_damage`
compares the files with it. A difference counts only if a second reading finds it again.

Checkpoints of older versions have no such table. Their evidence is a missing file, a JSON file that does not
parse, or an error of TensorStore that reports wrong bytes.
"""

import functools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from dtm_jax.storage.faults import chain

TABLE = "files.json"
_FOLDERS = ("meta", "state")  # the other files of a checkpoint are never read
_NEEDED = ("meta/metadata", "state/_METADATA", "state/manifest.ocdbt")
_JSON = re.compile(r"meta/metadata|state/_METADATA|state/_sharding|state/array_metadatas/.*")
_DATA_LOSS = re.compile(
  r"\bDATA_LOSS\b|\bOUT_OF_RANGE\b|Error decoding|checksum verification failed|data error|corrupt"
  r"|Truncated \w+-compressed stream",  # what TensorStore finds in place of a missing file
  re.IGNORECASE,
)
_MEGABYTE = 2**20


def crc32_of_json(contents: Any) -> int:
  """Return the crc32 of the contents as sorted JSON."""
  return zlib.crc32(json.dumps(contents, sort_keys=True).encode())


def write_table(checkpoint: epath.Path) -> None:
  """Write the table of files into the checkpoint. One process does this after all have saved."""
  files = {name: _size_and_crc32(checkpoint / name) for name in _list_files(checkpoint)}
  (checkpoint / TABLE).write_text(json.dumps({"files": files, "crc32": crc32_of_json(files)}))


def find_damage(checkpoint: epath.Path, error: BaseException | None = None) -> str | None:
  """Return the proof that the checkpoint is corrupt, or None if its bytes are as they were saved.

  Args:
    checkpoint: the folder of one step.
    error: the error of reading it. It counts only if the checkpoint has no table of its files.

  Raises:
    OSError: a file cannot be read now, so nothing is proven.
  """
  files = _read_table(checkpoint)
  if files is None:
    return _damage_without_table(checkpoint, error)
  return _missing(checkpoint, files) or _first(
    _confirmed(functools.partial(_differing, checkpoint / name, saved)) for name, saved in files.items()
  )


def says_data_loss(error: BaseException) -> bool:
  """Return whether the error, or one that it wraps, is a library's report of wrong bytes."""
  return any(_DATA_LOSS.search(str(cause)) for cause in chain(error) if not isinstance(cause, OSError))


def has_table(checkpoint: epath.Path) -> bool:
  """Return whether the checkpoint has a sound table of its files."""
  return _read_table(checkpoint) is not None


def _read_table(checkpoint: epath.Path) -> dict[str, list[int]] | None:
  """Return the table, or None if there is none or the table itself is damaged."""
  if not (checkpoint / TABLE).exists():
    return None
  try:
    contents = json.loads((checkpoint / TABLE).read_bytes())
    return contents["files"] if contents["crc32"] == crc32_of_json(contents["files"]) else None
  except (ValueError, KeyError, TypeError):
    return None


def _damage_without_table(checkpoint: epath.Path, error: BaseException | None) -> str | None:
  text = " ".join(map(str, chain(error))) if error else ""
  named = re.findall(rf"/{re.escape(checkpoint.name)}/(state/[\w./]+)", text)
  proof = _missing(checkpoint, [*_NEEDED, *(name.rstrip("/.") for name in named)])
  names = [name for name in _list_files(checkpoint) if _JSON.fullmatch(name)]
  return proof or _first(
    _confirmed(functools.partial(_unparsable, checkpoint / name)) for name in names if "success" not in name
  )


def _list_files(checkpoint: epath.Path) -> list[str]:
  """Return the files of a checkpoint as "state/d/123", in order."""
  waiting, names = [checkpoint / name for name in _FOLDERS if (checkpoint / name).exists()], []
  while waiting:
    for path in waiting.pop().iterdir():
      if path.is_dir():
        waiting.append(path)
      else:
        names.append(path.relative_to(checkpoint).as_posix())
  return sorted(names)


def _missing(checkpoint: epath.Path, names: Iterable[str]) -> str | None:
  """Return which of these files or folders do not exist."""

  def find() -> str | None:
    there = set(_list_files(checkpoint))
    folders = {name[: place.start()] for name in there for place in re.finditer("/", name)}
    missing = sorted(set(names) - there - folders)
    return f"{', '.join(missing)} is missing" if missing else None

  return _confirmed(find)


def _differing(path: epath.Path, saved: list[int]) -> str | None:
  found = _size_and_crc32(path)
  if found == list(saved):
    return None
  return f"{path} has {found[0]} bytes with crc32 {found[1]}, saved were {saved[0]} bytes with {saved[1]}"


def _unparsable(path: epath.Path) -> str | None:
  try:
    json.loads(path.read_bytes())
  except ValueError as error:
    return f"{path} is not JSON: {error}"
  return None


def _size_and_crc32(path: epath.Path) -> list[int]:
  size, crc32 = 0, 0
  with path.open("rb") as file:
    while chunk := file.read(16 * _MEGABYTE):
      size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
  return [size, crc32]


def _confirmed(find: Callable[[], str | None]) -> str | None:
  """Return the result of `find` if a second call returns the same."""
  first = find()
  return first if first is not None and find() == first else None


def _first(proofs: Iterator[str | None]) -> str | None:
  return next((proof for proof in proofs if proof), None)
