"""Train several seeds of one config at once, by `jax.vmap` over their states, batches and keys.

    run(config, {0: "runs/a-0", 1: "runs/a-1"})

Every seed has its own workdir, with the same files and the same numbers (up to rounding) as a run of its own.
So it can be resumed, evaluated and fine-tuned as one, and `dtm_jax.main` can finish it alone. One device
holds the states of all seeds and what their backward passes keep. The teacher is computed for each seed.

Seeds that are at the same step train together. After a kill, some may have one more checkpoint than others;
these train in a group of their own.
"""

import contextlib
import copy
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from dtm_jax import loop, report
from dtm_jax.arrays import Batch, Key, PyTree, RandomKey
from dtm_jax.errors import OptionError
from dtm_jax.options import validation
from dtm_jax.progress import Progress
from dtm_jax.records import lock, reporting
from dtm_jax.records.compilations import CompilationCounter
from dtm_jax.records.flight_recorder import FlightRecorder
from dtm_jax.records.step_window import StepWindow
from dtm_jax.storage import faults, paths
from dtm_jax.tasks import Scalars, State
from dtm_jax.training import mesh as meshes
from dtm_jax.training.feeds import Call
from dtm_jax.training.sharded_step import scan_steps

Program = Callable[..., tuple[PyTree, list[Scalars]]]
"""(states, frozen, arrays, the rows of each seed, keys) -> (states, the measurements of each seed)."""


def run(config: Any, workdirs: Mapping[int, str]) -> bool:
  """Train a config with each of these seeds, and return whether all runs are complete.

  They are not if a SIGTERM stopped them. Their states are then saved.

  Args:
    config: of one run. Its seed is replaced.
    workdirs: seed -> the folder of its run.

  Raises:
    UserError: as in `loop.train`, for the run of any seed.
    OptionError: there are several processes, or the config asks for a profile or a replay.
  """
  _check(config)
  mesh = meshes.make_mesh(1, 1, devices=jax.local_devices()[:1])
  if jax.device_count() > 1:
    logging.warning("All seeds train on the first of %d devices.", jax.device_count())
  with contextlib.ExitStack() as stack:
    setups, held = [], []
    for seed, workdir in workdirs.items():
      folder = paths.resolve(workdir)
      stack.enter_context(faults.explained(folder, whole_run=True))
      held.append(stack.enter_context(lock.hold(folder)))
      setups.append(loop.prepare(_with_seed(config, seed), folder, mesh, stack))
    unfinished = [setup for setup in setups if loop.begin(setup)]
    place = lambda setup: setup.course.step
    for step, group in itertools.groupby(sorted(unfinished, key=place), key=place):
      together = list(group)
      logging.info("%d seeds train together from step %d.", len(together), step)
      if not _train(together, held):
        return False
    for setup in setups:
      _write_report(setup)
  return True


def jit_seeds(task: Any, prepare: Any, seeds: int, *, several: bool) -> Program:
  """Return the train step of all seeds, or several steps of each, under `jax.jit`.

  Args:
    task, prepare: see `sharded_step.jit_calls`. The tasks of all seeds have the same functions.
    several: whether the rows have a leading axis of steps.
  """

  def of_one(state: State, frozen: PyTree, arrays: PyTree, rows: Batch, key: RandomKey):
    if several:
      return scan_steps(task.train_step, prepare, state, frozen, arrays, rows, key)
    return task.train_step(state, frozen, prepare(arrays, rows, key), key)

  def of_all(
    states: PyTree, frozen: PyTree, arrays: PyTree, rows: Sequence[Batch], keys: Key[jax.Array, " seeds"]
  ) -> tuple[PyTree, list[Scalars]]:
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *rows)
    states, measured = jax.vmap(of_one, (0, None, None, 0, 0))(states, frozen, arrays, stacked, keys)
    return states, _unstack(measured, seeds)

  return jax.jit(of_all, donate_argnums=0)


def _check(config: Any) -> None:
  if jax.process_count() > 1:
    raise OptionError(f"Several seeds train at once in one process only, not in {jax.process_count()}.")
  for option in ("log.profile_step", "replay"):
    section, _, name = option.rpartition(".")
    value = (config.get(section, {}) if section else config).get(name)
    if value is not None:
      raise OptionError(f"--config.{option}={value} must be None if several seeds train at once.")
  validation.check(config)


def _with_seed(config: Any, seed: int) -> Any:
  config = copy.deepcopy(config)  # keeps references between options
  config.seed = seed
  return config


def _write_report(setup: loop.Setup) -> None:
  if setup.metrics.wrote and setup.config.log.get("report", True):
    report.write_or_warn(setup.workdir)


