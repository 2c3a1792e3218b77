"""Several steps in one call: the losses of single steps, hooks at their steps, and a resume to the bit."""

import functools
import importlib
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
import small_world
import xla_flags
from shared_programs import SharedPrograms

from dtm_jax import loop, plugins
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.errors import OptionError
from dtm_jax.tasks import Run
from dtm_jax.training import startup
from dtm_jax.training.sharded_step import scan_steps
from dtm_jax.training.spans import Stops, spans
from tests.campaign import runs


def lengths(start, stops, size):
  return [len(steps) for steps in spans(start, stops, size)]


def test_calls_end_where_the_host_has_work():
  stops = Stops(24, {"log.log_steps=10": 10, "checkpoint.save_steps=8": 8})
  assert [steps[-1] for steps in spans(0, stops, 1)] == list(range(1, 25))
  found = list(spans(0, stops, 4))
  assert list(itertools.chain(*found)) == list(range(1, 25))
  assert {8, 10, 16, 20, 24} <= {steps[-1] for steps in found}
  assert [len(steps) for steps in found] == [4, 4, 1, 1, 4, 1, 1, 4, 4]
  for k, steps in enumerate(found):  # a resume at any call makes the calls that are left
    assert list(spans(steps[0] - 1, stops, 4)) == found[k:]
  assert lengths(0, Stops(7, {}), 3) == [3, 3, 1]
  assert lengths(0, Stops(9, {}, others=(2, 4)), 3) == [1, 1, 1, 1, 3, 1, 1]
  with pytest.raises(OptionError, match=r"call=9 must be at most 8, .*--config.checkpoint.save_steps=8"):
    stops.require_room(9)


@pytest.mark.parametrize("name", ["debug", "finetune_cifar10", "tiny_clip_cifar10", "seg_debug"])
def test_the_steps_of_every_task_can_be_scanned(world, name):
  """A scan needs a state with the same shapes and types before and after. `linear_probe` is tested below."""
  config = importlib.import_module(f"configs.{name}").get_config()
  if name == "debug":
    config.teacher.path = str(world / "clip")
  size = config.data.image_size
  task = plugins.load("tasks", config.task).build(config, Run(10, 5.0, 8, class_names=("cat", "dog")))
  struct = lambda *shape, dtype: jax.ShapeDtypeStruct((2, 8, *shape), dtype)
  rows = {"image": struct(size, size, 3, dtype=np.uint8), "label": struct(dtype=np.int32)}
  rows["map"] = struct(size, size, dtype=np.uint8)
  key = jax.random.key(0)
  state = jax.eval_shape(task.init, key)
  steps = functools.partial(scan_steps, task.train_step, lambda arrays, rows, key: rows)
  after, measurements = jax.eval_shape(steps, state, task.frozen, {}, rows, key)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert measurements["loss"].shape == (2,)


# Whole runs ----------------------------------------------------------------------------------------------

CALLS = {"total_steps": 7, "log__log_steps": 3, "checkpoint__save_steps": 6, "evals": {}}
"""With three steps a call, the calls end after steps 3, 6 and 7."""


def config_of(world, resident, size=3, **changes):
  options = CALLS | {"data__device_resident": resident, "train__steps_per_call": size} | changes
  return small_world.probe_config(world, **options)


@pytest.fixture(scope="module")
def programs():
  """Return programs of this file alone, because a test counts the compilations of the first run."""
  return SharedPrograms()


HOST = pytest.param(False, marks=pytest.mark.long, id="host")  # the images on the devices have the same calls


@pytest.fixture(scope="module", params=[HOST, pytest.param(True, id="resident")])
def uninterrupted(request, world, programs, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("calls")
  return request.param, programs.train(config_of(world, request.param), str(workdir)), workdir


def assert_same(state, other):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), state, other)


def test_a_run_of_calls_is_one_of_steps(world, programs, tmp_path, uninterrupted):
  """The hooks come at the same steps. The losses differ by the rounding of another program, see below."""
  resident, state, workdir = uninterrupted
  programs.train(config_of(world, resident, size=1), str(tmp_path))
  ours, single = small_world.metrics(workdir), small_world.metrics(tmp_path)
  assert [line["step"] for line in ours] == [line["step"] for line in single] == [3, 6, 7]
  assert [line["compilations"] for line in ours] == [1, 1, 2]  # the last step is a call of its own
  for mine, other in zip(ours, single, strict=True):
    assert mine["epoch"] == other["epoch"]
    assert mine["images_per_sec"] > 0
    assert mine.keys() == other.keys()
    np.testing.assert_allclose(mine["loss"], other["loss"], rtol=1e-5)
  assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [6, 7]
  assert int(state["step"]) == 7


def test_a_stop_waits_for_the_call_and_resumes_to_the_bit(
  world, programs, tmp_path, monkeypatch, uninterrupted
):
  resident, expected, workdir = uninterrupted
  monkeypatch.setattr(Checkpoints, "reached_preemption", lambda self, step: step == 2)
  state, complete = programs.run(config_of(world, resident), str(tmp_path))
  assert (int(state["step"]), complete) == (3, False)
  monkeypatch.undo()
  state, complete = programs.run(config_of(world, resident), str(tmp_path))
  assert complete
  assert_same(state, expected)
  assert small_world.losses(tmp_path) == small_world.losses(workdir)


