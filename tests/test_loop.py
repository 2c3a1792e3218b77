"""The loop runs several steps with hooks at different periods, is interrupted, and runs on several meshes."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import small_world
from shared_programs import SharedPrograms

from dtm_jax import loop, report
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.errors import UserError
from dtm_jax.evaluators import Evaluators, best_head
from dtm_jax.models.vit import weights as vit_weights
from dtm_jax.tasks import pretrain
from dtm_jax.training import mesh as meshes
from tests.campaign import runs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def programs():
  """Return programs of this file alone, because a test counts the compilations of the first run."""
  return SharedPrograms()


@pytest.fixture(scope="module")
def uninterrupted(world, programs, tmp_path_factory):
  """Return the last state and the workdir of a run with hooks at different periods."""
  workdir = tmp_path_factory.mktemp("uninterrupted")
  config = small_world.debug_config(
    world, total_steps=7, log__log_steps=2, checkpoint__save_steps=3, evals__knn__every_steps=4,
    evals__knn__at_start=True,
  )  # fmt: skip
  return programs.train(config, str(workdir)), workdir


def assert_same(state, other):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), state, other)


def test_hooks_at_different_periods(uninterrupted):
  state, workdir = uninterrupted
  lines = small_world.metrics(workdir)
  trained = [line for line in lines if "loss" in line]
  assert [line["step"] for line in trained] == [2, 3, 4, 6, 7]  # a save ends a window too
  assert [line["step"] for line in lines if "knn/student_accuracy" in line] == [0, 4, 7]
  assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [6, 7]
  assert int(state["step"]) == 7
  for line in trained:
    assert line["compilations"] == 1
    assert line["images_per_sec"] > 0
    assert 0 <= line["input_wait"] <= 1
  # The teacher is frozen: what it gives does not change in training.
  assert len({line["knn/teacher_accuracy"] for line in lines if "knn/teacher_accuracy" in line}) == 1


def test_stops_when_told_and_resumes_to_the_bit(world, programs, tmp_path, monkeypatch, uninterrupted):
  config = small_world.debug_config(world, total_steps=7)
  monkeypatch.setattr(Checkpoints, "reached_preemption", lambda self, step: step == 4)
  state, complete = programs.run(config, str(tmp_path))
  assert (int(state["step"]), complete) == (4, False)
  monkeypatch.undo()
  state, complete = programs.run(config, str(tmp_path))
  assert complete
  assert_same(state, uninterrupted[0])
  # 80 examples in batches of 16: step 4 lies within the first epoch, step 7 in the second.
  assert small_world.losses(tmp_path)[7] == small_world.losses(uninterrupted[1])[7]


@pytest.mark.long  # the two processes below have data=2 and fsdp=2
def test_the_mesh_does_not_change_the_losses(world, programs, tmp_path, uninterrupted):
  """The fixture runs on data=8."""
  config = small_world.debug_config(world, total_steps=7, evals={}, mesh__data=4, mesh__fsdp=2)
  state = programs.train(config, str(tmp_path / "mesh"))
  ours, theirs = small_world.losses(tmp_path / "mesh"), small_world.losses(uninterrupted[1])
  assert ours.keys() == theirs.keys()
  np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
  assert "fsdp" in str(state["params"]["blocks"]["mlp"]["fc1"]["kernel"].sharding.spec)


@pytest.mark.slow
@pytest.mark.long  # the two processes below have four devices, and test_scaling.py compares with one
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_number_of_devices_does_not_change_the_losses(world, tmp_path, monkeypatch, uninterrupted, count):
  """The fixture runs on eight devices."""
  fewer = meshes.make_mesh(devices=jax.devices()[:count])
  monkeypatch.setattr(meshes, "make_mesh", lambda *sizes: fewer)
  state = loop.train(small_world.debug_config(world, total_steps=7, evals={}), str(tmp_path))
  assert state["step"].sharding.device_set == set(jax.devices()[:count])
  ours, theirs = small_world.losses(tmp_path), small_world.losses(uninterrupted[1])
  assert ours.keys() == theirs.keys()
  np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


DEBUG_WITH_SNAPSHOTS = """
from configs import common, debug

