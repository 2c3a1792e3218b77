"""What a run says of itself: metric writers, progress, profiles, compilations. The only importer of CLU."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.monitoring
import numpy as np
from absl import logging
from clu import metric_writers, parameter_overview, periodic_actions
from etils import epath

from dtm_jax.arrays import PyTree
from dtm_jax.progress import duration
from dtm_jax.storage.mirror import Mirror


class MirroredWriter(metric_writers.MultiWriter):
  """A writer of files in the folder of a `Mirror`, which is pushed now and then."""

  def __init__(self, writer: metric_writers.MetricWriter, mirror: Mirror):
    super().__init__([writer])
    self._mirror = mirror

  def write_scalars(self, step, scalars):
    super().write_scalars(step, scalars)
    if self._mirror.due:
      super().flush()
      self._mirror.push()

  def close(self):
    super().close()
    self._mirror.close()


def make_writer(workdir: epath.Path) -> metric_writers.MetricWriter:
  """Log lines on every process; TensorBoard events on the first alone."""
  first = jax.process_index() == 0
  mirror = Mirror(workdir)
  writer = metric_writers.create_default_writer(mirror.folder, just_logging=not first, asynchronous=False)
  return MirroredWriter(writer, mirror) if first else writer


def make_profile(workdir: epath.Path, first_step: int | None, num_steps: int = 5) -> Callable[[int], object]:
  """A hook that profiles `num_steps` steps from `first_step` on; without a `first_step` it does nothing."""
  if first_step is None:
    return lambda step: None
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


def log_parameters(params: PyTree) -> None:
  """One table: name, shape, sharding and size of every parameter."""
  parameter_overview.log_parameter_overview(params, include_stats="sharding", msg="Parameters:")


class CompilationCounter:
  """Counts XLA compilations inside its `with` blocks; a train step owes exactly one in the whole run."""

  _event = "/jax/core/compile/backend_compile_duration"

  def __init__(self):
    self.count = 0
    self._seen = 0
    self._watching = False
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration: float, **_):
    if self._watching and event == self._event:
      self.count += 1

  def __enter__(self) -> "CompilationCounter":
    self._watching = True
    return self

  def __exit__(self, *_):
    self._watching = False

  def grew(self) -> bool:
    """Whether there were new ones since the last call."""
    self._seen, seen = self.count, self._seen
    return self.count > seen

  def close(self):
    jax.monitoring.unregister_event_duration_listener(self._listen)


class Window:
  """The steps since the last log line: measurements that wait on the device, and where the time went."""

  def __init__(self, batch_size: int):
    self._batch_size = batch_size
    self.reset()

  def reset(self) -> None:
    self._measurements: list[Mapping[str, jax.Array]] = []
    self._start = time.perf_counter()
    self._input_wait = 0.0
    self._apart = 0.0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time inside as time in which the step waited for its batch."""
    start = time.perf_counter()
    yield
    self._input_wait += time.perf_counter() - start

  @contextlib.contextmanager
  def apart(self) -> Iterator[None]:
    """Leaves the time inside out of images/s: evaluations, for example."""
    start = time.perf_counter()
    yield
    self._apart += time.perf_counter() - start

  @contextlib.contextmanager
  def compiling(self) -> Iterator[None]:
    """Tells that the train step is compiled, and how long that took; the time is `apart`."""
    logging.info("Compiling the train step ...")
    start = time.perf_counter()
    with self.apart():
      yield
    logging.info("The train step was compiled in %s.", duration(time.perf_counter() - start))

  def add(self, measurements: Mapping[str, jax.Array]) -> None:
    """Keeps a step's scalars; waits only for the step before, so that the host stays one step ahead."""
    if self._measurements:
      jax.block_until_ready(self._measurements[-1])
    self._measurements.append(measurements)

  def __len__(self) -> int:
    return len(self._measurements)

  def summary(self) -> dict[str, float]:
    """Means over the window, images/s (of all processes) and the share of time spent waiting for input."""
    values = collections.defaultdict(list)
    for measurements in jax.device_get(self._measurements):
      for name, value in measurements.items():
        values[name].append(value)
    seconds = time.perf_counter() - self._start - self._apart
    scalars = {name: float(np.mean(value)) for name, value in values.items()}
    scalars["images_per_sec"] = len(self) * self._batch_size / seconds
    scalars["input_wait"] = self._input_wait / seconds
    return scalars


def device_memory() -> dict[str, float]:
  """Peak and present memory of the first local device in GiB; empty where the device does not report it."""
  stats = jax.local_devices()[0].memory_stats() or {}
  names = {"peak_bytes_in_use": "memory_peak_gib", "bytes_in_use": "memory_gib"}
  return {ours: stats[theirs] / 2**30 for theirs, ours in names.items() if theirs in stats}


def warn_of_recompilation(step: int, count: int) -> None:
  logging.warning(
    "The train step was compiled again at step %d (%d compilations so far): some shape or static value "
    "changes between steps.",
    step,
    count,
  )
