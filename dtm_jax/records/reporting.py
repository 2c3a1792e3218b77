"""Make the writers of log lines and TensorBoard events, profiles, and the parameter table.

Only this file imports CLU. CLU imports TensorFlow, which takes half of a start. So the import is in a
function, and `import_writers_meanwhile` runs it beside the compilation of the step.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from etils import epath

from dtm_jax import processes
from dtm_jax.arrays import PyTree
from dtm_jax.storage.mirror import Mirror
from dtm_jax.training import startup

if TYPE_CHECKING:
  from clu.metric_writers import MetricWriter

PROFILED_STEPS = 5
"""How many steps a profile shows."""


@runtime_checkable
class ScalarWriter(Protocol):
  """The part of CLU's MetricWriter that a run uses."""

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None: ...
  def flush(self) -> None: ...
  def close(self) -> None: ...


def import_writers_meanwhile() -> None:
  """Import CLU's writers in a thread. If that fails, `make_writer` raises the error."""

  def import_writers() -> None:
    with contextlib.suppress(Exception):
      _metric_writers()

  threading.Thread(target=import_writers, name="import of CLU").start()


def _metric_writers() -> Any:
  """Return CLU's module of writers. TensorFlow, which it imports, sees no accelerator."""
  startup.hide_accelerators_from_tensorflow()
  from clu import metric_writers

  return metric_writers


def make_writer(
  workdir: epath.Path,
  first_step: int = 0,
  scalars: Mapping[str, int | float | None] | None = None,
  more: Sequence[ScalarWriter] = (),
) -> ScalarWriter:
  """Return a writer of log lines, and on process 0 also of TensorBoard events and to `more`.

  Each of `more` gets a thread of its own, so that a slow service does not hold up the training. CLU's
  AsyncWriter keeps the order. It raises what the writer raised at the next call, so `more` must not raise.

  Args:
    workdir: local or in a bucket.
    first_step: TensorBoard forgets the numbers that earlier starts of the run wrote from this step on.
    scalars: the numbers of `first_step` that stay.
    more: other writers, such as those of `writers.open_writers`.
  """
  metric_writers = _metric_writers()
  if not processes.is_first():
    return metric_writers.create_default_writer(str(workdir), just_logging=True, asynchronous=False)
  mirror = Mirror(workdir)
  _write_restart(str(mirror.folder), first_step, scalars or {})
  events = metric_writers.create_default_writer(mirror.folder, asynchronous=False)
  asynchronous = [metric_writers.AsyncWriter(writer) for writer in more]
  return metric_writers.MultiWriter([_MirroredWriter(events, mirror), *asynchronous])


def make_profile(
  workdir: epath.Path, first_step: int | None, num_steps: int = PROFILED_STEPS
) -> Callable[[int], object]:
  """Return a function to call after each step, which profiles `num_steps` steps from `first_step` on.

  With `first_step` None it does nothing.
  """
  if first_step is None:
    return lambda step: None
  _metric_writers()  # the profile imports them
  from clu import periodic_actions

  mirror = Mirror(workdir)
  profile = periodic_actions.Profile(
    logdir=mirror.folder,
    first_profile=first_step,
    num_profile_steps=num_steps,
    profile_duration_ms=0,
    every_secs=None,
  )

  def profile_and_copy(step: int) -> None:
    profile(step)
    if step == first_step + num_steps:
      mirror.close()

  return profile_and_copy


def profiled(first_step: int | None) -> tuple[int, ...]:
  """Return the steps after which `make_profile` begins and ends a profile."""
  return () if first_step is None else (first_step, first_step + PROFILED_STEPS)


def log_parameters(params: PyTree) -> None:
  """Log a table with name, shape, sharding and size of every parameter."""
  from clu import parameter_overview

  parameter_overview.log_parameter_overview(params, include_stats="sharding", msg="Parameters:")


class _MirroredWriter:
  """A writer of scalars into the folder of a `Mirror`, which is copied into the bucket from time to time."""

  def __init__(self, writer: "MetricWriter", mirror: Mirror):
    self._writer, self._mirror = writer, mirror

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    self._writer.write_scalars(step, scalars)
    if self._mirror.due:
      self._writer.flush()
      self._mirror.push()

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()
    self._mirror.close()


def _write_restart(folder: str, step: int, scalars: Mapping[str, int | float | None]) -> None:
  """Write an event file with which TensorBoard forgets what earlier files say of `step` and later steps.

  TensorBoard takes the first session start of a log for its beginning. Each further session start removes the
  events from its step on. There are two here, because a log of older versions has none.
  """
  from tensorboard.compat.proto.event_pb2 import Event, SessionLog
  from tensorboard.plugins.scalar.summary_v2 import scalar_pb
  from tensorboard.summary.writer.event_file_writer import EventFileWriter

  events, now = EventFileWriter(folder), time.time()
  for _ in range(2):
    events.add_event(Event(wall_time=now, step=step, session_log=SessionLog(status=SessionLog.START)))
  for name, value in scalars.items():
    if value is not None:
      events.add_event(Event(wall_time=now, step=step, summary=scalar_pb(name, value)))
  events.close()
