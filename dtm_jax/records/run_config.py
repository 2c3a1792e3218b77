"""Write config.json, and compare each start of a run with it: config, class names and the history of starts.

    {"task": ..., "student": {...}, ...,          the resolved config
     "class_names": ["cat", "dog"],
     "starts": [{"time": ..., "step": 0, "examples": 0, "weights": {...}, "changes": {...}, ...}]}

The comparison comes before anything is written. A change that would alter the meaning of the run's state or
numbers is refused. Other changes are logged. See `changes.KINDS`.
"""

import dataclasses
import datetime
import json
import os
from collections.abc import Collection, Sequence
from typing import Any

from absl import logging
from etils import epath

from dtm_jax import processes
from dtm_jax.arrays import PyTree
from dtm_jax.data import Dataset
from dtm_jax.errors import OptionError, UserError
from dtm_jax.records import changes, fingerprints, provenance
from dtm_jax.records.changes import DATA, MEANING, WEIGHTS, Change
from dtm_jax.storage import paths, writing

FILE = "config.json"
CLASS_NAMES, STARTS = "class_names", "starts"
RESUME = ("check", "force")
"""The choices of `config.resume`: refuse changes of meaning, or go on."""


class Records:
  """The records of the run in a workdir, compared with this start.

  Every process makes one. Process 0 reads the file, and all get the same content. `auto` are the options of
  `config` that were chosen for the device. They may differ on another device.

  Attributes:
    changes: the differences from the last start, after `check` and `check_weights`.
  """

  def __init__(self, workdir: epath.Path, config: Any, dataset: Dataset, auto: Collection[str] = ()):
    self._workdir, self._path = workdir, workdir / FILE
    self._resume = config.get("resume") or RESUME[0]
    if self._resume not in RESUME:
      raise OptionError(f"--config.resume={self._resume!r} is unknown. Available: {', '.join(RESUME)}.")
    self._config, self._auto = changes.plain(config), sorted(auto)
    self._class_names = None if dataset.class_names is None else list(dataset.class_names)
    found = processes.from_first_process(lambda: {
      "saved": self._read(), "data": fingerprints.of_dataset(dataset), "has_numbers": self._has_numbers(),
      "code": provenance.checksum_of_code(),
    })  # fmt: skip
    self._saved, self._data, self._code = found["saved"], found["data"], found["code"]
    self._compared = self._saved is not None and found["has_numbers"]
    self._weights: dict[str, int | None] = {}
    self.changes: list[Change] = []

  def check(self) -> None:
    """Compare config, data and class names with the last start. `check_weights` compares the weights.

    Raises:
      UserError: a change alters the meaning of the run, and `config.resume` is "check".
    """
    if not self._compared:
      return
    last = self._last_start()
    config = {key: value for key, value in self._saved.items() if key not in (CLASS_NAMES, STARTS)}
    found = changes.compare(config, self._config, same_code=last.get("code") == self._code)
    found = [self._judge_data(change) if change.kind == DATA else change for change in found]
    found = [self._judge_auto(change) for change in found]
    if not any(change.key.startswith("data.") for change in found) and self._other_data():
      found.append(Change("data", self._saved_data(), self._data, MEANING, "other images in the same place"))
    if self._saved.get(CLASS_NAMES) not in (None, self._class_names):
      found.append(Change(CLASS_NAMES, self._saved[CLASS_NAMES], self._class_names, MEANING))
    self.changes = found
    self._refuse(found, also=WEIGHTS)

  def check_weights(self, name: str, arrays: PyTree | None) -> None:
    """Compare weights with those of the last start, and keep their checksum for the record.

    Args:
      name: "frozen" or "init_from".
      arrays: the weights on the host; None if this start does not read them. The record then stays as it is.

    Raises:
      UserError: they differ, and `config.resume` is "check".
    """
    section = self._section_of_weights(name)
    before = self._last_start().get("weights", {}).get(name)
    now = None if arrays is None else processes.from_first_process(lambda: fingerprints.of_arrays(arrays))
    self._weights[name] = before if arrays is None else now
    if not self._compared:
      return
    moved = [change for change in self.changes if _names_weights_of(change, section)]
    if moved:
      judge = lambda change: _judge_weights(change, before, now) if change in moved else change
      self.changes = [judge(change) for change in self.changes]
    elif None not in (before, now) and before != now:
      self.changes.append(Change(f"{section}.path", before, now, MEANING, "checksums of what lies there"))
    self._refuse(self.changes)

  def changed(self, key: str) -> bool:
    """Return whether this key of the config, or one below it, differs from the last start."""
    return any(change.key == key or change.key.startswith(f"{key}.") for change in self.changes)

  @property
  def forced(self) -> bool:
    """Whether the meaning of the run has changed and the user wants to go on."""
    return any(change.kind == MEANING for change in self.changes)

  def log_changes(self, *, finished: bool) -> None:
    """Log every change in one line.

    Args:
      finished: whether the run has no steps left, so that the changes have no effect on the state.
    """
    effect = " The run is finished, so this has no effect on the trained state." if finished else ""
    for change in self.changes:
      logging.warning("Changed since the last start of this run: %s.%s", change, effect)

  def write(self, step: int, examples: int) -> None:
    """Write config.json with this start at the end of the history. Process 0 writes."""
    if not processes.is_first():
      return
    start = {
      "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "step": step,
      "examples": examples,
      **provenance.describe(),
      "code": self._code,
      "weights": self._weights,
      "data": self._data,
      "auto": self._auto,
      "changes": {change.key: [change.old, change.new] for change in self.changes},
    }
    content = self._config | {CLASS_NAMES: self._class_names, STARTS: [*self._starts(), start]}
    writing.write_whole(self._path, json.dumps(content, indent=2) + "\n")

  def _read(self) -> dict[str, Any] | None:
    if not self._path.exists():
      return None
    try:
      content = json.loads(self._path.read_text())
    except ValueError as error:
      logging.warning(
        "%s is not JSON, so this start is not compared with the last one: %s", self._path, error
      )
      return None
    return content if isinstance(content, dict) else None

  def _has_numbers(self) -> bool:
    """Return whether the run has a checkpoint or a line of metrics. Otherwise there is nothing to protect."""
    metrics, checkpoints = self._workdir / "metrics.jsonl", self._workdir / "checkpoints"
    if metrics.exists() and metrics.read_text().strip():
      return True
    return checkpoints.exists() and any(child.name.isdigit() for child in checkpoints.iterdir())

  def _section_of_weights(self, name: str) -> str:
    """Return the section of the config that names these weights."""
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
    saved = self._saved_data()
    return saved is not None and not fingerprints.same_dataset(saved, self._data)

  def _judge_data(self, change: Change) -> Change:
    """Return the change of a place of images with the kind that the images there decide."""
    if self._saved_data() is None:
      kind, note = MEANING, "the images of the last start are not known"
    elif self._other_data():
      kind, note = MEANING, "other images"
    else:
      kind, note = changes.COURSE, "the same images in another place"
    return dataclasses.replace(change, kind=kind, note=note)

  def _judge_auto(self, change: Change) -> Change:
    """Return the change with a note if the option was and is chosen for the device."""
    last = self._last_start()
    if change.key not in self._auto or change.key not in last.get("auto", ()):
      return change
    return dataclasses.replace(change, note=f"auto; devices: {last.get('devices')} -> {provenance.devices()}")

  def _refuse(self, found: Sequence[Change], also: str = MEANING) -> None:
    """Raise an error if a change alters the meaning. It also names the changes of the kind `also`."""
    if self._resume == "force" or not any(change.kind == MEANING for change in found):
      return
    named = [f"  {change}" for change in found if change.kind in (MEANING, also)]
    raise UserError(
      f"The run in {self._workdir} was made with other settings, so its state and its numbers do not mean "
      "what this config says:\n" + "\n".join(named) + "\n"
      f"Start a new run with another --workdir, or go on in {self._workdir} with --config.resume=force."
    )


def class_names(workdir: str | os.PathLike) -> list[str] | None:
  """Return the class names of a run's training set, by label; None for a set without classes.

  Raises:
    FileNotFoundError: there is no config.json in `workdir`.
  """
  return json.loads((paths.resolve(workdir) / FILE).read_text()).get(CLASS_NAMES)


def _judge_weights(change: Change, before: int | None, now: int | None) -> Change:
  """Return the change of a place of weights with the kind that the checksums decide; None: not known."""
  if now is None:
    kind, note = MEANING, "the new weights are not there to be compared"
  elif before is None:
    kind, note = MEANING, "the weights of the last start are not known"
  elif before != now:
    kind, note = MEANING, f"other weights: checksum {before}, now {now}"
  else:
    kind, note = changes.COURSE, "the same weights in another place"
  return dataclasses.replace(change, kind=kind, note=note)


def _names_weights_of(change: Change, section: str) -> bool:
  return change.kind == WEIGHTS and change.key.startswith(f"{section}.")
