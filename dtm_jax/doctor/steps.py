"""Check the train step: compile it, compare its memory with the devices', and run it on real batches."""

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dtm_jax import processes, rngs
from dtm_jax.arrays import PyTree
from dtm_jax.doctor import FAILURE, OK, WARNING, Examination, Finding, gigabytes
from dtm_jax.progress import duration
from dtm_jax.training import sharded_step
from dtm_jax.training.feeds import Feed, open_feed

MEMORY_SHARE = 0.9
"""Above this share of the memory there is a warning: evaluations and fragments need some too."""
RUN_SECONDS, RUN_STEPS = 15.0, 5
"""How long, or how many steps, the step is run. The first one does not count."""


def check_step(examination: Examination, compile_seconds: int | float) -> Iterator[Finding]:
  """Plan the memory of the step, and measure its time if all devices can run it."""
  examination.require("mesh", "dataset", "course", "task")
  task, mesh, config = examination.task, examination.mesh, examination.config
  assert task is not None
  assert mesh is not None
  assert examination.course is not None
  state = sharded_step.abstract_state(task, mesh, config.mesh.rules)
  frozen = sharded_step.with_shardings(task.frozen, mesh, config.mesh.rules)
  examination.state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  if not examination.course.total_steps(config):
    yield Finding(OK, "step", "none: the run only evaluates")
    return
  dataset = examination.dataset
  assert dataset is not None
  feed = examination.together(lambda: open_feed(config, dataset, mesh, task.needs_labels))
  compiled, seconds = examination.together(
    lambda: _compile(_lower(examination, feed, state, frozen), compile_seconds)
  )
  examination.unfinished = compiled is None
  planned = None if compiled is None else _planned(compiled)
  can_run = all(processes.gather(planned is not None and planned <= _memory()))
  if planned is None:
    least = sum(map(_bytes_a_device, jax.tree.leaves((state, frozen))))
    text = f"not compiled within {compile_seconds:.0f} s; state and weights take {gigabytes(least)} a device"
    fix = "A longer --compile_seconds. The compiled step is kept for the run."
    yield _compare(least, text) if least > _memory() else Finding(WARNING, "step", text, fix)
    return
  yield _compare(planned, f"compiled in {duration(seconds)}; it plans {gigabytes(planned)} a device")
  if compiled is None or not can_run:
    return
  examination.step_seconds = _run(examination, feed, compiled)
  yield from _judge_input(examination)


def _lower(examination: Examination, feed: Feed, state: PyTree, frozen: PyTree) -> jax.stages.Lowered:
  """Trace the step with the shapes of a batch."""
  config, task = examination.config, examination.task
  assert task is not None
  rows = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    for name, x in next(feed.batches(0)).items()
  }
  return feed.jit(task, state, frozen).lower(state, frozen, feed.arrays, rows, jax.random.key(config.seed))


def _compile(lowered: jax.stages.Lowered, limit: int | float) -> tuple[jax.stages.Compiled | None, float]:
  """Compile in a thread and return the program, or None after `limit` seconds, and the seconds."""
  result: list[Any] = []

  def compile_() -> None:
    try:
      result.append(lowered.compile())
    except Exception as error:
      result.append(error)

  start, thread = time.perf_counter(), threading.Thread(target=compile_, daemon=True)
  thread.start()
  thread.join(limit)
  if result and isinstance(result[0], Exception):
    raise result[0]
  return (result[0] if result else None), time.perf_counter() - start


def _planned(compiled: jax.stages.Compiled) -> int:
  """Return the bytes that the program needs on a device."""
  plan: Any = compiled.memory_analysis()
  kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
  return kept + plan.temp_size_in_bytes


def _bytes_a_device(x: Any) -> int:
  return int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize


def _memory() -> int | float:
  """Return the bytes that a device has: the accelerator's limit, or its share of the host's free memory."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  if device.platform != "cpu":
    return float("inf")
  free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  try:
    with open("/proc/meminfo") as file:
      lines = dict(line.split(":", 1) for line in file)
    free = int(lines["MemAvailable"].split()[0]) * 1024
  except (OSError, KeyError, ValueError):
    pass  # not Linux
  return free / jax.local_device_count()


def _compare(needed: int | float, text: str) -> Finding:
  """Compare the bytes that a device needs with those that it has."""
  memory = _memory()
  if memory == float("inf"):
    return Finding(WARNING, "step", f"{text}; the memory of the device is not known")
  text = f"{text} of {gigabytes(memory)}"
  fix = (
    "A smaller --config.batch_size, more devices, --config.student.remat=block, or "
    "--config.mesh.fsdp to split the state."
  )
  if needed > memory:
    return Finding(FAILURE, "step", text, fix)
  if needed > MEMORY_SHARE * memory:
    return Finding(WARNING, "step", text, fix)
  return Finding(OK, "step", text)


def _run(examination: Examination, feed: Feed, compiled: jax.stages.Compiled) -> float:
  """Run the step on real batches and return the seconds of one step. All processes must call this."""
  config, mesh, task = examination.config, examination.mesh, examination.task
  assert task is not None
  assert mesh is not None
  key = jax.random.key(config.seed)
  state = sharded_step.init_state(task, rngs.stream(key, "init"), mesh, config.mesh.rules)
  frozen = sharded_step.place_frozen(task, mesh, config.mesh.rules)
  rows = next(feed.batches(0))
  times: list[float] = []
  for number in range(1 + RUN_STEPS):
    start = time.perf_counter()
    state, measurements = compiled(state, frozen, feed.arrays, rows, key)
    jax.block_until_ready(measurements)
    times.append(time.perf_counter() - start)
    if processes.gather(number > 0 and sum(times) > RUN_SECONDS)[0]:
      break
  if not np.isfinite(float(measurements["loss"])):
    raise FloatingPointError(f"the loss of step {number + 1} is {float(measurements['loss'])}")
  return min(times[1:])


def _judge_input(examination: Examination) -> Iterator[Finding]:
  """Compare the reading speed of this host with what the step needs."""
  assert examination.step_seconds is not None
  seconds, batch_size = examination.step_seconds, examination.config.batch_size
  need = batch_size / jax.process_count() / seconds
  yield Finding(OK, "step", f"{duration(seconds)} a step, {batch_size / seconds:,.0f} images/s")
  rate = examination.host_rate
  if rate is None:
    return
  text = f"this host reads {rate:,.0f} images/s, and the step needs {need:,.0f}"
  if rate < 1.1 * need:
    fix = (
      f"--config.data.num_threads (now {examination.config.data.num_threads}) up to the number of cores, "
      "data on a faster disk, or images that are stored smaller."
    )
    yield Finding(WARNING, "input", text, fix)
  else:
    yield Finding(OK, "input", text)