def images_and_rows(world):
  """Return the images that the devices of this process hold, and its rows of the calls of seven steps.

  The batches are a function of both. Each array comes with the axis of its rows: after that of steps, if any.
  """
  config, dataset = loop._open_dataset(config_of(world, True))
  feed = loop.open_feed(config, dataset, loop.meshes.make_mesh())
  found = [(feed.arrays[name].addressable_data(-1), None) for name in ("image", "label")]
  for call in feed.calls(0, spans(0, Stops(7, {}), 3)):
    axis = int(call.several)
    for name in ("index", "place"):
      parts = [np.asarray(shard.data) for shard in call.rows[name].addressable_shards]
      found.append((np.concatenate(parts, axis), axis))
  return found


def write_images_and_rows(arguments):
  """Start JAX as the command would, and write what this process has."""
  startup.hide_accelerators_from_tensorflow()
  startup.start_distributed()
  world, folder = map(Path, arguments)
  for number, (array, _) in enumerate(images_and_rows(world)):
    np.save(folder / f"{number}_{jax.process_index()}.npy", array)
  jax.distributed.shutdown()  # waits for the other process


def test_two_processes_that_hold_the_images_have_the_batches_of_one(world, tmp_path):
  started = [
    runs.Process([str(world), str(tmp_path)], tmp_path / f"log{index}", env=env, run=write_images_and_rows)
    for index, env in enumerate(small_world.cluster(2))
  ]
  expected = images_and_rows(world)
  assert [process.wait() for process in started] == [0, 0], started[0].text()[-3000:]
  assert len(expected) == 2 + 3 * 2
  for number, (whole, axis) in enumerate(expected):
    each = [np.load(tmp_path / f"{number}_{index}.npy") for index in range(2)]
    for array in each if axis is None else [np.concatenate(each, axis)]:
      np.testing.assert_array_equal(array, whole)


@pytest.mark.long  # the batches are tested above, and test_loop.py has two processes that train
@pytest.mark.parametrize("uninterrupted", [True], ids=["resident"], indirect=True)
def test_two_processes_hold_the_images_and_see_the_same_losses(world, tmp_path, uninterrupted):
  resident, _, workdir = uninterrupted
  options = [
    f"data.device_resident={resident}", "train.steps_per_call=3", "total_steps=7", "log.log_steps=3",
    "checkpoint.save_steps=6", "evals={}", "batch_size=16", "teacher.name=clip",
    f"teacher.path={world / 'clip'}", f"data.dataset.data_dir={world}",
  ]  # fmt: skip
  flags = ["--config=configs/linear_probe_cifar10.py", f"--workdir={tmp_path}"]
  flags += [f"--config.{option}" for option in options]
  processes = [
    runs.Process(flags, tmp_path.with_suffix(f".log{index}"), env=env)
    for index, env in enumerate(small_world.cluster(4))
  ]
  assert [process.wait() for process in processes] == [0, 0], processes[0].text()[-3000:]
  ours, theirs = small_world.losses(tmp_path), small_world.losses(workdir)
  assert ours.keys() == theirs.keys()
  np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


def test_a_recording_of_calls_names_the_step_and_is_replayed(world, one_device, tmp_path):
  config = config_of(world, True, optim__lr=3e38, optim__warmup_steps=0, probe__rates=(10.0,))
  with pytest.raises(FloatingPointError, match=r"at step 2, within steps \[1, 3\]"):
    loop.train(config, str(tmp_path))
  config.replay = str(next((tmp_path / "flight").iterdir()))
  assert loop.replay(config).step == 2


def test_calls_that_never_fit_are_refused_before_anything_is_written(world, tmp_path):
  with pytest.raises(OptionError, match=r"steps_per_call=4 must be at most 3, .*--config.log.log_steps=3"):
    loop.train(config_of(world, False, size=4), str(tmp_path))
  assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.long  # a run of calls has the losses of a run of steps, see above
def test_the_losses_of_a_call_equal_those_of_its_steps(world):
  """They are equal to the bit with the code generator of real runs."""
  config = config_of(world, True)
  mesh = loop.meshes.make_mesh(devices=jax.devices()[:1])
  config, dataset = loop._open_dataset(config)
  config, _ = loop.device_options.resolve(config)
  task = loop.build_task(config, loop.Course.fresh(config.batch_size, dataset.num_examples), dataset)
  key, rules = jax.random.key(0), config.mesh.rules
  feed, frozen = loop.open_feed(config, dataset, mesh), loop.place_frozen(task, mesh, rules)
  losses = {}
  for size in (1, 3):
    state = loop.init_state(task, key, mesh, rules)
    programs = {}
    losses[size] = []
    for call in feed.calls(0, spans(0, Stops(6, {}), size)):
      arguments = frozen, feed.arrays, call.rows, key
      if not programs:
        lowered = feed.jit(task, state, frozen, several=call.several).lower(state, *arguments)
        programs[size] = lowered.compile(xla_flags.SHIPPED_GENERATOR)
      state, measurements = programs[size](state, *arguments)
      losses[size] += np.atleast_1d(measurements["loss"]).tolist()
  assert losses[1] == losses[3]
