"""Time a start from the command to the end of the first step, with and without the compilation cache.

    python -m benchmarks.cold_start --config=configs/vitb16.py --batch=4 --repeats=3

Each start is a process that runs dtm_jax.main until its first step is done. If the data set of the config is
not here, the start reads a folder of made-up JPEGs. If the teacher is not here, its weights are random. "off"
keeps no compiled programs, "cold" fills an empty folder, and "warm" finds the programs of the cold start. A
clock around functions of the loop shows where the time goes.
"""

import functools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

CLOCKED = {  # name in the report: module, function; the rest of `loop.run` is "other"
  "distributed": ("dtm_jax.training.startup", "start_distributed"),
  "data set": ("dtm_jax.plugins", "build"),
  "initial state": ("dtm_jax.loop", "restore_or_init"),
  "parameters' table": ("dtm_jax.records.reporting", "log_parameters"),
  "writers, with what is left of TensorFlow's import": ("dtm_jax.records.reporting", "make_writer"),
  "checkpoints": ("dtm_jax.loop", "Checkpoints"),
}
KINDS = ("off", "cold", "warm")
STARTED, RESULT = "DTM_JAX_BENCHMARK_STARTED", "DTM_JAX_BENCHMARK_RESULT"
EVENTS = {
  "/jax/core/compile/jaxpr_trace_duration": "tracing",
  "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
  "/jax/core/compile/backend_compile_duration": "compiling or loading",
}


class Clock:
  """Counts seconds by name. Of nested functions only the outermost counts."""

  def __init__(self):
    self.seconds = defaultdict(float)
    self._inside = False

  def wrap(self, name: str, function):
    """Return the function with its time counted under `name`."""

    @functools.wraps(function)
    def clocked(*args, **kwargs):
      if self._inside:
        return function(*args, **kwargs)
      self._inside, start = True, time.time()
      try:
        return function(*args, **kwargs)
      finally:
        self.seconds[name] += time.time() - start
        self._inside = False

    return clocked


def child() -> None:
  """Run dtm_jax.main with a clock and end after the first step. The arguments are those of main."""
  began = time.time()
  clock = Clock()
  clock.seconds["Python"] = began - float(os.environ[STARTED])
  import jax.monitoring
  from absl import app

  from dtm_jax import main
  from dtm_jax.training import startup

  jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: event in EVENTS and clock.seconds.__setitem__(
      "JAX: " + EVENTS[event], clock.seconds["JAX: " + EVENTS[event]] + seconds
    )
  )  # fmt: skip
  clock.seconds["imports of main"] = time.time() - began
  for name, (module, function) in CLOCKED.items():
    if module == "dtm_jax.training.startup":
      setattr(startup, function, clock.wrap(name, getattr(startup, function)))
  keep = startup.keep_compiled_programs

  def before_the_loop():
    keep()
    start = time.time()
    watch_the_loop(clock)
    clock.seconds["imports of the loop"] = time.time() - start

  startup.keep_compiled_programs = before_the_loop
  app.run(main.main, flags_parser=main.parse_flags)


def watch_the_loop(clock: Clock) -> None:
  """Put the clock around the functions of the loop."""
  import jax

  from dtm_jax import loop, plugins
  from dtm_jax.records import reporting

  modules = {"dtm_jax.loop": loop, "dtm_jax.plugins": plugins, "dtm_jax.records.reporting": reporting}
  for name, (module, function) in CLOCKED.items():
    if module in modules:
      owner = modules[module]
      setattr(owner, function, clock.wrap(name, getattr(owner, function)))

  load = plugins.load

  def load_and_clock(kind, name):
    module = load(kind, name)
    if kind == "tasks":
      module.build = clock.wrap("task, with the teacher's weights", module.build)
    return module

  plugins.load = load_and_clock
  calls, make_steps = loop.Feed.calls, loop.StepMaker.__call__

  def first_batch(*args):
    iterator = calls(*args)
    yield clock.wrap("first batch", next)(iterator)
    yield from iterator

  def first_step(*args, **options):
    before = {name: clock.seconds["JAX: " + name] for name in EVENTS.values()}
    clock.wrap("first step", lambda: jax.block_until_ready(make_steps(*args, **options)))()
    for name, seconds in before.items():
      clock.seconds[f"first step: {name}"] = clock.seconds["JAX: " + name] - seconds
    finish(clock)

  loop.Feed.calls, loop.StepMaker.__call__ = first_batch, first_step


