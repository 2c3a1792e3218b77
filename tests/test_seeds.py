"""Seeds that train at once equal separate runs, have their workdirs, and stop and resume together."""

import functools
import os
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small_world
from shared_programs import SharedPrograms

from dtm_jax import loop, seeds
from dtm_jax.checkpoints.contents import load_params
from dtm_jax.errors import OptionError, UserError
from dtm_jax.tasks import Run, linear_probe, pretrain
from scripts.studies import train_seeds

STEPS = 4
SEEDS = (0, 3)


PROBE = pytest.param(small_world.probe_config, id="linear_probe")
# Its states differ by seed as those of the probe below, and its step is traced for all seeds.
PRETRAIN = pytest.param(small_world.debug_config, id="pretrain", marks=pytest.mark.long)


@pytest.fixture(scope="module", params=[PROBE, PRETRAIN])
def config_of(request, world):
  """Return a function that makes the config of a run from its changes."""
  return functools.partial(
    request.param, world, batch_size=8, total_steps=STEPS, log__log_steps=2, checkpoint__save_steps=2,
    mesh__data=1, log__report=False, data__device_resident=True, train__steps_per_call=2,
  )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def drawn_heads():
  """Heads of the probe start from draws of the seed, as the parameters of other tasks, and not from zeros."""
  init = linear_probe.LinearProbe.init

  def drawn(self, key, params=None):
    draw = lambda x: 0.1 * jax.random.normal(key, x.shape, x.dtype)
    return init(self, key, jax.tree.map(draw, self.shapes) if params is None else params)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(linear_probe.LinearProbe, "init", drawn)
    yield


@pytest.fixture(scope="module")
def programs():
  """Return programs of this file alone, because its probe starts from other heads."""
  return SharedPrograms()


@pytest.fixture(scope="module")
def one_device():
  """Runs of this file use one device, as `seeds` does."""
  from dtm_jax.training import mesh as meshes

  with pytest.MonkeyPatch.context() as patch:
    one = meshes.make_mesh(1, 1, devices=jax.devices()[:1])
    patch.setattr(loop, "_make_mesh", lambda config: one)
    yield


@pytest.fixture(scope="module")
def separate(config_of, programs, one_device, tmp_path_factory):
  """Return the workdirs of separate runs by seed."""
  folder = tmp_path_factory.mktemp("separate")
  for seed in SEEDS:
    programs.train(config_of(seed=seed), str(folder / str(seed)))
  return {seed: folder / str(seed) for seed in SEEDS}


def folders(tmp_path):
  return {seed: tmp_path / f"at_once-{seed}" for seed in SEEDS}


def run(config, workdirs):
  return seeds.run(config, {seed: str(folder) for seed, folder in workdirs.items()})


def assert_equal_runs(one, other, rtol=1e-5):
  """Compare parameters, metrics and the files of two workdirs."""
  theirs, ours = (load_params(str(folder / "checkpoints")) for folder in (one, other))
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * largest), theirs, ours)
  for a, b in zip(small_world.metrics(one), small_world.metrics(other), strict=True):
    a, b = small_world.timeless(a), small_world.timeless(b)
    assert a.keys() == b.keys()
    loss = lambda line: {name: x for name, x in line.items() if "/" not in name and name != "compilations"}
    assert loss(a) == pytest.approx(loss(b), rel=1e-4)  # the file has six digits
  names = lambda folder: sorted(path.name for path in folder.iterdir() if not path.name.startswith("events"))
  assert names(one) == names(other)


@pytest.mark.slow
def test_seeds_at_once_equal_separate_runs(config_of, programs, separate, tmp_path):
  workdirs = folders(tmp_path)
  assert run(config_of(), workdirs)
  for seed in SEEDS:
    assert_equal_runs(separate[seed], workdirs[seed])
  assert small_world.losses(workdirs[0]) != small_world.losses(workdirs[3])
  written = {folder: (folder / "metrics.jsonl").stat().st_mtime_ns for folder in workdirs.values()}
  assert run(config_of(), workdirs)  # nothing is left to do
  programs.train(config_of(seed=3), str(workdirs[3]))  # a separate run agrees
  assert written == {folder: (folder / "metrics.jsonl").stat().st_mtime_ns for folder in workdirs.values()}


