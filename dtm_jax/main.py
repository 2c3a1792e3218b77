"""The one entry point: `python -m dtm_jax.main --config=configs/vitb16.py [--workdir=...]`.

On a pod every host runs the same command. Where JAX cannot find the cluster by itself, the environment names
it: JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES, JAX_PROCESS_ID.

Compiled programs are kept in ~/.cache/dtm_jax/xla (or $DTM_JAX_CACHE/xla), so that a second start need not
compile them; JAX_COMPILATION_CACHE_DIR names another place, JAX_ENABLE_COMPILATION_CACHE=false keeps none.
"""

import difflib
import hashlib
import logging as python_logging
import os
import pathlib
import platform
import runpy
import sys
from collections.abc import Iterator

import jax
from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from dtm_jax import paths, processes

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "What to run: a file of configs/.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Where checkpoints and logs go, and from where a run resumes. Default: runs/<config's name>.",
)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}. Options are written --config.name=value.")
  quiet_orbax()
  hide_accelerators_from_tensorflow()
  start_distributed()
  keep_compiled_programs()
  logging.info("Process %d of %d, devices: %s", jax.process_index(), jax.process_count(), jax.local_devices())
  from dtm_jax import loop  # after jax.distributed: importing the loop may touch the devices

  name = os.path.splitext(os.path.basename(config_flags.get_config_filename(flags.FLAGS["config"])))[0]
  if _CONFIG.value.get("replay"):
    loop.replay(_CONFIG.value)
    return
  loop.train(_CONFIG.value, _WORKDIR.value or os.path.join("runs", name))


def quiet_orbax() -> None:
  """Orbax tells a dozen lines for every checkpoint; what is no warning would drown the losses."""
  own = lambda record: record.levelno >= python_logging.WARNING or "orbax" not in record.pathname
  logging.get_absl_handler().addFilter(own)


def hide_accelerators_from_tensorflow() -> None:
  """CLU and TFDS import TensorFlow, which would take the accelerators' memory."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  import tensorflow as tf

  tf.config.set_visible_devices([], "GPU")
  tf.config.set_visible_devices([], "TPU")


def start_distributed() -> None:
  """Joins the cluster that the environment names or JAX detects; a machine on its own joins none."""
  if "JAX_COORDINATOR_ADDRESS" in os.environ:
    jax.distributed.initialize(
      num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
      process_id=int(os.environ["JAX_PROCESS_ID"]),
      **processes.TIME_LIMITS,
    )
    return
  try:
    jax.distributed.initialize(**processes.TIME_LIMITS)
  except ValueError as error:  # no cluster was detected
    logging.info("Single process (%s).", error)


def keep_compiled_programs() -> None:
  """Turns JAX's persistent compilation cache on, unless the user has chosen its folder or to have none.

  XLA's programs for the CPU use what the compiling machine's processor can do; users report that unlike
  machines found each other's. A home may be shared by such, so each kind has a folder of its own.
  """
  if jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache:
    folder = paths.cache_folder() / "xla" / kind_of_processor()
    jax.config.update("jax_compilation_cache_dir", str(folder))


def kind_of_processor() -> str:
  """Short and the same on machines whose processors have the same features."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:  # not Linux
    lines = []
  features = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
  about = "\n".join([platform.machine(), platform.processor(), *sorted(features)])
  return f"{platform.machine()}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser; a mistyped `--config.x` ends with the nearest keys instead of a traceback."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError) as error:
    options = dict(arg.lstrip("-").partition("=")[::2] for arg in argv[1:])
    known = list(dotted_keys(runpy.run_path(options["config"])["get_config"]()))
    for key in (name.removeprefix("config.") for name in options if name.startswith("config.")):
      if key not in known:
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or known
        sys.exit(f"--config.{key}: the config has no such key. Nearest: {', '.join(near)}.")
    raise error


def dotted_keys(section: config_dict.ConfigDict, prefix: str = "") -> Iterator[str]:
  """All keys of the config: "optim.lr"."""
  for name in section:
    yield prefix + name
    if isinstance(section.get(name), config_dict.ConfigDict):
      yield from dotted_keys(section[name], f"{prefix}{name}.")


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
