"""Measure the steps since the last log line: mean measurements, images per second, memory, waiting time."""

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging

from dtm_jax.progress import duration

T = TypeVar("T")


class StepWindow:
  """The steps since the last log line. Measurements stay on the device until `summary`.

  Args:
    batch_size: the global batch.
  """

  def __init__(self, batch_size: int):
    self._batch_size = batch_size
    self.reset()

  def reset(self) -> None:
    """Start a new window."""
    self._measurements: list[Mapping[str, jax.Array]] = []
    self._steps = 0
    self._start = time.perf_counter()
    self._input_wait, self._excluded = 0.0, 0.0

  def waiting_for(self, items: Iterator[T]) -> Iterator[T]:
    """Yield the items, and count the time that each takes as waiting for input."""
    end = object()
    while True:
      start = time.perf_counter()
      item: Any = next(items, end)
      self._input_wait += time.perf_counter() - start
      if item is end:
        return
      yield item

  @contextlib.contextmanager
  def excluded(self) -> Iterator[None]:
    """Leave the time inside, such as an evaluation, out of images/s."""
    start = time.perf_counter()
    yield
    self._excluded += time.perf_counter() - start

  @contextlib.contextmanager
  def compiling(self) -> Iterator[None]:
    """Log that the train step is compiled, and how long this took. The time is `excluded`."""
    logging.info("Compiling the train step ...")
    start = time.perf_counter()
    with self.excluded():
      yield
    logging.info("The train step was compiled in %s.", duration(time.perf_counter() - start))

  def add(self, measurements: Mapping[str, jax.Array], steps: int = 1) -> None:
    """Keep the measurements of a call, scalars or arrays [steps].

    This waits only for the call before, so the host stays one call ahead.
    """
    if self._measurements:
      jax.block_until_ready(self._measurements[-1])
    self._measurements.append(measurements)
    self._steps += steps

  def __len__(self) -> int:
    return self._steps

  def summary(self) -> dict[str, float]:
    """Return means over the window, images/s of all processes, and the share of time spent waiting."""
    values = collections.defaultdict(list)
    for measurements in jax.device_get(self._measurements):
      for name, value in measurements.items():
        values[name].append(np.atleast_1d(value))
    seconds = time.perf_counter() - self._start - self._excluded
    scalars = {name: float(np.mean(np.concatenate(value))) for name, value in values.items()}
    scalars["images_per_sec"] = len(self) * self._batch_size / seconds
    scalars["input_wait"] = self._input_wait / seconds
    return scalars


def device_memory() -> dict[str, float]:
  """Return peak and present memory of the first local device in GiB; {} if the device does not report it."""
  stats = jax.local_devices()[0].memory_stats() or {}
  names = {"peak_bytes_in_use": "memory_peak_gib", "bytes_in_use": "memory_gib"}
  return {ours: stats[theirs] / 2**30 for theirs, ours in names.items() if theirs in stats}
