"""The training loop: restore, step, hooks, save, evaluate. It knows no loss and no model.

A run starts (1) from the newest sound checkpoint of its workdir, mid-epoch and to the bit, or else (2) from
the pre-trained parameters that its task names, or else (3) from the task's initial state. Nothing but the
state is needed to resume: batches and random draws are functions of (seed, step).
"""

import functools
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from dtm_jax import data, dataset_settings, optim, plugins, reporting, rngs
from dtm_jax import mesh as meshes
from dtm_jax.arrays import Batch, PyTree, RandomKey
from dtm_jax.checkpoints import Checkpoints
from dtm_jax.tasks import Run, State, Task


def train(config, workdir: str) -> State:
  """Trains as `config` says and returns the last state; with zero steps it only evaluates.

  `workdir` receives config.json, metrics.jsonl, TensorBoard events and checkpoints/.

  Raises:
    FloatingPointError: the loss is not finite; the message has the window of steps.
  """
  workdir = epath.Path(workdir).absolute()  # may be a bucket
  workdir.mkdir(parents=True, exist_ok=True)

  mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
  dataset = plugins.build("datasets", config.data.dataset, split=config.data.split)
  dataset_settings.resolve(config, dataset)
  (workdir / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")
  steps = functools.partial(
    optim.duration, steps_per_epoch=dataset.num_examples / config.batch_size, batch_size=config.batch_size
  )
  total_steps = steps("total", config)
  save_every, log_every = steps("save", config.checkpoint), steps("log", config.log)

  run = Run(total_steps, dataset.num_examples / config.batch_size, config.batch_size, dataset.class_names)
  task = plugins.load("tasks", config.task).build(config, run)
  checkpoints = Checkpoints(
    str(workdir / "checkpoints"),
    keep=config.checkpoint.keep,
    keep_every_steps=steps("keep", config.checkpoint, default=0) or None,
  )
  state, start = restore_or_init(config, task, mesh, checkpoints)
  frozen = meshes.place(task.frozen, meshes.param_shardings(mesh, task.frozen, config.mesh.rules))
  train_step, key = jit_train_step(task, state, frozen, mesh), jax.random.key(config.seed)
  reporting.log_parameters(state["params"])

  writer = reporting.make_writer(workdir)
  evaluators = Evaluators(config.evals, task, frozen, mesh, steps, dataset)
  progress = reporting.make_progress(total_steps, writer)
  profile = reporting.make_profile(workdir, config.log.profile_step)
  compilations = reporting.CompilationCounter()
  window = reporting.Window(config.batch_size)

  writer.write_scalars(start, evaluators.at_start(state, finished=start >= total_steps))
  batches = device_batches(config, dataset, mesh, start, task.needs_labels)
  for step in range(start + 1, total_steps + 1):
    with window.waiting():
      batch = next(batches)
    with compilations:
      state, measurements = train_step(state, frozen, batch, key)
    window.add(measurements)
    progress(step)
    profile(step)
    if compilations.grew() and step > start + 1:
      reporting.warn_of_recompilation(step, compilations.count)

    stop = checkpoints.reached_preemption(step)
    save = stop or step == total_steps or step % save_every == 0
    if save or step % log_every == 0:
      scalars = (
        window.summary()
        | reporting.device_memory()
        | {
          "epoch": step * config.batch_size / dataset.num_examples,
          "compilations": compilations.count,
          "corrupt_images": data.corrupt_count(),
        }
      )
      writer.write_scalars(step, scalars)
      require_finite(scalars["loss"], step - len(window) + 1, step)  # before it is saved
      window.reset()
    if save:
      checkpoints.save(step, state, {"seed": config.seed, "batch_size": config.batch_size})
    if stop:
      logging.warning("Stopped at step %d of %d; the same command goes on from here.", step, total_steps)
      break
    if scalars := evaluators.when_due(state, step, finished=step == total_steps):
      writer.write_scalars(step, scalars)
      window.reset()

  checkpoints.close()
  compilations.close()
  writer.close()
  return state


def restore_or_init(config, task: Task, mesh: Mesh, checkpoints: Checkpoints) -> tuple[State, int]:
  """The state to start from, laid out on the mesh, and its step."""
  key = rngs.stream(jax.random.key(config.seed), "init")
  shapes = jax.eval_shape(task.init, key)
  shardings = meshes.param_shardings(mesh, shapes, config.mesh.rules)
  abstract = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
  )
  restored = checkpoints.restore(abstract)
  if restored is None:
    params = task.pretrained and meshes.place(task.pretrained(key), shardings["params"])
    return jax.jit(task.init, out_shardings=shardings)(key, params), 0
  state, meta, step = restored
  for name in ("seed", "batch_size"):
    if meta[name] != config[name]:
      logging.warning(
        "The checkpoint was made with %s=%s, the config has %s: the run goes on, but not as it would have.",
        name, meta[name], config[name],
      )  # fmt: skip
  logging.info("Resumed from step %d.", step)
  return state, step


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
  """The global batches from step `start` on, one ahead of the step that uses it."""
  batches = data.train_batches(
    dataset,
    batch_size=config.batch_size,
    image_size=config.data.image_size,
    seed=config.seed,
    start_step=start,
    num_threads=config.data.num_threads,
    **config.data.view,
  )
  if needs_labels:
    batches = (data.require_labels(batch, dataset) for batch in batches)
  ahead = meshes.to_device(next(batches), mesh)
  while True:
    batch, ahead = ahead, meshes.to_device(next(batches), mesh)
    yield batch


