"""Prepare a process before its first array: TensorFlow, the cluster, and the cache of compiled programs."""

import hashlib
import logging as python_logging
import os
import pathlib
import platform
import sys
import time
from collections.abc import Mapping
from typing import Any

from absl import logging

from dtm_jax.errors import OptionError
from dtm_jax.storage import local_copies, paths

CLUSTER = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

SECONDS_TO_DISCONNECT = 3.0
"""How long process 0 keeps the service of the cluster alive for processes that leave later."""


def quiet_orbax() -> None:
  """Keep two kinds of Orbax's messages out of the log.

  Below a warning, it writes a dozen lines for every checkpoint. An exception in one of its threads is logged
  there with a traceback and then raised in the main thread, where it becomes one message.
  """

  def concerns_a_user(record: python_logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or (
      record.levelno >= python_logging.WARNING and not record.exc_info
    )

  logging.get_absl_logger().addFilter(concerns_a_user)
  report = sys.unraisablehook

  def report_others(unraisable) -> None:
    # TensorStore tells Orbax's event loop of further failures after the first one has closed the loop.
    if str(unraisable.exc_value) != "Event loop is closed":
      report(unraisable)

  sys.unraisablehook = report_others


def hide_accelerators_from_tensorflow() -> None:
  """Keep TensorFlow, which CLU and TFDS import, from taking the accelerators' memory."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  import tensorflow as tf

  try:
    for kind in ("GPU", "TPU"):
      tf.config.set_visible_devices([], kind)
  except RuntimeError:  # in a notebook, say, whose earlier cells use TensorFlow
    logging.warning("TensorFlow was used before this run, so it may hold memory of the accelerators.")


def check_cluster(environment: Mapping[str, str]) -> tuple[int, int] | None:
  """Return the number of processes and the place of this one from the JAX_* variables, or None without them.

  Raises:
    OptionError: some of the three variables are missing, or not whole numbers in range.
  """
  given = {name: environment.get(name, "").strip() for name in CLUSTER}
  missing = [name for name in CLUSTER if not given[name]]
  if len(missing) == len(CLUSTER):
    return None
  if missing:
    present = ", ".join(f"{name}={value}" for name, value in given.items() if value)
    raise OptionError(
      f"{present} names a part of a cluster; {' and '.join(missing)} must be set too. Every process needs "
      "the coordinator's host:port, the number of processes, and its own place, from 0."
    )
  address, *numbers = given.values()
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise OptionError(f"JAX_COORDINATOR_ADDRESS={address} must be host:port, such as 10.0.0.1:1234.")
  for name, value in zip(CLUSTER[1:], numbers, strict=True):
    if not value.isdecimal():
      raise OptionError(f"{name}={value} must be a whole number of at least {int(name == CLUSTER[1])}.")
  count, place = map(int, numbers)
  if count < 1 or place >= count:
    raise OptionError(f"JAX_PROCESS_ID={place} must be below JAX_NUM_PROCESSES={count}: places count from 0.")
  return count, place


def cluster_is_wrong(environment: Mapping[str, str]) -> bool:
  """Return whether `check_cluster` refuses. Then there may be no first process that says why."""
  try:
    check_cluster(environment)
  except OptionError:
    return True
  return False


def process_place(environment: Mapping[str, str]) -> int:
  """Return the place of this process from its environment, before the cluster is joined. The default is 0."""
  value = environment.get("JAX_PROCESS_ID") or environment.get("SLURM_PROCID") or "0"
  return int(value) if value.isdecimal() else 0


def exit_code_when_stopped(environment: Mapping[str, str]) -> int:
  """Return the exit code of a run that a SIGTERM stopped before its end: $DTM_JAX_STOPPED_CODE, or 0."""
  value = environment.get("DTM_JAX_STOPPED_CODE", "")
  return int(value) if value.isdecimal() else 0


def start_distributed() -> None:
  """Join the cluster that the environment names or JAX detects. A single machine joins none.

  Raises:
    OptionError: see `check_cluster`.
  """
  import jax

  from dtm_jax import processes

  limits: dict[str, Any] = dict(processes.TIME_LIMITS)
  if cluster := check_cluster(os.environ):
    count, place = cluster
    jax.distributed.initialize(num_processes=count, process_id=place, **limits)
    return
  try:
    jax.distributed.initialize(**limits)
  except ValueError as error:  # no cluster was detected
    logging.debug("jax.distributed: %s", error)
    logging.info("One process: the environment names no cluster, and none was detected.")


def leave_distributed() -> None:
  """Leave the cluster after a run that ended well. Process 0 stops its service some seconds later.

  Another process may still be disconnecting when process 0 has left. If the service stopped then, JAX would
  abort that process (exit code -6), although its run was complete.
  """
  import jax
  from jax._src import distributed  # the service has no public name

  others = jax.process_count() - 1
  service, distributed.global_state.service = distributed.global_state.service, None
  jax.distributed.shutdown()
  if service is not None:
    if others:
      time.sleep(SECONDS_TO_DISCONNECT)
    service.shutdown()


def keep_compiled_programs() -> None:
  """Turn on JAX's persistent compilation cache, unless the user has chosen its folder or switched it off.

  XLA's programs for the CPU use the features of the processor that compiled them. Machines with different
  processors can share a home, so each kind of processor has its own folder.

  The folder may be in a bucket. If it cannot be written, JAX warns and compiles.

  Raises:
    OptionError: JAX_COMPILATION_CACHE_DIR is a URL of an unknown kind, or needs a package that is missing.
  """
  import jax

  options: Any = jax.config  # it has no types for its options
  if not options.jax_enable_compilation_cache:
    return
  chosen = options.jax_compilation_cache_dir
  if chosen is None:
    folder = local_copies.cache_folder() / "xla" / kind_of_processor()
    jax.config.update("jax_compilation_cache_dir", str(folder))
  elif not chosen.startswith("file://"):
    try:
      remote = paths.is_remote(paths.resolve(chosen))
    except OptionError as error:
      raise OptionError(f"JAX_COMPILATION_CACHE_DIR={chosen}: {error}") from error
    if remote:  # XLA's own caches below it are written by XLA, which knows only local files
      jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def kind_of_processor() -> str:
  """Return a short name that is the same on machines with the same processor features."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:  # not Linux
    lines = []
  features = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
  about = "\n".join([platform.machine(), platform.processor(), *sorted(features)])
  return f"{platform.machine()}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
