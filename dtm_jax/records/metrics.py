"""metrics.jsonl: one JSON object a line, one line a step, whatever stops and resumes the run has had.

    {"step": 100, "loss": 0.123456, "learning_rate": 1e-07, "knn/student_accuracy": 0.5}

Numbers have six significant digits. A number that is not finite is null: strict JSON has no NaN, pandas reads
null as NaN, and jq as null.
"""

import json
import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from dtm_jax.records import agreement, reporting
from dtm_jax.storage import paths

FILE = "metrics.jsonl"

Line = dict[str, Any]


class Metrics:
  """Where a run's numbers go: log lines, TensorBoard, and metrics.jsonl. Process 0 writes the files.

  Nothing is opened or changed before `go_on_from`.
  """

  def __init__(self, workdir: epath.Path):
    self._workdir, self.path = workdir, workdir / FILE
    self._file = MetricsFile(self.path)
    self._writer = None

  @property
  def writer(self):
    """CLU's writer, for log lines and TensorBoard alone."""
    if self._writer is None:
      self._writer = reporting.make_writer(self._workdir)
    return self._writer

  def evaluated(self, step: int) -> list[str]:
    """The evaluators that have numbers at `step`, the same answer on every process."""
    return agreement.from_first_process(lambda: sorted(_evaluators_of(self._file.at(step))))

  def go_on_from(self, step: int, *, forget_evaluations: bool = False) -> None:
    """Drop the lines after `step`, which the run will write again, and on request the evaluations at it."""
    if jax.process_index() == 0:
      self._file.keep_until(step, forget_evaluations=forget_evaluations)

  def write(self, step: int, scalars: Mapping[str, float], *, evaluator: str | None = None) -> None:
    """Write the numbers of a step. Those of an `evaluator` replace what it wrote of this step before."""
    if not scalars:
      return
    if jax.process_index() == 0:
      self._file.write(step, scalars, replacing=evaluator and f"{evaluator}/")
    self.writer.write_scalars(step, scalars)

  def close(self) -> None:
    """Flush and close the writers."""
    if self._writer is not None:
      self._writer.close()
      self._writer = None


class MetricsFile:
  """The lines of a run. A file system gets appended lines; a bucket, which cannot append, a new object."""

  def __init__(self, path: epath.Path):
    self._path = path
    self._last_step = math.inf  # not known before `keep_until`

  def lines(self) -> list[Line]:
    """All lines that can be read, ascending by step; of one step there is one line.

    A run before this version wrote several lines for one step: they are joined. A line that was cut in half
    by a kill is left out.
    """
    joined: dict[int, Line] = {}
    for number, text in enumerate(self._text().splitlines(), start=1):
      if not text.strip():
        continue
      try:
        line = json.loads(text)
        step = int(line["step"])
      except (ValueError, TypeError, KeyError):
        logging.warning("Line %d of %s is no JSON object with a step and is left out.", number, self._path)
        continue
      joined[step] = joined.get(step, {}) | line
    return [joined[step] for step in sorted(joined)]

  def at(self, step: int) -> Line:
    """The line of a step; {} if there is none."""
    return next((line for line in self.lines() if line["step"] == step), {})

  def keep_until(self, step: int, *, forget_evaluations: bool = False) -> None:
    """Drop the lines after `step`, and on request its evaluations. Mend what a kill left behind."""
    kept = [line for line in self.lines() if line["step"] <= step]
    if forget_evaluations and kept and kept[-1]["step"] == step:
      kept[-1] = {name: value for name, value in kept[-1].items() if "/" not in name}
    text = _join(kept)
    if text != self._text():
      paths.write_whole(self._path, text)
    self._last_step = kept[-1]["step"] if kept else -1

  def write(self, step: int, scalars: Mapping[str, Any], *, replacing: str | None = None) -> None:
    """Add numbers to the line of a step. The line is complete on disk when this returns.

    Args:
      replacing: a prefix such as "knn/". Earlier numbers of the step that start with it are removed.
    """
    if not scalars:
      return
    added = {name: rounded(value) for name, value in scalars.items()}
    if step > self._last_step and not paths.is_remote(self._path):
      with self._path.open("a") as file:
        file.write(_join([{"step": step} | added]))
      self._last_step = step
      return
    lines = self.lines()
    line = next((line for line in lines if line["step"] == step), {"step": step})
    line = {name: v for name, v in line.items() if not (replacing and name.startswith(replacing))}
    others = [other for other in lines if other["step"] != step]
    lines = sorted([*others, line | added], key=lambda each: each["step"])
    paths.write_whole(self._path, _join(lines))
    self._last_step = lines[-1]["step"]

  def _text(self) -> str:
    return self._path.read_text() if self._path.exists() else ""


def _evaluators_of(line: Line) -> set[str]:
  return {name.partition("/")[0] for name in line if "/" in name}


def rounded(value: Any) -> int | float | None:
  """The number with six significant digits. Integers stay whole; what is not finite becomes None."""
  if isinstance(value, numbers.Integral):
    return int(value)
  value = float(value)
  return float(f"{value:.6g}") if math.isfinite(value) else None


def _join(lines: list[Line]) -> str:
  return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
