"""Every evaluation gives the same numbers on 1 device, on 8, and in 2 processes of 4 devices each.

The test set has 37 images, which no batch and no number of devices divides. One of them is corrupt.

This process has 8 devices and evaluates itself. The processes with 1 and with 4 devices are forked from one
that has the imports. Each evaluates all configs in turn, so that JAX starts only once.
"""

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_world
from PIL import Image

from dtm_jax import data
from dtm_jax.datasets import shapes
from dtm_jax.datasets.cifar10 import CLASS_NAMES
from dtm_jax.training import startup
from tests.campaign import runs

pytestmark = pytest.mark.slow
NUM_CLASSES, NUM_TRAIN, NUM_TEST, NUM_MAPS = 4, 48, 37, 9
PLACES = ("1", "8", "2x4")


def write_world(folder):
  """Write PNGs in four of CIFAR-10's classes, and a small CLIP without a text tower."""
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


def configs(world):
  """Return the configs by name: zero-shot, classification with kNN, a trained probe, and segmentation.

  None of them has training steps left.
  """
  names = ("zeroshot_cifar10", "finetune_cifar10", "linear_probe_cifar10", "seg_debug")
  result = {name: importlib.import_module(f"configs.{name}").get_config() for name in names}
  segmentation = result["seg_debug"]
  for config in result.values():
    config.total_steps = 0
    if config is not segmentation:
      config.data.dataset.name, config.data.dataset.data_dir = "folder", str(world / "images")
      config.batch_size, config.log.log_steps = 16, 10
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
  segmentation.data.image_size = 32
  segmentation.model.update(patch_size=4, width=32, depth=2, head="linear")
  segmentation.evals.val.dataset.num_examples = NUM_MAPS
  segmentation.evals.val.update(image_size=32, crop=32, stride=13)
  return result


def evaluate(world, workdir):
  """Run all configs, as the command would."""
  from dtm_jax import loop

  for name, config in configs(world).items():
    loop.train(config, str(workdir / name))


def evaluate_forked(arguments):
  """Start JAX as the command would, and run all configs."""
  startup.hide_accelerators_from_tensorflow()
  startup.start_distributed()
  evaluate(*map(Path, arguments))


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
  """The lines of metrics.jsonl, by place and config."""
  from dtm_jax import loop

  folder = tmp_path_factory.mktemp("world")
  write_world(folder)
  loop.train(configs(folder)["linear_probe_cifar10"], str(folder / "trained"))
  for place in PLACES:
    shutil.copytree(
      folder / "trained" / "checkpoints", folder / place / "linear_probe_cifar10" / "checkpoints"
    )
  environments = [("1", small_world.environment(1)), *(("2x4", env) for env in small_world.cluster(4))]
  started = [
    runs.Process([str(folder), str(folder / place)], folder / f"{index}.log", env=env, run=evaluate_forked)
    for index, (place, env) in enumerate(environments)
  ]
  evaluate(folder, folder / "8")
  codes = [process.wait(timeout=600) for process in started]
  assert codes == [0] * len(started), "\n".join(process.text()[-2000:] for process in started)
  return {
    place: {name: small_world.metrics(folder / place / name) for name in configs(folder)} for place in PLACES
  }


def test_every_image_counts_once_on_any_number_of_devices_and_processes(lines):
  numbers = {}
  for task in ("zeroshot_cifar10", "finetune_cifar10", "linear_probe_cifar10"):
    one, eight, two = (dict(lines[place][task][-1]) for place in PLACES)
    for loss in ("test/logits_loss", "test/logits_ema_loss"):  # the only sums that are not counts
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


def test_every_labelled_pixel_counts_once_on_any_number_of_devices_and_processes(lines):
  one, eight, two = (lines[place]["seg_debug"] for place in PLACES)
  assert one == eight == two
  dataset = shapes.build("val", num_examples=NUM_MAPS)
  labelled = sum(label_map.size for _, label_map in data.whole_examples(dataset))
  accuracy = one[0]["val/pixel_accuracy"]  # metrics.jsonl has six digits; a pixel is worth more
  assert labelled < 100_000
  assert round(round(accuracy * labelled) / labelled, 6) == accuracy