def require_finite(loss: float, first: int, last: int) -> None:
  if not np.isfinite(loss):
    raise FloatingPointError(f"The loss became {loss} somewhere within steps [{first}, {last}].")


def make_evaluators(
  options, task: Task, frozen: PyTree, mesh: Mesh, training: data.Dataset | None = None
) -> dict:
  """The evaluators of `config.evals` by name; they share the compiled functions of the task.

  `training` is the data set of the run, whose classes theirs are compared with.
  """

  def bind(function):
    jitted = jax.jit(function, out_shardings=meshes.replicated(mesh))
    return lambda state, batch: jitted(state, frozen, batch)

  def make(name: str, section):
    schedule = ("name", "at_start", "every_steps", "every_epochs", "every_examples")
    keywords = {key: value for key, value in section.items() if key not in schedule}
    module = plugins.load("evaluators", section.get("name", name))
    return module.Evaluator(predict, mesh, tokenize=task.tokenize, training=training, **keywords)

  predict = {name: bind(function) for name, function in task.predict.items()}
  return {name: make(name, section) for name, section in options.items()}


class Evaluators:
  """The evaluators of `config.evals`, each when it is due."""

  def __init__(self, options, task: Task, frozen: PyTree, mesh: Mesh, steps, training: data.Dataset):
    self._evaluators = make_evaluators(options, task, frozen, mesh, training)
    self._every, self._at_start = {}, set()
    for name, section in options.items():
      self._every[name] = steps("every", section, default=0)
      if section.get("at_start", False):
        self._at_start.add(name)

  def at_start(self, state: State, *, finished: bool) -> dict[str, float]:
    """Before the first step; all of them if there is nothing left to train."""
    return self._run(state, [name for name in self._evaluators if finished or name in self._at_start])

  def when_due(self, state: State, step: int, *, finished: bool) -> dict[str, float]:
    """After `step`; all of them after the last."""
    due = lambda every: every and step % every == 0
    return self._run(state, [name for name, every in self._every.items() if finished or due(every)])

  def _run(self, state: State, names: list[str]) -> dict[str, float]:
    scalars = {}
    for name in names:
      start = time.perf_counter()
      try:
        results = dict(self._evaluators[name].run(state))
      except Exception as error:
        error.add_note(f"while evaluator {name!r} ran at step {int(state['step'])}")
        raise
      scalars |= {f"{name}/{key}": value for key, value in results.items()}
      logging.info("Evaluator %s took %.1f s.", name, time.perf_counter() - start)
    return scalars
