"""Write the numbers of a run: to the log, to TensorBoard, and to metrics.jsonl."""

from collections.abc import Collection, Mapping, Sequence

from absl import logging
from etils import epath

from dtm_jax import processes
from dtm_jax.records import metrics_file, reporting
from dtm_jax.records.metrics_file import Line
from dtm_jax.records.reporting import ScalarWriter

FILE = "metrics.jsonl"


class Metrics:
  """Writes the numbers of a run. Process 0 writes the files; every process logs.

  Nothing is opened or changed before `go_on_from`.

  Attributes:
    path: of metrics.jsonl.
    wrote: whether this start has written numbers.
  """

  def __init__(self, workdir: epath.Path):
    self._workdir, self.path = workdir, workdir / FILE
    self._file = metrics_file.make(self.path)
    self._restart: tuple[int, Line] = (0, {})
    self._writer: ScalarWriter | None = None
    self._more: Sequence[ScalarWriter] = ()
    self.wrote = False

  @property
  def writer(self) -> ScalarWriter:
    """CLU's writer, for log lines, TensorBoard and other services."""
    if self._writer is None:
      self._writer = reporting.make_writer(self._workdir, *self._restart, self._more)
    return self._writer

  def add_writers(self, more: Sequence[ScalarWriter]) -> None:
    """Also write to these services, and close them at the end. Call this before the first `write`."""
    self._more = more

  def open(self) -> None:
    """Open CLU's writer, if `write` has not done so yet."""
    _ = self.writer

  def evaluated(self, step: int) -> list[str]:
    """Return the evaluators that have numbers at `step`, the same on every process."""
    return processes.from_first_process(lambda: sorted(_evaluators_of(self._file.at(step))))

  def go_on_from(self, step: int, *, again: Collection[str] = (), forget_evaluations: bool = False) -> None:
    """Drop the numbers after `step`, which the run writes again; -1 drops all.

    Args:
      step: the last step that counts.
      again: evaluators that will run at `step`. TensorBoard forgets their numbers of this step.
      forget_evaluations: whether to drop all evaluations at `step`.
    """
    if not processes.is_first():
      return
    self._file.keep_until(step, forget_evaluations=forget_evaluations)
    kept = {
      name: value
      for name, value in self._file.at(step).items()
      if name != "step" and name.partition("/")[0] not in again
    }
    self._restart = (max(step, 0), kept)

  def write(self, step: int, scalars: Mapping[str, int | float], *, evaluator: str | None = None) -> None:
    """Write the numbers of a step. Those of an `evaluator` replace its earlier numbers of this step."""
    if not scalars:
      return
    self.wrote = True
    if processes.is_first():
      self._file.write(step, scalars, replacing=evaluator and f"{evaluator}/")
      if evaluator:
        self._file.flush()
    self.writer.write_scalars(step, scalars)

  def flush(self) -> None:
    """Return when metrics.jsonl has all numbers. Call this before a checkpoint is saved."""
    if processes.is_first():
      self._file.flush()

  def close(self) -> None:
    """Write what is left and close the writers."""
    try:
      self.flush()
    except Exception as error:  # every save has flushed, so a resumed run writes these lines again
      logging.warning("The last lines of %s could not be written: %s", self.path, error)
    if self._writer is not None:
      self._writer.close()
    else:
      for writer in self._more:
        writer.close()
    self._writer, self._more = None, ()


def _evaluators_of(line: Line) -> set[str]:
  return {name.partition("/")[0] for name in line if "/" in name}
