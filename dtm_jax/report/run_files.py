"""Read what a run has left in its workdir: config, history of starts, numbers, and snapshots."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dtm_jax.errors import NotThereError
from dtm_jax.records import metrics_file, snapshots
from dtm_jax.records.changes import flatten
from dtm_jax.storage import paths

CONFIG, METRICS = "config.json", "metrics.jsonl"
"""Files of a workdir. Their owners, `records.run_config` and `records.metrics`, import JAX and TensorFlow."""
CLASS_NAMES, STARTS = "class_names", "starts"
"""What config.json holds beside the config."""

Points = list[tuple[int, float]]
"""(step, value) in ascending order of the steps."""


@dataclasses.dataclass(frozen=True)
class RunFiles:
  """The records of one run.

  Attributes:
    name: the last part of the workdir.
    workdir: as the user typed it.
    config: the resolved config, without what config.json holds beside it.
    class_names: the classes of the training set, or None.
    starts: the history of starts.
    lines: the lines of metrics.jsonl.
    snapshots: the recorded images and groups, or None.
    notes: sentences about files that are missing or damaged.
  """

  name: str
  workdir: str
  config: Mapping[str, Any]
  class_names: Sequence[str] | None
  starts: Sequence[Mapping[str, Any]]
  lines: Sequence[Mapping[str, Any]]
  snapshots: snapshots.Snapshots | None
  notes: Sequence[str] = ()

  @classmethod
  def read(cls, workdir: str | os.PathLike) -> "RunFiles":
    """Return the records in `workdir`, which is local or in a bucket.

    Raises:
      NotThereError: there is neither a config.json nor a metrics.jsonl.
    """
    folder = paths.resolve(workdir)
    notes: list[str] = []
    if not any((folder / name).exists() for name in (CONFIG, METRICS)):
      raise NotThereError(
        f"{os.fspath(workdir)} has no {CONFIG} and no {METRICS}: it is not the workdir of a run."
      )
    content = _read_config(folder / CONFIG, notes)
    class_names, starts = content.pop(CLASS_NAMES, None), content.pop(STARTS, None)
    lines = _read_lines(folder / METRICS, notes)
    found = snapshots.read(folder)
    notes += (
      [f"{name} cannot be read, so its step is not shown." for name in found.unreadable] if found else []
    )
    name = folder.name or os.fspath(workdir)
    return cls(name, os.fspath(workdir), content, class_names, starts or [], lines, found, notes)

  def points(self, metric: str) -> Points:
    """Return the values of a metric that are finite."""
    return [(line["step"], float(line[metric])) for line in self.lines if _is_number(line.get(metric))]

  @property
  def metrics(self) -> list[str]:
    """The names of all numbers, in the order in which they first appear."""
    return list(dict.fromkeys(name for line in self.lines for name in line if name != "step"))

  @property
  def evaluated_steps(self) -> list[int]:
    """The steps with a snapshot that belongs to this run.

    A run that was set back to an earlier checkpoint may have left snapshots of later steps. Its numbers
    lack these steps.
    """
    if self.snapshots is None:
      return []
    steps = {line["step"] for line in self.lines}
    return [step for step in sorted(self.snapshots.groups) if step in steps]

  @property
  def options(self) -> dict[str, Any]:
    """The options of the config by dotted key."""
    return dict(flatten(self.config))


def _read_config(path: epath.Path, notes: list[str]) -> dict[str, Any]:
  if not path.exists():
    notes.append(f"{path.name} is missing, so the report shows no config and no environment.")
    return {}
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    notes.append(f"{path.name} is not JSON, so the report shows no config and no environment: {error}.")
    return {}
  return content if isinstance(content, dict) else {}


def _read_lines(path: epath.Path, notes: list[str]) -> list[metrics_file.Line]:
  if not path.exists():
    notes.append(f"{path.name} is missing, so the report has no numbers.")
    return []
  lines, wrong = metrics_file.parse(path.read_bytes().decode(errors="replace"))
  notes += [
    f"Line {number} of {path.name} is not a JSON object with a step; it is left out." for number in wrong
  ]
  return lines


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
