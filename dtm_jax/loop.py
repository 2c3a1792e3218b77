"""Train and evaluate a run: restore, step, hooks, save, evaluate. The loop knows no loss and no model.

A run starts from the newest sound checkpoint of its workdir, in the middle of an epoch and to the bit.
Without a checkpoint it starts from the pre-trained parameters that its task names, or else from the task's
initial state. The state is all that a run needs to resume: batches and random draws are functions of (seed,
examples seen, step).
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from dtm_jax import data, device_options, plugins, processes, report, rngs
from dtm_jax.arrays import PyTree
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.data import settings
from dtm_jax.errors import concerning
from dtm_jax.evaluators import Context, Evaluators
from dtm_jax.options import validation
from dtm_jax.progress import Progress
from dtm_jax.records import changes, lock, reporting, writers
from dtm_jax.records.compilations import CompilationCounter
from dtm_jax.records.flight_recorder import FlightRecorder
from dtm_jax.records.metrics import Metrics
from dtm_jax.records.recording import log_differences, read_recording
from dtm_jax.records.replay import Finding, replay_steps
from dtm_jax.records.run_config import Records
from dtm_jax.records.step_maker import StepMaker
from dtm_jax.records.step_window import StepWindow, device_memory
from dtm_jax.storage import faults, paths
from dtm_jax.tasks import Run, State, Task
from dtm_jax.training import mesh as meshes
from dtm_jax.training.course import Course
from dtm_jax.training.feeds import Call, Feed, open_feed
from dtm_jax.training.sharded_step import abstract_state, init_state, place_frozen
from dtm_jax.training.spans import plan_stops, spans, steps_per_call


def train(config: Any, workdir: str) -> State:
  """Check `config`, train as it says, and return the last state. With zero steps it only evaluates.

  `config` itself stays as it is. `workdir` receives config.json, metrics.jsonl, TensorBoard events and
  checkpoints/, and is locked meanwhile. A finished run with all its numbers changes nothing.

  Raises:
    UserError: the config is wrong, another run holds the workdir, the workdir's records do not fit this
      config, or the workdir cannot be written.
    NonFiniteError: the loss, the gradient or the state is not finite; see `records.flight_recorder`.
  """
  validation.check(config)
  return run(config, workdir)[0]


def run(config: Any, workdir: str) -> tuple[State, bool]:
  """Do what `train` does with a config that has been checked, such as `main`'s.

  Returns:
    The last state, and whether the run is complete. It is not if a SIGTERM stopped it.
  """
  mesh = _make_mesh(config)
  folder = paths.resolve(workdir)
  with faults.explained(folder, whole_run=True), lock.hold(folder) as held:
    with contextlib.ExitStack() as stack:
      setup = prepare(config, folder, mesh, stack)
      complete = not begin(setup) or train_steps(setup, held)
    if complete and setup.metrics.wrote and config.log.get("report", True) and processes.is_first():
      report.write_or_warn(folder)
    processes.gather(None)  # no process leaves long before another
  return setup.state, complete


@dataclasses.dataclass
class Setup:
  """The objects that one start of a run works with. `train_steps` replaces the state at every step."""

  config: Any
  workdir: epath.Path
  mesh: Mesh
  dataset: data.Dataset
  records: Records
  course: Course
  task: Task
  frozen: PyTree
  checkpoints: Checkpoints
  state: State
  evaluators: Evaluators
  metrics: Metrics
  feed: Feed | None
  calls: Iterator[Call]

  @property
  def total_steps(self) -> int:
    """The step at which the run ends."""
    return self.course.total_steps(self.config)

  @property
  def finished(self) -> bool:
    """Whether this start has no steps to train."""
    return self.course.step >= self.total_steps

  def evaluate(self, names: list[str], step: int) -> None:
    """Run these evaluators and write the numbers of each as soon as it is done."""
    for name in names:
      self.metrics.write(step, self.evaluators.run(name, self.state), evaluator=name)


def prepare(config: Any, workdir: epath.Path, mesh: Mesh, stack: contextlib.ExitStack) -> Setup:
  """Make everything, compare it with the run's records, restore, and read the first batch.

  Nothing is written yet. So a start that is refused, even because of its images, leaves no records.
  `stack` closes the objects that must be closed.
  """
  config, dataset = _open_dataset(config)
  config, chosen = device_options.resolve(config)
  records = Records(workdir, config, dataset, auto=chosen)
  records.check()
  course = Course.fresh(config.batch_size, dataset.num_examples)
  task = build_task(config, course, dataset)
  records.check_weights("frozen", task.frozen)

  keep_every = course.steps("keep", config.checkpoint, default=0) or None
  folder = str(workdir / "checkpoints")
  checkpoints = Checkpoints(folder, keep=config.checkpoint.keep, keep_every_steps=keep_every)
  stack.callback(checkpoints.close)
  state, course = restore_or_init(config, task, mesh, checkpoints, course, records)
  if course.changed:  # the batch size is another: the schedules go on at another place
    task = build_task(config, course, dataset)
  frozen = place_frozen(task, mesh, config.mesh.rules)
  context = Context.bind(
    task.outputs, frozen, mesh,
    tokenize=task.tokenize, training=dataset, image_size=config.data.image_size, workdir=workdir,
  )  # fmt: skip
  total_steps = course.total_steps(config)
  evaluators = Evaluators(config.evals, context, course.steps, total_steps)
  metrics = Metrics(workdir)
  stack.callback(metrics.close)
  feed: Feed | None = None
  calls: Iterator[Call] = iter(())
  if course.step < total_steps:
    stops = plan_stops(config, course, evaluators.every, also=reporting.profiled(config.log.profile_step))
    feed = open_feed(config, dataset, mesh, task.needs_labels)
    calls = feed.calls(course.examples, spans(course.step, stops, steps_per_call(config)))
    calls = itertools.chain([next(calls)], calls)
  return Setup(
    config, workdir, mesh, dataset, records, course, task, frozen, checkpoints, state, evaluators, metrics,
    feed, calls,
  )  # fmt: skip


def begin(setup: Setup) -> bool:
  """Write the records of this start, run the evaluators that are due, and return whether steps are left.

  A finished run with all its numbers is left untouched.
  """
  records, metrics, start, finished = setup.records, setup.metrics, setup.course.step, setup.finished
  changed = lambda name: records.forced or records.changed(f"evals.{name}")
  due = setup.evaluators.due_at_start(start, metrics.evaluated, changed)
  records.log_changes(finished=finished and start > 0)
  if finished and not due:
    logging.info("Nothing is left to do: the run has %d steps. Its numbers: %s", start, metrics.path)
    return False
  names, content = setup.config.log.get("writers") or (), changes.plain(setup.config)
  metrics.add_writers(writers.open_writers(names, setup.workdir, content, resumed=start > 0))
  records.write(start, setup.course.examples)
  metrics.go_on_from(start if start or finished else -1, again=due, forget_evaluations=records.forced)
  setup.evaluate(due, start)
  return not finished


def train_steps(setup: Setup, held: lock.Lock) -> bool:
  """Train from the step of the restored state to the last step, with the hooks in between.

  Returns:
    Whether the run is complete. If a SIGTERM stopped it, its state is saved.
  """
  config, course, checkpoints = setup.config, setup.course, setup.checkpoints
  assert setup.feed is not None
  save_every, log_every = course.steps("save", config.checkpoint), course.steps("log", config.log)
  reporting.import_writers_meanwhile()
  reporting.log_parameters(setup.state["params"])
  profile = reporting.make_profile(setup.workdir, config.log.profile_step)
  window = StepWindow(config.batch_size)
  recorder = FlightRecorder(setup.workdir, config, may_diverge=setup.task.may_diverge)
  recorder.keep(setup.state, course.meta_at(course.step))
  progress = Progress("Training", setup.total_steps, "steps", done=course.step, every=60.0)
  with progress, contextlib.closing(CompilationCounter()) as compilations:
    make_steps = StepMaker(setup.feed, setup.task, setup.frozen, config.seed, window, compilations)
    for call in window.waiting_for(setup.calls):
      held.require()
      setup.state, measurements = make_steps(setup.state, call, meanwhile=setup.metrics.open)
      window.add(measurements, len(call.steps))
      recorder.add(call.steps, call.rows, measurements)
      step = call.steps[-1]
      profile(step)
      stop = any([checkpoints.reached_preemption(each) for each in call.steps])  # JAX counts every step
      save = stop or step == setup.total_steps or step % save_every == 0
      if save or step % log_every == 0:
        report_window(setup, step, window, compilations, progress)
        recorder.close_window(setup.state, course.meta_at(step))  # checks the state before it is saved
        window.reset()
      progress(step)
      if save:
        setup.metrics.flush()
        checkpoints.save(step, setup.state, {"seed": config.seed} | course.meta_at(step))
      if stop:
        left = step, setup.total_steps
        logging.warning("Stopped at step %d of %d; the same command goes on from here.", *left)
        return False
      if due := setup.evaluators.due(step):
        with window.excluded():
          setup.evaluate(due, step)
  return True


def report_window(
  setup: Setup, step: int, window: StepWindow, compilations: CompilationCounter, progress: Progress
) -> None:
  """Write the means of the window and the speed, and show them behind the bar."""
  scalars = window.summary() | device_memory()
  counts = {"compilations": compilations.count, "corrupt_images": data.corrupt_count()}
  setup.metrics.write(step, scalars | {"epoch": setup.course.epoch_at(step)} | counts)
  progress.note(f"loss {scalars['loss']:.4f}, {scalars['images_per_sec']:.0f} images/s")


def replay(config: Any) -> Finding | None:
  """Run the steps of the recording `config.replay` again and find the first value that is not finite.

  The config has been checked. Nothing is written.

  Raises:
    UserError: there is no recording, or its data set or batch size differs.
  """
  recording = read_recording(paths.resolve(config.replay))
  mesh = _make_mesh(config)
  config, dataset = _open_dataset(config)
  config, _ = device_options.resolve(config)
  log_differences(recording, config)
  course = Course.fresh(config.batch_size, dataset.num_examples)
  task = build_task(config, course, dataset)
  with contextlib.closing(Checkpoints(str(recording.folder / "state"))) as checkpoints:
    restored = checkpoints.restore(abstract_state(task, mesh, config.mesh.rules))
  assert restored is not None, f"{recording.folder} holds no state"
  state, meta, step = restored
  course = course.resumed(step, meta)
  if course.changed:
    task = build_task(config, course, dataset)
  frozen = place_frozen(task, mesh, config.mesh.rules)
  feed = open_feed(config, dataset, mesh, task.needs_labels)
  train_step, key = feed.jit(task, state, frozen), jax.random.key(config.seed)
  return replay_steps(
    recording,
    lambda state, rows: train_step(state, frozen, feed.arrays, rows, key),
    state,
    feed.batches(course.examples),
    may_diverge=task.may_diverge,
  )


def build_task(config: Any, course: Course, dataset: data.Dataset) -> Task:
  """Return the task of the config. `course` places its schedules."""
  places = course.for_schedules(config)
  facts = Run(batch_size=config.batch_size, class_names=dataset.class_names, **places)
  return plugins.load("tasks", config.task).build(config, facts)


def restore_or_init(
  config: Any, task: Task, mesh: Mesh, checkpoints: Checkpoints, course: Course, records: Records
) -> tuple[State, Course]:
  """Return the state to start from, laid out on the mesh, and the course from there on."""
  key, rules = rngs.stream(jax.random.key(config.seed), "init"), config.mesh.rules
  restored = checkpoints.restore(abstract_state(task, mesh, rules))
  pretrained = None
  if restored is None or records.changed("init_from.path"):
    try:
      pretrained = task.pretrained(key)
    except FileNotFoundError:
      if restored is None:
        raise
  records.check_weights("init_from", pretrained)
  if restored is None:
    return init_state(task, key, mesh, rules, pretrained), course
  state, meta, step = restored
  logging.info("Resumed from step %d.", step)
  return state, course.resumed(step, meta)


def _make_mesh(config: Any) -> Mesh:
  validation.check_devices(config, jax.device_count(), jax.process_count())
  return meshes.make_mesh(config.mesh.data, config.mesh.fsdp)


def _open_dataset(config: Any) -> tuple[Any, data.Dataset]:
  """Return the config with the options that it leaves to the training set, and this set."""
  options = {f"data__dataset__{name}": value for name, value in config.data.dataset.items()}
  with concerning(**options, data__split=config.data.split):
    dataset = plugins.build("datasets", config.data.dataset, split=config.data.split)
    return settings.resolve(config, dataset), dataset
