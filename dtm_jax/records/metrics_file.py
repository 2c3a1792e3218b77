"""Keep metrics.jsonl: one JSON object a line and one line a step, however often the run stops and resumes.

    {"step": 100, "loss": 0.123456, "learning_rate": 1e-07, "knn/student_accuracy": 0.5}

Numbers have six significant digits. A number that is not finite is null, because strict JSON has no NaN.
pandas reads null as NaN.
"""

import json
import math
import numbers
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

from dtm_jax.storage import paths, writing

SMALL = 2**16
"""Bytes of the largest object that is written to a bucket with each line."""
BYTES_PER_SECOND = 100_000
"""A larger object waits one second for each such number of bytes before it is written again."""

Line = dict[str, Any]


def make(path: epath.Path) -> "MetricsFile":
  """Return the metrics file at a local path or in a bucket. Nothing is read or written yet."""
  return BucketMetricsFile(path) if paths.is_remote(path) else MetricsFile(path)


class MetricsFile:
  """The lines of a run in a local file. A line is complete on disk when `write` returns."""

  def __init__(self, path: epath.Path):
    self._path = path
    self._last_step = math.inf  # not known before `keep_until`

  def lines(self) -> list[Line]:
    """Return all lines that can be read, in ascending order of their steps.

    Older versions wrote several lines for one step; these are joined. A line that a kill has cut in half is
    left out.
    """
    lines, wrong = parse(self._text())
    for number in wrong:
      logging.warning("Line %d of %s is not a JSON object with a step; it is left out.", number, self._path)
    return lines

  def at(self, step: int) -> Line:
    """Return the line of a step, or {} if there is none."""
    return next((line for line in self.lines() if line["step"] == step), {})

  def keep_until(self, step: int, *, forget_evaluations: bool = False) -> None:
    """Drop the lines after `step`, and on request the evaluations at it. Mend lines that a kill has cut."""
    kept = [line for line in self.lines() if line["step"] <= step]
    if forget_evaluations and kept and kept[-1]["step"] == step:
      kept[-1] = {name: value for name, value in kept[-1].items() if "/" not in name}
    text = _join(kept)
    if text != self._text():
      self._replace(text)
    self._last_step = kept[-1]["step"] if kept else -1

  def write(self, step: int, scalars: Mapping[str, Any], *, replacing: str | None = None) -> None:
    """Add numbers to the line of a step.

    Args:
      step: need not be the last one.
      scalars: numbers by name.
      replacing: a prefix such as "knn/". Earlier numbers of the step that start with it are removed.
    """
    if not scalars:
      return
    added = {name: rounded(value) for name, value in scalars.items()}
    if step > self._last_step:
      self._append(_join([{"step": step} | added]))
      self._last_step = step
      return
    lines = {line["step"]: line for line in self.lines()}
    line = lines.get(step, {"step": step})
    lines[step] = {
      name: value for name, value in line.items() if not (replacing and name.startswith(replacing))
    } | added
    self._replace(_join([lines[step] for step in sorted(lines)]))
    self._last_step = max(lines)

  def flush(self) -> None:
    """Return when all lines are on disk."""

  def _text(self) -> str:
    return self._path.read_text() if self._path.exists() else ""

  def _append(self, text: str) -> None:
    with self._path.open("a") as file:
      file.write(text)

  def _replace(self, text: str) -> None:
    writing.write_whole(self._path, text)


class BucketMetricsFile(MetricsFile):
  """The lines of a run in a bucket, which cannot append: every write replaces the whole object.

  A small object is written with each line. A large one is written less often, in proportion to its size, and
  always by `flush`. So a kill may lose the lines since the last flush.
  """

  def __init__(self, path: epath.Path):
    super().__init__(path)
    self._content: str | None = None  # what the object shall hold; None before the first reading
    self._is_written = True
    self._next_write = 0.0

  def flush(self) -> None:
    """Write the object if it lacks lines."""
    if self._is_written or self._content is None:
      return
    writing.write_whole(self._path, self._content)
    self._is_written = True
    size = len(self._content.encode())
    self._next_write = time.monotonic() + (size / BYTES_PER_SECOND if size > SMALL else 0.0)

  def _text(self) -> str:
    if self._content is None:
      self._content = super()._text()
    return self._content

  def _append(self, text: str) -> None:
    self._replace(self._text() + text)

  def _replace(self, text: str) -> None:
    self._content, self._is_written = text, False
    if time.monotonic() >= self._next_write:
      self.flush()


def parse(text: str) -> tuple[list[Line], list[int]]:
  """Return the lines of a text in ascending order of their steps, and the numbers of lines that are wrong.

  Lines of one step are joined. A line is wrong if it is not a JSON object with a step.
  """
  joined: dict[int, Line] = {}
  wrong = []
  for number, line_text in enumerate(text.splitlines(), start=1):
    if not line_text.strip():
      continue
    try:
      line = json.loads(line_text)
      step = int(line["step"])
    except (ValueError, TypeError, KeyError):
      wrong.append(number)
      continue
    joined[step] = joined.get(step, {}) | line
  return [joined[step] for step in sorted(joined)], wrong


def rounded(value: Any) -> int | float | None:
  """Return the number with six significant digits. An integer stays whole; a number not finite is None."""
  if isinstance(value, numbers.Integral):
    return int(value)
  value = float(value)
  return float(f"{value:.6g}") if math.isfinite(value) else None


def _join(lines: list[Line]) -> str:
  return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
