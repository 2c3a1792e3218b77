"""Every evaluation gives the same numbers on 1 device, on 8, and in 2 processes of 4 devices each.

The test set has 37 images, which no batch and no number of devices divides. One of them is corrupt.

This process evaluates on 1 and on 8 devices itself. The two processes are forked from one that has the
imports. Each evaluates all configs in turn, so that JAX starts only once.
"""

import contextlib
import importlib
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import small_world
from PIL import Image

from dtm_jax import data, loop
from dtm_jax.datasets import shapes
from dtm_jax.datasets.cifar10 import CLASS_NAMES
from dtm_jax.training import mesh as meshes
from dtm_jax.training import startup
from tests.campaign import runs

pytestmark = pytest.mark.slow
NUM_CLASSES, NUM_TRAIN, NUM_TEST, NUM_MAPS = 4, 48, 37, 9


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
  for name, config in configs(world).items():
    loop.train(config, str(workdir / name))


def evaluate_forked(arguments):
  """Start JAX as the command would, and run all configs."""
  startup.hide_accelerators_from_tensorflow()
  startup.start_distributed()
  evaluate(*map(Path, arguments))


def measured(folder):
  """Return the lines of metrics.jsonl by config."""
  return {path.parent.name: small_world.metrics(path.parent) for path in folder.glob("*/metrics.jsonl")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Return a function that makes a workdir of the world, in which the probe is trained."""
  world = tmp_path_factory.mktemp("world")
  write_world(world)
  with on_one_device():
    loop.train(configs(world)["linear_probe_cifar10"], str(world / "trained"))

  def make(name):
    shutil.copytree(world / "trained/checkpoints", world / name / "linear_probe_cifar10/checkpoints")
    return world, world / name

  return make


@contextlib.contextmanager
def on_one_device():
  alone = meshes.make_mesh(devices=jax.devices()[:1])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(meshes, "make_mesh", lambda *sizes: alone)
    yield


@pytest.fixture(scope="module")
def one(place):
  """The lines of metrics.jsonl by config, on one device."""
  world, workdir = place("1")
  with on_one_device():
    evaluate(world, workdir)
  return measured(workdir)


# The two processes have eight devices too.
@pytest.fixture(scope="module", params=["2x4", pytest.param("8", marks=pytest.mark.long)])
def many(request, place):
  """The same on eight devices."""
  world, workdir = place(request.param)
  if request.param == "8":
    evaluate(world, workdir)
    return measured(workdir)
  started = [
    runs.Process([str(world), str(workdir)], world / f"{index}.log", env=env, run=evaluate_forked)
    for index, env in enumerate(small_world.cluster(4))
  ]
  codes = [process.wait(timeout=600) for process in started]
  assert codes == [0, 0], "\n".join(process.text()[-2000:] for process in started)
  return measured(workdir)


def test_every_image_counts_once_on_any_number_of_devices_and_processes(one, many):
  numbers = {}
  for task in ("zeroshot_cifar10", "finetune_cifar10", "linear_probe_cifar10"):
    alone, together = dict(one[task][-1]), dict(many[task][-1])
    for loss in ("test/logits_loss", "test/logits_ema_loss"):  # the only sums that are not counts
      np.testing.assert_allclose(together.pop(loss, 0.0), alone.pop(loss, 0.0), rtol=1e-5)
    assert alone == together
    numbers |= alone
  counted = {
    "zeroshot/accuracy", "zeroshot/top5", "test/logits_top1", "test/logits_ema_top1", "test/accuracy",
    "knn/features_accuracy_k1", "knn/features_accuracy_k5", "knn/features_accuracy_k20",
  }  # fmt: skip
  assert counted < numbers.keys()
  for name in counted:  # of 36 images; metrics.jsonl has six decimals
    assert (NUM_TEST - 1) * numbers[name] == pytest.approx(round((NUM_TEST - 1) * numbers[name]), abs=1e-4)


def test_every_labelled_pixel_counts_once_on_any_number_of_devices_and_processes(one, many):
  assert one["seg_debug"] == many["seg_debug"]
  dataset = shapes.build("val", num_examples=NUM_MAPS)
  labelled = sum(label_map.size for _, label_map in data.whole_examples(dataset))
  accuracy = one["seg_debug"][0]["val/pixel_accuracy"]  # metrics.jsonl has six digits; a pixel is worth more
  assert labelled < 100_000
  assert round(round(accuracy * labelled) / labelled, 6) == accuracy