def finish(clock: Clock) -> None:
  """Write the seconds and end the process, because the rest of the run does not matter."""
  seconds = dict(clock.seconds)
  seconds["in all"] = time.time() - float(os.environ[STARTED])
  parts = [v for name, v in seconds.items() if not name.startswith(("JAX: ", "first step: ", "in all"))]
  seconds["other"] = seconds["in all"] - sum(parts)
  Path(os.environ[RESULT]).write_text(json.dumps(seconds))
  os._exit(0)


def start(argv, folder: Path, workdir: Path, *, cache: bool) -> dict[str, float]:
  """Return the seconds of one start, by part."""
  result = workdir.with_suffix(".json")
  environment = os.environ | {
    "JAX_ENABLE_COMPILATION_CACHE": str(cache).lower(), "DTM_JAX_CACHE": str(folder), RESULT: str(result),
  }  # fmt: skip
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  command = [sys.executable, "-m", "benchmarks.cold_start", "--child", *argv, f"--workdir={workdir}"]
  environment[STARTED] = str(time.time())
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  if not result.exists():
    raise RuntimeError(f"The run ended with {done.returncode} before its first step:\n{done.stderr[-3000:]}")
  return json.loads(result.read_text())


def main_arguments(args, overrides, folder: Path) -> list[str]:
  """Return the flags of dtm_jax.main: the config of the user, with data and a teacher that are here."""
  from benchmarks import workload
  from benchmarks.photos import write_photos

  config = workload.config_from(args.config, overrides, args.dtype)
  argv = [f"--config={args.config}", *overrides, f"--config.batch_size={args.batch}"]
  argv += [f"--config.{name}.dtype={config[name].dtype}" for name in ("teacher", "student")]
  argv += [f"--config.teacher.path={config.teacher.path}"]
  if config.data.dataset.name == "imagenet" and config.data.dataset.get("data_dir") is None:
    photos = folder / "photos"
    photos.mkdir()
    write_photos(photos, max(64, args.batch))
    argv += ["--config.data.dataset.name=folder", f"--config.data.dataset.data_dir={photos}"]
  elif config.data.dataset.name == "cifar10" and config.data.dataset.get("data_dir") is None:
    from dtm_jax.storage.local_copies import cache_folder

    argv += [f"--config.data.dataset.data_dir={cache_folder()}"]
    argv += [f"--config.evals.{name}.dataset.data_dir={cache_folder()}" for name in config.evals]
  return argv


def parse(argv=None):
  """Return the options of the benchmark and the remaining arguments, which override the config."""
  from benchmarks import measuring

  parser = measuring.make_parser(__doc__, "cold_start", config="configs/vitb16.py", batch=4, repeats=3)
  return parser.parse_known_args(argv)


def collect(args, overrides) -> dict[str, list[dict[str, float]]]:
  """Return the seconds by part of all starts of each kind."""
  from benchmarks import workload

  folder = workload.temporary_folder()
  flags = main_arguments(args, overrides, folder)
  runs = {kind: [] for kind in KINDS}
  for i in range(args.repeats):
    for kind in KINDS:  # warm follows cold
      cache = folder / f"cache{i}"
      runs[kind].append(start(flags, cache, folder / f"{kind}{i}", cache=kind != "off"))
  return runs


def main(argv=None):
  from benchmarks import measuring

  args, overrides = parse(argv)
  runs = collect(args, overrides)
  names = list(dict.fromkeys(name for each in runs["cold"] for name in each))
  median = lambda kind, name: measuring.quartiles([each.get(name, 0.0) for each in runs[kind]])
  summary = {kind: {name: median(kind, name) for name in names} for kind in KINDS}
  order = ["in all", *(name for name in names if name != "in all")]
  rows = [[name, *(measuring.spread(summary[kind][name], ".1f") for kind in KINDS)] for name in order]
  body = (
    f"Batch {args.batch}; seconds, median and quartiles of {args.repeats} starts of each kind, in turns. "
    "Lines with JAX are sums over the whole start. They and the first step's parts lie within others.\n\n"
    + measuring.table([Path(args.config).stem, "no cache", "cache, empty", "cache, filled"], rows)
  )
  print(
    measuring.report(
      args.out, args.name, title="From the command to the first step", module="benchmarks.cold_start",
      note=args.note, body=body, record={"batch": args.batch, "seconds": summary, "runs": runs},
    )
  )  # fmt: skip


if __name__ == "__main__":
  if sys.argv[1:2] == ["--child"]:
    del sys.argv[1]
    child()
  else:
    main()