def get_config():
  config = debug.get_config()
  config.evals.snapshots = common.snapshots()
  config.evals.snapshots.update(max_images=30, images=4)
  return config
"""


@pytest.mark.slow
def test_two_processes_see_the_same_examples_and_losses(world, tmp_path, uninterrupted):
  """Each process has two devices, over which the parameters are split. The fixture splits none."""
  config = tmp_path.with_suffix(".py")
  config.write_text(DEBUG_WITH_SNAPSHOTS)
  mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2")
  flags = small_world.arguments(world, tmp_path, "--config.total_steps=7", *mesh)
  flags[0] = f"--config={config}"
  processes = [
    runs.Process(flags, tmp_path.with_suffix(f".log{index}"), env=env | {"DTM_JAX_STOPPED_CODE": "75"})
    for index, env in enumerate(small_world.cluster(2))
  ]
  assert [process.wait() for process in processes] == [0, 0], processes[0].text()[-3000:]
  ours, theirs = small_world.losses(tmp_path), small_world.losses(uninterrupted[1])
  assert ours.keys() == theirs.keys()
  np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
  last = [
    [line for line in small_world.metrics(folder) if "knn/student_accuracy" in line][-1]
    for folder in (tmp_path, uninterrupted[1])
  ]
  assert last[0]["knn/teacher_accuracy"] == last[1]["knn/teacher_accuracy"]
  assert last[0]["snapshots/student_patches_rank"] > 1
  shardings = json.loads((tmp_path / "checkpoints" / "7" / "state" / "_sharding").read_text())
  assert [None, None, "fsdp"] in [json.loads(each)["partition_spec"] for each in shardings.values()]
  names = ["images.npz", "step_00000000.npz", "step_00000007.npz"]  # process 0 alone writes them
  assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == names
  (run,) = report.read_runs([tmp_path])
  assert (run.evaluated_steps, run.notes) == ([0, 7], [])
  assert (tmp_path / "report.html").exists()


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(world, one_device, tmp_path):
  config = small_world.probe_config(
    world, evals={}, optim__lr=1e30, probe__rates=(1e30,), checkpoint__save_steps=6
  )
  with pytest.raises(FloatingPointError, match=r"within steps \[\d, \d\]"):
    loop.train(config, str(tmp_path))
  assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]


def test_zero_steps_only_evaluate(world, tmp_path):
  config = small_world.debug_config(world, total_steps=0)
  before = config.to_yaml()
  loop.train(config, str(tmp_path))
  assert config.to_yaml() == before
  lines = small_world.metrics(tmp_path)
  assert {line["step"] for line in lines} == {0}
  assert "knn/student_accuracy" in lines[-1]


def test_a_run_starts_from_another_ones_parameters_and_resumes_its_own(
  world, programs, tmp_path, uninterrupted, monkeypatch
):
  """The other run's workdir (in shards) or exported weights start a run. Later its own checkpoint counts.

  The steps change no parameter, so they compile quickly.
  """
  earlier, workdir = uninterrupted
  config = small_world.debug_config(
    world, total_steps=0, evals={}, init_from__path=str(workdir), mesh__data=4, mesh__fsdp=2
  )
  assert_same(programs.train(config, str(tmp_path / "sharded"))["params"], earlier["params"])

  vit_weights.save(tmp_path / "weights", jax.device_get(earlier["params"]), "authors")
  config = small_world.debug_config(world, total_steps=7, evals={}, init_from__path=str(tmp_path / "weights"))
  monkeypatch.setattr(pretrain.Pretraining, "train_step", small_world.counting_step(1.0))
  state = loop.train(config, str(tmp_path / "run"))
  assert int(state["step"]) == 7
  assert_same(state["params"], earlier["params"])
  config.init_from.path = "nowhere/at_all"
  with pytest.raises(UserError, match=r"--config.init_from.path: .*/weights' -> 'nowhere/at_all'"):
    loop.train(config, str(tmp_path / "run"))
  config.resume = "force"
  assert_same(loop.train(config, str(tmp_path / "run")), state)
  with pytest.raises(FileNotFoundError, match="nowhere/at_all"):
    loop.train(config, str(tmp_path / "new"))


# Records, stops at every point, another batch size -------------------------------------------------------


class Killed(BaseException):
  """An exception in place of kill -9, which no handler of the run catches."""


@pytest.fixture(scope="module")
def evaluated(world, programs, tmp_path_factory):
  """Return a run that saves and evaluates every third step and evaluates at the start."""
  workdir = tmp_path_factory.mktemp("evaluated")
  programs.train(evaluated_config(world), str(workdir))
  return workdir


def evaluated_config(world):
  return small_world.probe_config(
    world, total_steps=7, checkpoint__save_steps=3, log__log_steps=1, evals__test__every_steps=3,
    evals__test__at_start=True,
  )  # fmt: skip


def numbers(workdir):
  """Return the lines without the numbers that depend on the clock or on compilations."""
  clock = ("images_per_sec", "input_wait", "compilations", "memory_gib", "memory_peak_gib")
  return [{k: v for k, v in line.items() if k not in clock} for line in small_world.metrics(workdir)]


def snapshot(workdir):
  return {path: path.read_bytes() for path in sorted(workdir.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
  ("moment", "step"),
  [("evaluation", 0), ("evaluation", 3), ("evaluation", 7), ("before the save", 3), ("after the save", 7)],
)
def test_a_kill_at_any_moment_loses_no_number(
  world, programs, tmp_path, monkeypatch, evaluated, moment, step
):
  owner, name = {
    "evaluation": (best_head.Evaluator, "run"),
    "before the save": (Checkpoints, "save"),
    "after the save": (Evaluators, "due"),
  }[moment]
  original = getattr(owner, name)

  def killed(self, first, *args, **kwargs):
    at = int(first["step"]) if isinstance(first, dict) else first
    if at == step:
      raise Killed
    return original(self, first, *args, **kwargs)

  monkeypatch.setattr(owner, name, killed)
  with pytest.raises(Killed):
    programs.train(evaluated_config(world), str(tmp_path))
  monkeypatch.undo()
  programs.train(evaluated_config(world), str(tmp_path))
  assert numbers(tmp_path) == numbers(evaluated)
  assert [line["step"] for line in numbers(tmp_path)] == list(range(8))


def test_a_finished_or_refused_start_changes_no_file(world, programs, evaluated, caplog):
  before = snapshot(evaluated)
  with caplog.at_level("INFO", logger="absl"):
    state = programs.train(evaluated_config(world), str(evaluated))
  assert int(state["step"]) == 7
  assert "Nothing is left to do: the run has 7 steps" in caplog.text
  changed = evaluated_config(world)
  changed.data.image_size, changed.seed = 16, 1
  with pytest.raises(UserError, match=r"--config.data.image_size: 32 -> 16\n  --config.seed: 0 -> 1"):
    loop.train(changed, str(evaluated))
  assert snapshot(evaluated) == before
  written = json.loads((evaluated / "config.json").read_text())
  assert len(written["starts"]) == 1
  assert written["class_names"][0] == "airplane"


def test_another_batch_size_sees_every_example_once_and_ends_at_the_same_number(
  world, one_device, tmp_path, monkeypatch
):
  """The run has two epochs of 80 examples: two steps of 16, then the remaining 128 examples in steps of 8."""
  seen = []
  original = loop.data.train_batches

  def recorded(*args, **kwargs):
    for batch in original(*args, **kwargs):
      seen.append(batch["index"])
      yield batch

  monkeypatch.setattr(loop.data, "train_batches", recorded)
  config = small_world.probe_config(
    world, data__split="train", total_steps=None, total_epochs=2.0, evals={}, log__log_steps=1
  )
  with monkeypatch.context() as context:
    context.setattr(Checkpoints, "reached_preemption", lambda self, step: step == 2)
    loop.train(config, str(tmp_path))
  first = np.concatenate(seen[:2])
  seen.clear()
  config.batch_size = 8
  state = loop.train(config, str(tmp_path))
  assert int(state["step"]) == 2 + (160 - 32) // 8
  order = np.concatenate([first, *seen[:16]]).tolist()
  assert sorted(order[:80]) == sorted(order[80:]) == list(range(80))
  assert small_world.metrics(tmp_path)[-1]["epoch"] == 2.0
