"""The records of a run: config.json with the class names and the history of its starts.

    {"task": ..., "student": {...}, ...,          the config, resolved
     "class_names": ["cat", "dog"],
     "starts": [{"time": ..., "step": 0, "examples": 0, "weights": {...}, "changes": {...}, ...}]}

A start is compared with the records before anything is written. What would change the meaning of the run's
state or numbers is refused; what changes only the course is named in the log.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from dtm_jax.arrays import PyTree
from dtm_jax.data import Dataset, Stream
from dtm_jax.errors import OptionError, UserError
from dtm_jax.records import agreement, changes
from dtm_jax.records.changes import DATA, MEANING, WEIGHTS, Change
from dtm_jax.storage import paths

FILE = "config.json"
CLASS_NAMES, STARTS = "class_names", "starts"
RESUME = ("check", "force")
SAMPLE = 8
PACKAGE = Path(__file__).parents[1]


class Records:
  """The records of the run in a workdir, and this start beside them.

  Every process makes one; process 0 reads the file and all see the same.

  Attributes:
    changes: what differs from the last start, once `check` and `check_weights` have passed.
  """

  def __init__(self, workdir: epath.Path, config: Any, dataset: Dataset):
    self._workdir, self._path = workdir, workdir / FILE
    self._resume = config.get("resume") or RESUME[0]
    if self._resume not in RESUME:
      raise OptionError(f"--config.resume={self._resume!r} is unknown. Available: {', '.join(RESUME)}.")
    self._config = changes.plain(config)
    self._class_names = None if dataset.class_names is None else list(dataset.class_names)
    found = agreement.from_first_process(lambda: {
      "saved": self._read(), "data": fingerprint_of_data(dataset), "has_numbers": self._has_numbers(),
      "code": fingerprint_of_code(),
    })  # fmt: skip
    self._saved, self._data, self._code = found["saved"], found["data"], found["code"]
    self._compared = self._saved is not None and found["has_numbers"]
    self._weights: dict[str, int | None] = {}
    self.changes: list[Change] = []

  def check(self) -> None:
    """Compare config, data and class names with those of the last start. Weights follow in `check_weights`.

    Raises:
      UserError: something differs that changes the meaning of the run, and `config.resume` is "check".
    """
    if not self._compared:
      return
    last = self._last_start()
    config = {key: value for key, value in self._saved.items() if key not in (CLASS_NAMES, STARTS)}
    found = changes.compare(config, self._config, same_code=last.get("code") == self._code)
    found = [self._judge_data(change) if change.kind == DATA else change for change in found]
    if not any(change.key.startswith("data.") for change in found) and self._other_data():
      found.append(Change("data", self._saved_data(), self._data, MEANING, "other images in the same place"))
    if self._saved.get(CLASS_NAMES) not in (None, self._class_names):
      found.append(Change(CLASS_NAMES, self._saved[CLASS_NAMES], self._class_names, MEANING))
    self.changes = found
    self._refuse(found, also=WEIGHTS)

  def check_weights(self, name: str, arrays: PyTree | None) -> None:
    """Compare weights with those of the last start, and remember them for the record.

    Args:
      name: "frozen" or "init_from".
      arrays: the weights on the host; None if they are not read in this start (those recorded still hold).

    Raises:
      UserError: they differ, and `config.resume` is "check".
    """
    section = self._section_of_weights(name)
    before = self._last_start().get("weights", {}).get(name)
    now = None if arrays is None else agreement.from_first_process(lambda: fingerprint(arrays))
    self._weights[name] = before if arrays is None else now
    if not self._compared:
      return
    moved = [change for change in self.changes if _is_of(change, section)]
    if moved:
      judge = lambda change: judge_weights(change, before, now) if change in moved else change
      self.changes = [judge(change) for change in self.changes]
    elif None not in (before, now) and before != now:
      self.changes.append(Change(f"{section}.path", before, now, MEANING, "checksums of what lies there"))
    self._refuse(self.changes)

  def changed(self, key: str) -> bool:
    """Whether this key of the config, or one below it, differs from the last start."""
    return any(change.key == key or change.key.startswith(f"{key}.") for change in self.changes)

  @property
  def forced(self) -> bool:
    """Whether the meaning of the run has changed and the user wants to go on."""
    return any(change.kind == MEANING for change in self.changes)

  def log_changes(self, *, finished: bool) -> None:
    """Name every change in one line of the log."""
    effect = " The run is finished, so this has no effect on what was learned." if finished else ""
    for change in self.changes:
      logging.warning("Changed since the last start of this run: %s.%s", change, effect)

  def write(self, step: int, examples: int) -> None:
    """Write config.json with this start at the end of the history. Process 0 writes."""
    if jax.process_index() != 0:
      return
    start = {
      "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "step": step,
      "examples": examples,
      "host": platform.node(),
      "processes": jax.process_count(),
      "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
      "versions": _versions(),
      "commit": _commit(),
      "code": self._code,
      "command": shlex.join(sys.argv),
      "weights": self._weights,
      "data": self._data,
      "changes": {change.key: [change.old, change.new] for change in self.changes},
    }
    content = self._config | {CLASS_NAMES: self._class_names, STARTS: [*self._starts(), start]}
    paths.write_whole(self._path, json.dumps(content, indent=2) + "\n")

  def _read(self) -> dict[str, Any] | None:
    if not self._path.exists():
      return None
    try:
      content = json.loads(self._path.read_text())
    except ValueError as error:
      logging.warning("%s is no JSON, so this start is not compared with the last one: %s", self._path, error)
      return None
    return content if isinstance(content, dict) else None

  def _has_numbers(self) -> bool:
    """Whether the run has a checkpoint or a line of metrics: without them there is nothing to protect."""
    metrics, checkpoints = self._workdir / "metrics.jsonl", self._workdir / "checkpoints"
    if metrics.exists() and metrics.read_text().strip():
      return True
    return checkpoints.exists() and any(child.name.isdigit() for child in checkpoints.iterdir())

  def _section_of_weights(self, name: str) -> str:
    """The section of the config that names these weights."""
    if name != "frozen":
      return name
    return next((each for each in ("teacher", "clip") if "path" in self._config.get(each, {})), "teacher")

  def _starts(self) -> list[dict[str, Any]]:
    return (self._saved or {}).get(STARTS) or []

  def _last_start(self) -> dict[str, Any]:
    return self._starts()[-1] if self._starts() else {}

  def _saved_data(self) -> dict[str, Any] | None:
    return self._last_start().get("data")

  def _other_data(self) -> bool:
    return self._saved_data() is not None and not same_data(self._saved_data(), self._data)

  def _judge_data(self, change: Change) -> Change:
    if self._saved_data() is None:
      kind, note = MEANING, "the images of the last start are not known"
    elif self._other_data():
      kind, note = MEANING, "other images"
    else:
      kind, note = changes.COURSE, "the same images in another place"
    return dataclasses.replace(change, kind=kind, note=note)

  def _refuse(self, found: Sequence[Change], also: str = MEANING) -> None:
    """Raise the error, which names the changes of kind `also` too, if one change is of meaning."""
    if self._resume == "force" or not any(change.kind == MEANING for change in found):
      return
    named = [f"  {change}" for change in found if change.kind in (MEANING, also)]
    raise UserError(
      f"The run in {self._workdir} was made with other settings, so its state and its numbers are not what "
      "this config means:\n" + "\n".join(named) + "\n"
      f"Start a new run with another --workdir, or go on in {self._workdir} all the same with "
      "--config.resume=force."
    )


def judge_weights(change: Change, before: int | None, now: int | None) -> Change:
  """The change of a place of weights, judged by the checksums of what lay and lies there; None: not known."""
  if now is None:
    kind, note = MEANING, "the new weights are not there to be compared"
  elif before is None:
    kind, note = MEANING, "the weights of the last start are not known"
  elif before != now:
    kind, note = MEANING, f"other weights: checksum {before}, now {now}"
  else:
    kind, note = changes.COURSE, "the same weights in another place"
  return dataclasses.replace(change, kind=kind, note=note)


def _is_of(change: Change, section: str) -> bool:
  return change.kind == WEIGHTS and change.key.startswith(f"{section}.")


def class_names(workdir: str | os.PathLike) -> list[str] | None:
  """The names of the classes of a run's training set, by label; None for a set without classes.

  Raises:
    FileNotFoundError: there is no config.json in `workdir`.
  """
  return json.loads((paths.resolve(workdir) / FILE).read_text()).get(CLASS_NAMES)


def fingerprint(arrays: PyTree) -> int | None:
  """One checksum (CRC-32) of the names, shapes, types and bytes of host arrays; None if there are none."""
  leaves = jax.tree_util.tree_leaves_with_path(arrays)
  if not leaves:
    return None
  crc = 0
  for path, leaf in leaves:
    leaf = np.ascontiguousarray(leaf)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    crc = zlib.crc32(f"{name} {leaf.shape} {leaf.dtype}".encode(), crc)
    crc = zlib.crc32(leaf.reshape(-1).view(np.uint8), crc)
  return crc


def fingerprint_of_data(dataset: Dataset) -> dict[str, Any]:
  """The number of examples, and checksums of a few of them; None stands for one that cannot be read.

  Examples at even distances; of a `Stream` the first ones.
  """
  if isinstance(dataset.source, Stream):
    examples = dataset.source.read(0, 1, None, 0)
    read = lambda place: next(examples)
  else:
    read = lambda place: dataset.source[place]
  count = min(SAMPLE, dataset.num_examples)
  places = [i * dataset.num_examples // count for i in range(count)]
  return {"num_examples": dataset.num_examples, "sample": [_fingerprint_of_example(read, i) for i in places]}


def same_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
  """Whether two fingerprints can be of the same images: what both could read must agree."""
  if one["num_examples"] != other["num_examples"]:
    return False
  pairs = zip(one["sample"], other["sample"], strict=False)
  return all(a == b for a, b in pairs if a is not None and b is not None)


def fingerprint_of_code() -> int:
  """A checksum of the package's source files."""
  crc = 0
  for path in sorted(PACKAGE.rglob("*.py")):
    crc = zlib.crc32(path.read_bytes(), crc)
  return crc


def _fingerprint_of_example(read, place: int) -> int | None:
  try:
    example = read(place)
    image = example["image"]
    content = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
    return zlib.crc32(f"{int(example['label'])}".encode(), zlib.crc32(content))
  except Exception:  # an image that cannot be read is the reader's affair
    return None


def _versions() -> dict[str, str | None]:
  try:
    own = importlib.metadata.version("dtm_jax")
  except importlib.metadata.PackageNotFoundError:  # used from a checkout
    own = None
  return {"dtm_jax": own, "jax": jax.__version__, "python": platform.python_version()}


def _commit() -> str | None:
  """The git commit of the code, with "-dirty" where files differ; None outside of a repository."""
  command = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty", "--abbrev=40"]
  try:
    done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return done.stdout.strip() or None
