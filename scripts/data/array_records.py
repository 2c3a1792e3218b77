"""Write the shards of a data set as ArrayRecord files, keep their checksums, and verify them.

A complete shard gets its name, and then an entry in `checksums.json`. So a second run after an interruption
keeps what is finished. The folder may be in a bucket; then each shard is made locally first.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import logging
from etils import epath

from dtm_jax.errors import NotThereError, OptionError, UserError
from dtm_jax.progress import Progress
from dtm_jax.storage import faults, paths, writing

CHECKSUMS = "checksums.json"
BLOCK = 2**22


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file to write.

  Attributes:
    name: of the file.
    records: returns the records in their order. It may be called again.
  """

  name: str
  records: Callable[[], Iterable[bytes]]


class Checksums:
  """The file `checksums.json` of a folder: the plan, and the records, bytes and SHA-256 of each shard."""

  def __init__(self, folder: epath.Path):
    self.folder = folder
    self._lock = threading.Lock()
    path = folder / CHECKSUMS
    content = json.loads(path.read_text()) if path.exists() else {}
    self.plan: dict[str, Any] | None = content.get("plan")
    self.shards: dict[str, dict[str, Any]] = content.get("shards", {})

  def begin(self, plan: dict[str, Any]) -> None:
    """Remember what makes the shards.

    Raises:
      OptionError: the folder has shards of another plan.
    """
    if self.plan is not None and self.plan != plan:
      keys = sorted(plan.keys() | self.plan.keys())
      differing = [f"{key} {self.plan.get(key)} -> {plan.get(key)}" for key in keys]
      raise OptionError(
        f"{self.folder} has shards that were made from something else ({', '.join(differing)}). Remove the "
        "folder, or give another --out."
      )
    self.plan = plan
    self._write()

  def add(self, name: str, entry: dict[str, Any]) -> None:
    """Add a finished shard."""
    with self._lock:
      self.shards[name] = entry
      self._write()

  def problem(self, name: str) -> str | None:
    """Read a shard and return what is wrong with it, or None if it is as it was written."""
    entry, path = self.shards.get(name), self.folder / name
    if entry is None:
      return "it has no checksum"
    try:
      size, sha256 = _size_and_sha256(path)
    except FileNotFoundError:
      return "it is missing"
    except OSError as error:
      return f"it cannot be read: {error}"
    if size != entry["bytes"]:
      return f"it has {size} bytes, and had {entry['bytes']} when it was written"
    return None if sha256 == entry["sha256"] else "its bytes have changed since it was written"

  def _write(self) -> None:
    content = {"plan": self.plan, "shards": dict(sorted(self.shards.items()))}
    writing.write_whole(self.folder / CHECKSUMS, json.dumps(content, indent=1))


def write_shards(shards: Sequence[Shard], checksums: Checksums, workers: int) -> None:
  """Write the shards that are missing or damaged, several at a time.

  Raises:
    StorageError: the disk is full or cannot be written.
  """
  with ThreadPoolExecutor(workers) as pool, faults.explained(checksums.folder):
    known = [shard.name for shard in shards if shard.name in checksums.shards]
    problems = dict(zip(known, _checked(pool, checksums, known, "Checking finished shards"), strict=True))
    for name, problem in problems.items():
      if problem:
        logging.warning("Shard %s is written again: %s.", name, problem)
    left = [shard for shard in shards if problems.get(shard.name, "missing")]
    if len(left) < len(shards):
      logging.info("%d of %d shards were finished before.", len(shards) - len(left), len(shards))
    done = len(shards) - len(left)
    try:
      with Progress("Writing shards", len(shards), "shards", done=done) as progress:
        for number, _ in enumerate(pool.map(lambda shard: _write(shard, checksums), left), done + 1):
          progress(number)
    finally:
      pool.shutdown(cancel_futures=True)


def verify(folder: epath.Path) -> tuple[int, int]:
  """Read all shards of a folder again and return the numbers of shards and records.

  Raises:
    NotThereError: the folder has no checksums.
    UserError: shards are missing or damaged, or `dataset_info.json` counts other records. It names them all.
  """
  checksums = Checksums(folder)
  if not checksums.shards:
    raise NotThereError(f"{folder} has no {CHECKSUMS}: no shard has been finished there.")
  names = sorted(checksums.shards)
  with ThreadPoolExecutor(16) as pool:
    found = zip(names, _checked(pool, checksums, names, "Verifying shards"), strict=True)
    problems = [f"  {name}: {problem}" for name, problem in found if problem]
  problems += _differing_counts(checksums)
  if problems:
    raise UserError(
      f"{len(problems)} problems in {folder}. The same command without --verify writes these shards again:\n"
      + "\n".join(problems)
    )
  return len(names), sum(entry["records"] for entry in checksums.shards.values())


def write_shard(target: pathlib.Path, records: Iterable[bytes]) -> int:
  """Write one local file under its name when it is complete. Return the number of records."""
  from array_record.python.array_record_module import ArrayRecordWriter

  partial = target.with_name(target.name + ".partial")
  partial.unlink(missing_ok=True)  # left by a process that was killed
  writer, count = ArrayRecordWriter(str(partial), "group_size:1"), 0
  for record in records:
    writer.write(record)
    count += 1
  writer.close()
  if _count(partial) != count:
    raise UserError(f"{partial} has {_count(partial)} records of {count}: is the disk full?")
  os.replace(partial, target)
  return count


def read_shard(path: pathlib.Path) -> Iterator[bytes]:
  """Yield the records of a local file."""
  from array_record.python.array_record_module import ArrayRecordReader

  reader = ArrayRecordReader(str(path))
  for index in range(reader.num_records()):
    yield reader.read([index])[0]


def _write(shard: Shard, checksums: Checksums) -> None:
  """Write one shard and add its checksum."""
  target = checksums.folder / shard.name
  with tempfile.TemporaryDirectory(prefix="dtm_jax_") as temporary:
    remote = paths.is_remote(target)
    local = pathlib.Path(temporary) / shard.name if remote else pathlib.Path(target)
    records = write_shard(local, shard.records())
    size, sha256 = _size_and_sha256(local)
    if remote:
      writing.upload(local, target)
  checksums.add(shard.name, {"records": records, "bytes": size, "sha256": sha256})


def _checked(
  pool: ThreadPoolExecutor, checksums: Checksums, names: Sequence[str], what: str
) -> Iterator[str | None]:
  with Progress(what, len(names), "shards") as progress:
    for number, problem in enumerate(pool.map(checksums.problem, names), 1):
      progress(number)
      yield problem


def _differing_counts(checksums: Checksums) -> Iterator[str]:
  """Compare the numbers of records with those that TFDS reads."""
  path = checksums.folder / "dataset_info.json"
  if not path.exists():
    yield f"  {path.name} is missing: the preparation has not finished"
    return
  info = json.loads(path.read_text())
  for split in info["splits"]:
    names = sorted(name for name in checksums.shards if f"-{split['name']}.array_record-" in name)
    counted = [checksums.shards[name]["records"] for name in names]
    if counted != [int(length) for length in split["shardLengths"]]:
      yield f"  {path.name} counts other records in the split {split['name']!r} than the shards have"


def _count(path: pathlib.Path) -> int:
  from array_record.python.array_record_module import ArrayRecordReader

  return ArrayRecordReader(str(path)).num_records()


def _size_and_sha256(path: epath.Path | pathlib.Path) -> tuple[int, str]:
  digest, size = hashlib.sha256(), 0
  with path.open("rb") as file:
    while block := file.read(BLOCK):
      digest.update(block)
      size += len(block)
  return size, digest.hexdigest()