def test_the_step_of_pre_training_is_traced_for_all_seeds(world):
  """Masks, noise and morphers draw for each seed under `jax.vmap`."""
  task = pretrain.build(small_world.debug_config(world, teacher__noise=0.5), Run(10, 5.0, 8))
  keys = jax.random.split(jax.random.key(0), 2)
  states = jax.eval_shape(jax.vmap(task.init), keys)
  rows = {"image": jax.ShapeDtypeStruct((8, 32, 32, 3), np.uint8)}
  program = seeds.jit_seeds(task, lambda arrays, rows, key: rows, 2, several=False)
  after, measured = jax.eval_shape(program, states, task.frozen, {}, [rows, rows], keys)
  assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, states)
  assert [each["loss"].shape for each in measured] == [(), ()]


@pytest.mark.slow
@pytest.mark.long  # test_steps_per_call.py stops one seed, and the seeds at once are compared above
def test_a_stop_saves_all_seeds_and_the_same_command_goes_on(config_of, separate, tmp_path, monkeypatch):
  workdirs, open_feed = folders(tmp_path), loop.open_feed

  def stopping(*args, **options):
    """The signal comes while the first call runs."""
    feed = open_feed(*args, **options)
    calls = feed.calls

    def signalled(*args):
      for call in calls(*args):
        if call.steps[0] == 1:
          os.kill(os.getpid(), signal.SIGTERM)
        yield call

    object.__setattr__(feed, "calls", signalled)
    return feed

  with monkeypatch.context() as patch:
    patch.setattr(loop, "open_feed", stopping)
    patch.setattr(os, "kill", lambda *args, kill=os.kill, sent=[]: sent or (sent.append(1), kill(*args)))
    assert not run(config_of(), workdirs)
  assert {small_world.metrics(folder)[-1]["step"] for folder in workdirs.values()} == {2}
  assert run(config_of(), workdirs)
  for seed in SEEDS:
    assert_equal_runs(separate[seed], workdirs[seed])


def test_seeds_at_different_steps_train_in_groups(config_of, tmp_path, monkeypatch):
  """A kill between two saves leaves them so."""
  steps, groups = {0: 2, 1: 0, 2: 2, 3: STEPS}, []

  def prepare(config, *_):
    return SimpleNamespace(config=config, course=SimpleNamespace(step=steps[config.seed]))

  def train(setups, held):
    groups.append([setup.config.seed for setup in setups])
    return True

  monkeypatch.setattr(loop, "prepare", prepare)
  monkeypatch.setattr(loop, "begin", lambda setup: setup.course.step < STEPS)
  monkeypatch.setattr(seeds, "_train", train)
  monkeypatch.setattr(seeds, "_write_report", lambda setup: None)
  assert run(config_of(), {seed: tmp_path / str(seed) for seed in steps})
  assert groups == [[1], [0, 2]]


def test_what_is_not_supported_is_refused(config_of, tmp_path, monkeypatch):
  with pytest.raises(OptionError, match=r"--config\.log\.profile_step=2 must be None"):
    run(config_of(log__profile_step=2), folders(tmp_path))
  with pytest.raises(OptionError, match=r"--config\.replay=x must be None"):
    run(config_of(replay="x"), folders(tmp_path))
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(OptionError, match="one process only, not in 2"):
    run(config_of(), folders(tmp_path))


@pytest.mark.parametrize(
  ("flags", "hint"),
  [
    (("--seeds=0,0", "--workdir=x-{seed}"), "--seeds=0,0 must be different whole numbers"),
    (("--seeds=a", "--workdir=x-{seed}"), "--seeds=a must be"),
    (("--seeds=0,1", "--workdir=x"), r"--workdir=x needs \{seed\}"),
    (("--seeds=0", "--workdir=x-{seed}", "--config.batch_size=0"), "batch_size=0: must be"),
  ],
)
def test_wrong_flags_are_named(flags, hint):
  with pytest.raises(UserError, match=hint):
    train_seeds.main(["--config=configs/debug.py", *flags])