def _train(setups: list[loop.Setup], held: list[lock.Lock]) -> bool:
  """Train seeds that are at the same step to the end. Return False if a SIGTERM stopped them."""
  seeds, first = range(len(setups)), setups[0]
  config, course, total_steps = first.config, first.course, first.total_steps
  save_every, log_every = course.steps("save", config.checkpoint), course.steps("log", config.log)
  reporting.import_writers_meanwhile()
  windows = [StepWindow(config.batch_size) for _ in seeds]
  recorders = [
    FlightRecorder(setup.workdir, setup.config, may_diverge=setup.task.may_diverge) for setup in setups
  ]
  for setup, recorder in zip(setups, recorders, strict=True):
    recorder.keep(setup.state, course.meta_at(course.step))
  progress = Progress(f"Training {len(setups)} seeds", total_steps, "steps", done=course.step, every=60.0)
  with progress, contextlib.closing(CompilationCounter()) as compilations:
    make_steps = _StepMaker(setups, windows, compilations)
    for calls in _waiting_for(setups, windows):
      for each in held:
        each.require()
      measured = make_steps(calls)
      steps = calls[0].steps
      for i in seeds:
        windows[i].add(measured[i], len(steps))
        recorders[i].add(steps, calls[i].rows, measured[i])
      step = steps[-1]
      stop = any([setup.checkpoints.reached_preemption(step) for setup in setups])
      save = stop or step == total_steps or step % save_every == 0
      log = save or step % log_every == 0
      due = [] if stop else first.evaluators.due(step)
      if log or due:
        make_steps.give_states()
      for setup, window, recorder in zip(setups, windows, recorders, strict=True):
        if log:
          loop.report_window(setup, step, window, compilations, progress)
          recorder.close_window(setup.state, course.meta_at(step))
          window.reset()
        if save:
          setup.metrics.flush()
          setup.checkpoints.save(step, setup.state, {"seed": setup.config.seed} | course.meta_at(step))
      progress(step)
      if stop:
        logging.warning("Stopped at step %d of %d; the same command goes on from here.", step, total_steps)
        return False
      with contextlib.ExitStack() as excluded:
        for window in windows if due else ():
          excluded.enter_context(window.excluded())
        for setup in setups if due else ():
          setup.evaluate(due, step)
  return True


class _StepMaker:
  """Makes the steps of all seeds. It holds their states, stacked, until `give_states`."""

  def __init__(self, setups: list[loop.Setup], windows: list[StepWindow], compilations: CompilationCounter):
    self._setups, self._windows, self._compilations = setups, windows, compilations
    self._states = jax.jit(_stack)([setup.state for setup in setups])
    self._keys = jnp.stack([jax.random.key(setup.config.seed) for setup in setups])
    self._copies = jax.jit(functools.partial(_unstack, count=len(setups)))
    self._programs: dict[bool, Program] = {}

  def __call__(self, calls: Sequence[Call]) -> list[Scalars]:
    """Return the measurements of each seed, as `loop.StepMaker` does."""
    first, several = self._setups[0], calls[0].several
    assert first.feed is not None
    new = several not in self._programs
    if new:
      self._programs[several] = jit_seeds(first.task, first.feed.prepare, len(self._setups), several=several)
    with contextlib.ExitStack() as stack:
      stack.enter_context(self._compilations)
      if new:
        stack.enter_context(self._windows[0].compiling())
      for window in self._windows[1:] if new else ():
        stack.enter_context(window.excluded())
      rows = [call.rows for call in calls]
      arrays = first.feed.arrays
      self._states, measured = self._programs[several](self._states, first.frozen, arrays, rows, self._keys)
      for setup in self._setups if new else ():
        setup.metrics.open()
    return measured

  def give_states(self) -> None:
    """Copy the state of each seed into its setup."""
    for setup, state in zip(self._setups, self._copies(self._states), strict=True):
      setup.state = state


def _waiting_for(setups: list[loop.Setup], windows: list[StepWindow]) -> Iterator[tuple[Call, ...]]:
  """Yield the next call of every seed. The calls of a run depend on its options and not on its seed."""
  calls = [window.waiting_for(setup.calls) for setup, window in zip(setups, windows, strict=True)]
  return zip(*calls, strict=True)


def _stack(trees: Sequence[PyTree]) -> PyTree:
  return jax.tree.map(lambda *each: jnp.stack(each), *trees)


def _unstack(tree: PyTree, count: int) -> list[PyTree]:
  return [jax.tree.map(operator.itemgetter(i), tree) for i in range(count)]
