"""The snapshots of a run: RankMe, agreement of groups, and the same images at every time."""

import numpy as np
import pytest
import small_world
from etils import epath

from configs import common
from dtm_jax import loop
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.errors import OptionError
from dtm_jax.evaluators._token_measures import adjusted_rand_index, effective_rank
from dtm_jax.records import snapshots


def config_with_snapshots(world, **changes):
  config = small_world.debug_config(world, **changes)
  section = common.snapshots(steps=3) | dict(max_images=32, images=5)
  config.evals = dict(snapshots=section)
  return config


@pytest.fixture(scope="module")
def run(world, programs, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  programs.train(config_with_snapshots(world), str(workdir))
  return workdir


def test_the_rank_is_the_exponential_of_the_entropy():
  assert effective_rank(np.eye(8)[:, :5]) == pytest.approx(5, rel=1e-4)
  assert effective_rank(np.outer(np.arange(1, 9), [1.0, 2.0])) == pytest.approx(1, rel=1e-4)
  share = np.array([0.5, 0.25, 0.25])
  expected = np.prod(share**-share)
  assert effective_rank(np.diag([4.0, 2.0, 2.0])) == pytest.approx(expected, rel=1e-4)
  assert effective_rank(np.zeros((3, 3))) == 0


def test_the_agreement_of_partitions():
  assert adjusted_rand_index(np.array([0, 0, 1, 1]), np.array([7, 7, 2, 2])) == 1
  assert adjusted_rand_index(np.zeros(4, int), np.zeros(4, int)) == 1
  # 1 of 6 pairs together in the first, 2 in the second, 1 in both: (1 - 2/6) / (1.5 - 2/6)
  assert adjusted_rand_index(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1])) == pytest.approx(4 / 7)
  rng = np.random.default_rng(0)
  chance = [adjusted_rand_index(*rng.integers(0, 5, (2, 64))) for _ in range(200)]
  assert abs(np.mean(chance)) < 0.01


@pytest.mark.slow
def test_a_run_records_the_same_images_at_every_time(run):
  lines = {line["step"]: line for line in small_world.metrics(run)}
  found = snapshots.read(epath.Path(run))
  assert sorted(found.groups) == [0, 3, 6]
  assert found.image.shape == (5, 32, 32, 3)
  assert len({*found.index_B.tolist()}) == 5
  assert np.all(found.label_B == found.index_B % 10)  # as `small_world` labels them
  for step, groups in found.groups.items():
    assert {*groups} == {"student_patches", "teacher_tokens"}
    for label_BN in groups.values():
      assert [len(np.unique(label_N)) for label_N in label_BN] == [16] * 5  # a quarter of 64 tokens
    np.testing.assert_array_equal(groups["teacher_tokens"], found.groups[0]["teacher_tokens"])
    assert 1 <= lines[step]["snapshots/student_patches_rank"] <= 32
    assert -1 <= lines[step]["snapshots/student_patches_cosine"] <= 1
    agreement = [
      adjusted_rand_index(*pair)
      for pair in zip(groups["student_patches"], groups["teacher_tokens"], strict=True)
    ]
    assert lines[step]["snapshots/teacher_tokens_agreement"] == pytest.approx(np.mean(agreement), rel=1e-4)
  assert lines[6]["snapshots/student_patches_cosine"] != lines[0]["snapshots/student_patches_cosine"]
  assert lines[6]["snapshots/teacher_tokens_rank"] == lines[0]["snapshots/teacher_tokens_rank"]


@pytest.mark.slow
def test_snapshots_change_no_loss_and_a_resumed_run_continues_them(
  world, programs, run, tmp_path, monkeypatch
):
  config = config_with_snapshots(world)
  with monkeypatch.context() as stopped:
    stopped.setattr(Checkpoints, "reached_preemption", lambda self, step: step == 3)
    programs.run(config, str(tmp_path))
  programs.train(config, str(tmp_path))
  assert small_world.losses(tmp_path) == small_world.losses(run)
  resumed, whole = (snapshots.read(epath.Path(folder)) for folder in (tmp_path, run))
  assert sorted(resumed.groups) == [0, 3, 6]
  for step, groups in whole.groups.items():
    for name, label_BN in groups.items():
      np.testing.assert_array_equal(resumed.groups[step][name], label_BN)
  config = small_world.debug_config(world, evals={})
  programs.train(config, str(tmp_path / "without"))
  assert small_world.losses(tmp_path / "without") == small_world.losses(run)


def test_more_recorded_images_than_measured_ones_are_refused(world):
  config = config_with_snapshots(world)
  config.evals.snapshots.images = 64
  with pytest.raises(OptionError, match="images=64 must be at most max_images=32"):
    loop.train(config, "unused")


def test_damaged_files_and_other_images_are_left_out(tmp_path, caplog):
  assert snapshots.read(epath.Path(tmp_path)) is None
  folder = epath.Path(tmp_path)
  image, index, label = np.zeros((2, 8, 8, 3), np.uint8), np.array([3, 4]), np.array([0, -1])
  snapshots.write_images(folder, image, index, label)
  groups = {"student_patches": np.array([[0, 0, 2, 3]] * 2)}
  snapshots.write_groups(folder, 0, np.array([3, 5]), groups)
  snapshots.write_groups(folder, 100, index, groups)
  (tmp_path / "snapshots" / "step_00000200.npz").write_bytes(b"PK\x03\x04 cut off")
  found = snapshots.read(folder)
  assert [*found.groups] == [100]
  assert found.unreadable == ("step_00000200.npz",)
  assert "step_00000200.npz" in caplog.text
  (tmp_path / "snapshots" / "images.npz").write_bytes(b"")
  assert snapshots.read(folder) is None
