"""Every evaluation on 1 device, on 8 and in 2 processes: the same numbers to the last digit.

The test set has 37 images, which no batch and no number of devices divides, and one of them is corrupt.
This file is also the program that the processes run: `python tests/test_evaluation_counts.py WORLD WORKDIR`.
"""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import portpicker
import pytest
import small_world
from PIL import Image

from dtm_jax.datasets.cifar10 import CLASS_NAMES
from dtm_jax.training import startup

ROOT = Path(__file__).parents[1]
NUM_CLASSES, NUM_TRAIN, NUM_TEST = 4, 48, 37


def write_world(folder):
  """A folder of PNGs in four of CIFAR-10's classes, and a small CLIP without a text tower."""
  rng = np.random.default_rng(0)
  for split, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
    for number in range(count):
      path = folder / "images" / split / CLASS_NAMES[number % NUM_CLASSES] / f"{number:02d}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
      pixels[..., number % 3] //= 2
      Image.fromarray(pixels).save(path)
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
  small_world.write_clip(folder / "clip")
  return folder


def configs(world):
  """By name: zero-shot, classification with kNN, and a trained probe; each by zero further steps."""
  result = {}
  for name in ("zeroshot_cifar10", "finetune_cifar10", "linear_probe_cifar10"):
    config = result[name] = importlib.import_module(f"configs.{name}").get_config()
    config.data.dataset.name, config.data.dataset.data_dir = "folder", str(world / "images")
    config.batch_size, config.total_steps = 16, 0
    config.log.log_steps = 10
    for evaluation in config.evals.values():
      evaluation.batch_size = 16
  finetune, probe = result["finetune_cifar10"], result["linear_probe_cifar10"]
  finetune.model.update(width=24, depth=1, num_heads=2, head_init_scale=1.0)
  finetune.init_from.path = ""
  knn = dict(finetune.evals.test, name="knn", features=("features",), k=(1, 5, 20))
  for option in ("outputs", "split", "crop_pct", "every_steps"):
    del knn[option]
  finetune.evals.knn = knn
  probe.teacher = dict(name="clip", path=str(world / "clip"))
  probe.total_steps = 4
  return result


def evaluate(world, workdir):
  """What each process does, as the command would."""
  startup.hide_accelerators_from_tensorflow()
  startup.start_distributed()
  from dtm_jax import loop

  for name, config in configs(world).items():
    loop.train(config, str(workdir / name))


@pytest.mark.slow
def test_every_example_counts_once_whatever_the_devices_and_processes(tmp_path):
  from small_world import environment

  from dtm_jax import loop

  world, port = write_world(tmp_path), portpicker.pick_unused_port()
  loop.train(configs(world)["linear_probe_cifar10"], str(tmp_path / "trained"))
  alone = {"1": environment(1), "8": environment(8)}
  pair = {
    f"2x4/{index}": environment(
      4, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index)
    )
    for index in range(2)
  }
  for name in ("1", "8", "2x4"):
    shutil.copytree(
      tmp_path / "trained" / "checkpoints", tmp_path / name / "linear_probe_cifar10" / "checkpoints"
    )
  runs = [
    subprocess.Popen(
      [sys.executable, __file__, str(world), str(tmp_path / name.split("/")[0])],
      cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    for name, env in (alone | pair).items()
  ]  # fmt: skip
  outputs = [run.communicate(timeout=600)[0].decode() for run in runs]
  assert [run.returncode for run in runs] == [0] * len(runs), "\n".join(out[-2000:] for out in outputs)
  numbers = {}
  for task in configs(world):
    one, eight, two = (small_world.metrics(tmp_path / name / task)[-1] for name in ("1", "8", "2x4"))
    for loss in ("test/logits_loss", "test/logits_ema_loss"):  # the only sums that are no counts
      values = [line.pop(loss, 0.0) for line in (one, eight, two)]
      np.testing.assert_allclose(values[1:], values[0], rtol=1e-5)
    assert one == eight == two
    numbers |= one
  counted = {
    "zeroshot/accuracy", "zeroshot/top5", "test/logits_top1", "test/logits_ema_top1", "test/accuracy",
    "knn/features_accuracy_k1", "knn/features_accuracy_k5", "knn/features_accuracy_k20",
  }  # fmt: skip
  assert counted < numbers.keys()
  for name in counted:  # of 36 images; metrics.jsonl has six decimals
    assert (NUM_TEST - 1) * numbers[name] == pytest.approx(round((NUM_TEST - 1) * numbers[name]), abs=1e-4)


if __name__ == "__main__":
  evaluate(Path(sys.argv[1]), Path(sys.argv[2]))
