"""The training loop: restore, step, hooks, save, evaluate. It knows no loss and no model.

A run starts (1) from the newest sound checkpoint of its workdir, mid-epoch and to the bit, or else (2) from
the pre-trained parameters that its task names, or else (3) from the task's initial state. Nothing but the
state is needed to resume: batches and random draws are functions of (seed, examples seen, step).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from dtm_jax import data, plugins, processes, rngs
from dtm_jax.arrays import Batch, PyTree, RandomKey
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.data import settings as dataset_settings
from dtm_jax.errors import concerning
from dtm_jax.evaluators import Context, Evaluators
from dtm_jax.options import validation
from dtm_jax.progress import Progress
from dtm_jax.records import lock, reporting
from dtm_jax.records import recording as recordings
from dtm_jax.records import replay as replaying
from dtm_jax.records.compilations import CompilationCounter, warn_of_recompilation
from dtm_jax.records.flight_recorder import FlightRecorder
from dtm_jax.records.metrics import Metrics
from dtm_jax.records.replay import Finding
from dtm_jax.records.run_config import Records
from dtm_jax.records.step_window import StepWindow, device_memory
from dtm_jax.storage import faults as storage_faults
from dtm_jax.storage import paths
from dtm_jax.tasks import Run, State, Task
from dtm_jax.training import mesh as meshes
from dtm_jax.training.course import Course


def train(config, workdir: str) -> State:
  """Train as `config` says and return the last state; with zero steps only evaluate.

  `workdir` receives config.json, metrics.jsonl, TensorBoard events and checkpoints/, and is locked
  meanwhile. A run that has all its steps and numbers changes nothing.

  Raises:
    UserError: another run holds the workdir, its records do not fit this config, or it cannot be written.
    NonFiniteError: the loss, the gradient or the state is not finite; see `training.flight_recorder`.
  """
  validation.check(config)
  validation.check_devices(config, jax.device_count(), jax.process_count())
  workdir = paths.resolve(workdir)
  with storage_faults.explained(workdir, rights=False), lock.hold(workdir) as held:
    with contextlib.ExitStack() as stack:
      setup = prepare(config, workdir, stack)
      if begin(setup):
        train_steps(setup, held)
    processes.gather(None)  # none leaves long before another
  return setup.state


@dataclasses.dataclass
class Setup:
  """What one start of a run works with. `train_steps` replaces the state at every step."""

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

  @property
  def total_steps(self) -> int:
    """The step at which the run ends."""
    return self.course.total_steps(self.config)

  @property
  def finished(self) -> bool:
    """Whether this start has no steps to train."""
    return self.course.step >= self.total_steps

  def evaluate(self, names: list[str], step: int) -> None:
    """Run these evaluators and write the numbers of each as soon as they are there."""
    for name in names:
      self.metrics.write(step, self.evaluators.run(name, self.state), evaluator=name)


def prepare(config, workdir: epath.Path, stack: contextlib.ExitStack) -> Setup:
  """Make everything, compare it with the run's records, and restore. Nothing is written yet.

  `stack` closes what has to be closed.
  """
  mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
  place = {f"data__dataset__{name}": value for name, value in config.data.dataset.items()}
  with concerning(**place, data__split=config.data.split):
    dataset = plugins.build("datasets", config.data.dataset, split=config.data.split)
    dataset_settings.resolve(config, dataset)
  records = Records(workdir, config, dataset)
  records.check()
  course = Course.fresh(config.batch_size, dataset.num_examples)
  task = build_task(config, course, dataset)
  records.check_weights("frozen", task.frozen)

  keep_every = course.steps("keep", config.checkpoint, default=0) or None
  folder = str(workdir / "checkpoints")
  checkpoints = Checkpoints(folder, keep=config.checkpoint.keep, keep_every_steps=keep_every)
  stack.callback(checkpoints.close)
  state, course = restore_or_init(config, task, mesh, checkpoints, course, records)
  if course.changed:  # the schedules go on at another place
    task = build_task(config, course, dataset)
  frozen = meshes.place(task.frozen, meshes.param_shardings(mesh, task.frozen, config.mesh.rules))
  context = Context.bind(
    task.predict, frozen, mesh,
    tokenize=task.tokenize, training=dataset, image_size=config.data.image_size,
  )  # fmt: skip
  evaluators = Evaluators(config.evals, context, course.steps, course.total_steps(config))
  metrics = Metrics(workdir)
  stack.callback(metrics.close)
  return Setup(
    config, workdir, mesh, dataset, records, course, task, frozen, checkpoints, state, evaluators, metrics
  )


def begin(setup: Setup) -> bool:
  """Write the records of this start and run the evaluators that are due; whether there are steps to train.

  A finished run whose numbers are all there is left untouched.
  """
  records, metrics, start, finished = setup.records, setup.metrics, setup.course.step, setup.finished
  changed = lambda name: records.forced or records.changed(f"evals.{name}")
  due = setup.evaluators.due_at_start(start, metrics.evaluated, changed)
  records.log_changes(finished=finished and start > 0)
  if finished and not due:
    logging.info("Nothing is left to do: the run has %d steps. Its numbers: %s", start, metrics.path)
    return False
  records.write(start, setup.course.examples)
  metrics.go_on_from(start if start or finished else -1, again=due, forget_evaluations=records.forced)
  setup.evaluate(due, start)
  return not finished


def train_steps(setup: Setup, held: lock.Lock) -> None:
  """Train from the step of the restored state to the last one, with the hooks in between."""
  config, course, checkpoints, total_steps = (
    setup.config, setup.course, setup.checkpoints, setup.total_steps,
  )  # fmt: skip
  save_every, log_every = course.steps("save", config.checkpoint), course.steps("log", config.log)
  train_step = jit_train_step(setup.task, setup.state, setup.frozen, setup.mesh)
  key = jax.random.key(config.seed)
  reporting.log_parameters(setup.state["params"])
  progress = Progress("Training", total_steps, "steps", done=course.step, every=60.0)
  profile = reporting.make_profile(setup.workdir, config.log.profile_step)
  window = StepWindow(config.batch_size)
  recorder = FlightRecorder(setup.workdir, config, may_diverge=setup.task.may_diverge)
  recorder.keep(setup.state, course.meta_at(course.step))
  batches = device_batches(config, setup.dataset, setup.mesh, course.examples, setup.task.needs_labels)

  with contextlib.closing(CompilationCounter()) as compilations:
    for step in range(course.step + 1, total_steps + 1):
      held.require()
      with window.waiting():
        batch = next(batches)
      first = step == course.step + 1
      with compilations, window.compiling() if first else contextlib.nullcontext():
        setup.state, measurements = train_step(setup.state, setup.frozen, batch, key)
      window.add(measurements)
      recorder.add(step, batch, measurements)
      progress(step)
      profile(step)
      if compilations.grew() and not first:
        warn_of_recompilation(step, compilations.count)

      stop, last = checkpoints.reached_preemption(step), step == total_steps
      save = stop or last or step % save_every == 0
      if save or step % log_every == 0:
        scalars = window.summary() | device_memory()
        counts = {"compilations": compilations.count, "corrupt_images": data.corrupt_count()}
        setup.metrics.write(step, scalars | {"epoch": course.epoch_at(step)} | counts)
        recorder.close_window(setup.state, course.meta_at(step))  # before it is saved
        window.reset()
      if save:
        setup.metrics.flush()
        checkpoints.save(step, setup.state, {"seed": config.seed} | course.meta_at(step))
      if stop:
        logging.warning("Stopped at step %d of %d; the same command goes on from here.", step, total_steps)
        return
      if due := setup.evaluators.due(step):
        with window.excluded():
          setup.evaluate(due, step)


def replay(config) -> Finding | None:
  """Run the steps of the recording `config.replay` again and find what is not finite first; write nothing.

  Raises:
    UserError: there is no recording, or it is of another data set or batch size.
  """
  recording = recordings.read(paths.resolve(config.replay))
  mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
  dataset = plugins.build("datasets", config.data.dataset, split=config.data.split)
  dataset_settings.resolve(config, dataset)
  recordings.log_changes(recording, config)
  course = Course.fresh(config.batch_size, dataset.num_examples)
  task = build_task(config, course, dataset)
  with contextlib.closing(Checkpoints(str(recording.folder / "state"))) as checkpoints:
    state, meta, step = checkpoints.restore(abstract_state(config, task, mesh))
  course = course.resumed(step, meta)
  if course.changed:
    task = build_task(config, course, dataset)
  frozen = meshes.place(task.frozen, meshes.param_shardings(mesh, task.frozen, config.mesh.rules))
  train_step, key = jit_train_step(task, state, frozen, mesh), jax.random.key(config.seed)
  return replaying.replay(
    recording,
    lambda state, batch: train_step(state, frozen, batch, key),
    state,
    device_batches(config, dataset, mesh, course.examples, task.needs_labels),
    may_diverge=task.may_diverge,
  )


def build_task(config, course: Course, dataset: data.Dataset) -> Task:
  """The task of the config, whose schedules lie on `course`."""
  places = course.for_schedules(config)
  run = Run(batch_size=config.batch_size, class_names=dataset.class_names, **places)
  return plugins.load("tasks", config.task).build(config, run)


def restore_or_init(
  config, task: Task, mesh: Mesh, checkpoints: Checkpoints, course: Course, records: Records
) -> tuple[State, Course]:
  """The state to start from, laid out on the mesh, and the course from there on."""
  key = rngs.stream(jax.random.key(config.seed), "init")
  abstract = abstract_state(config, task, mesh)
  restored = checkpoints.restore(abstract)
  pretrained = None
  if task.pretrained and (restored is None or records.changed("init_from.path")):
    try:
      pretrained = task.pretrained(key)
    except FileNotFoundError:
      if restored is None:
        raise
  records.check_weights("init_from", pretrained)
  if restored is None:
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    params = pretrained and meshes.place(pretrained, shardings["params"])
    return jax.jit(task.init, out_shardings=shardings)(key, params), course
  state, meta, step = restored
  logging.info("Resumed from step %d.", step)
  return state, course.resumed(step, meta)


def abstract_state(config, task: Task, mesh: Mesh) -> PyTree:
  """Shapes, types and shardings of the state."""
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  shardings = meshes.param_shardings(mesh, shapes, config.mesh.rules)
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
  )


def jit_train_step(task: Task, state: State, frozen: PyTree, mesh: Mesh):
  """The task's step under jit: state in and out with one sharding and in place, batch over all devices.

  Split parameters are gathered as the step begins. Left to itself, XLA would keep them split and instead
  gather the activations, layer by layer, which grow with the batch.
  """
  sharding = functools.partial(jax.tree.map, lambda x: x.sharding)

  def train_step(state: State, frozen: PyTree, batch: Batch, key: RandomKey):
    gather = lambda tree: jax.lax.with_sharding_constraint(tree, meshes.replicated(mesh))
    state = state | {"params": gather(state["params"])}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for what each device does with its own rows
      return task.train_step(state, gather(frozen), batch, key)

  return jax.jit(
    train_step,
    in_shardings=(sharding(state), sharding(frozen), meshes.batch_sharding(mesh), None),
    out_shardings=(sharding(state), meshes.replicated(mesh)),
    donate_argnums=0,
  )


def device_batches(
  config, dataset: data.Dataset, mesh: Mesh, start: int, needs_labels: bool = False
) -> Iterator[Batch]:
  """The global batches after the first `start` examples, one ahead of the step that uses it."""
  batches = data.train_batches(
    dataset,
    batch_size=config.batch_size,
    image_size=config.data.image_size,
    seed=config.seed,
    start=start,
    num_threads=config.data.num_threads,
    **config.data.view,
  )
  if needs_labels:
    data.require_known_labels(dataset)
    batches = (data.require_labels(batch, dataset) for batch in batches)
  ahead = meshes.to_device(next(batches), mesh)
  while True:
    batch, ahead = ahead, meshes.to_device(next(batches), mesh)
    yield batch
