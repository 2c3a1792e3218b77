"""Mistakes of users: every message names the file or the run, and both values."""

import importlib

import jax
import numpy as np
import pytest
import small_world
from PIL import Image

from dtm_jax import loop
from dtm_jax.errors import UserError
from dtm_jax.evaluators import Context, best_head, classification, knn, zeroshot
from dtm_jax.tasks import Run, finetune, frozen, linear_probe
from dtm_jax.training import mesh as meshes

NAMES = tuple("abcdefghij")


@pytest.fixture
def world(tmp_path):
  small_world.write_cifar10(tmp_path)
  return tmp_path


def tiny_config(name, folder, data_set="cifar10"):
  config = importlib.import_module(f"configs.{name}").get_config()
  config.data.dataset.name, config.data.dataset.data_dir = data_set, str(folder)
  if "model" in config:
    config.model.update(width=24, depth=1, num_heads=2)
    config.init_from.path = ""
  config.batch_size, config.total_steps = 8, 0
  return config


def picture(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)


EVALUATORS = {
  "classification": (classification, {"logits": None}, {}),
  "best_head": (best_head, {"logits": None, "rates": None}, {"held_out": "train"}),
  "knn": (knn, {"student": None}, {"k": 1}),
  "zeroshot": (zeroshot, {"image": None, "text": None}, {"prompts": "plain"}),
}


def evaluator(name, dataset, num_scores=10):
  module, predict, options = EVALUATORS[name]
  shape = (3, num_scores) if name == "best_head" else (num_scores,)
  predict = {key: lambda state, batch: np.zeros((len(next(iter(batch.values()))), *shape)) for key in predict}
  predict |= {"rates": lambda state, batch: np.ones(3)} if "rates" in predict else {}
  tokenize = lambda captions: np.zeros((len(captions), 1), np.int32)
  mesh = meshes.make_mesh(8, 1)
  context = Context(predict, mesh, tokenize=tokenize)
  return module.Evaluator(context, dataset=dataset, image_size=32, batch_size=16, **options)


@pytest.mark.parametrize("name", EVALUATORS)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_labels_out_of_range(world, name):
  path = world / "cifar10" / "arrays" / "test_labels.npy"
  labels = np.load(path)
  labels[7] = 12
  np.save(path, labels)
  ready = evaluator(name, {"name": "cifar10", "data_dir": str(world)})
  with pytest.raises(ValueError, match=r"Example 7 of data set 'cifar10' has label 12, .* 10 classes"):
    dict(ready.run({}))


@pytest.mark.parametrize("name", EVALUATORS)
def test_missing_class_names(tmp_path, name):
  for split in ("train", "test"):
    picture(tmp_path / split / "1.png")
  with pytest.raises(ValueError, match=rf"{tmp_path}/(train|test)' has n.*"):
    dict(evaluator(name, {"name": "folder", "data_dir": str(tmp_path)}).run({}))


@pytest.mark.parametrize("name", EVALUATORS)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_split_of_corrupt_images(tmp_path, name):
  for label in NAMES:
    picture(tmp_path / "train" / label / "1.png")
    corrupt = tmp_path / "test" / label / "1.png"
    corrupt.parent.mkdir(parents=True)
    corrupt.write_bytes(b"no picture")
  with pytest.raises(ValueError, match=rf"All images of data set '{tmp_path}/test' are corrupt: 0 of 10"):
    dict(evaluator(name, {"name": "folder", "data_dir": str(tmp_path)}).run({}))


@pytest.mark.parametrize("name", ["classification", "best_head"])
def test_a_classifier_of_other_classes(world, name):
  with pytest.raises(ValueError, match=r"classifier has 7 classes, data set 'cifar10' has 10"):
    dict(evaluator(name, {"name": "cifar10", "data_dir": str(world)}, num_scores=7).run({}))


@pytest.mark.parametrize(
  ("name", "task"), [("finetune_cifar10", finetune), ("linear_probe_cifar10", linear_probe)]
)
def test_training_without_class_names(tmp_path, name, task):
  config = tiny_config(name, tmp_path, "folder")
  with pytest.raises(ValueError, match=rf"'folder' has no class names in {tmp_path}"):
    task.build(config, Run(0, 1.0, 8, None))


def test_an_empty_folder(tmp_path):
  (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
  config = tiny_config("finetune_cifar10", tmp_path / "images", "folder")
  with pytest.raises(ValueError, match=rf"No images in {tmp_path}/images/train.*\.jpg"):
    loop.train(config, str(tmp_path / "run"))
  picture(tmp_path / "images" / "train" / "cat" / "1.png")
  (tmp_path / "images" / "val").mkdir()
  with pytest.raises(ValueError, match=rf"No images in {tmp_path}/images/val"):
    loop.train(config, str(tmp_path / "run"))
  config.data.dataset.data_dir = None
  with pytest.raises(ValueError, match="'folder' needs data_dir"):
    loop.train(config, str(tmp_path / "run"))


def test_a_checkpoint_of_another_shape(world, monkeypatch):
  """A checkpoint in the run's workdir, and one in init_from.path. The first run only counts its steps."""
  monkeypatch.setattr(finetune.Finetuning, "train_step", small_world.counting_step())
  config = tiny_config("finetune_cifar10", world)
  config.total_steps, config.optim.warmup_steps, config.evals = 1, 0, {}
  loop.train(config, str(world / "run"))
  config.model.width = 32
  with pytest.raises(UserError, match=r"--config.model.width: 24 -> 32"):
    loop.train(config, str(world / "run"))
  config.resume = "force"
  with pytest.raises(
    ValueError, match=rf"{world}/run/checkpoints/1 .*\n.*saved .*24.*, the config wants .*32"
  ):
    loop.train(config, str(world / "run"))
  config.init_from.path = str(world / "run")
  with pytest.raises(ValueError, match=rf"init_from.path={world}/run: (.|\n)*\(24,\).* wants \(32,\)"):
    loop.train(config, str(world / "other"))


def test_frozen_features_of_another_size_or_with_steps(tmp_path):
  small_world.write_clip(tmp_path / "clip")
  config = tiny_config("knn_cifar10", tmp_path)
  config.teacher = dict(name="clip", path=str(tmp_path / "clip"))
  with pytest.raises(ValueError, match=rf"clip {tmp_path}/clip is frozen .*0, not 3"):
    frozen.build(config, Run(3, 1.0, 8, NAMES))
  config.data.image_size = 64  # the teacher's positions are resized
  task = frozen.build(config, Run(0, 1.0, 8, NAMES))
  image = np.zeros((2, 64, 64, 3), np.uint8)
  assert jax.eval_shape(task.outputs["tokens"], {}, task.frozen, {"image": image}).shape[1] == 16 * 16
  config.teacher.image_size = 32  # or it sees the images at this size
  task = frozen.build(config, Run(0, 1.0, 8, NAMES))
  assert jax.eval_shape(task.outputs["tokens"], {}, task.frozen, {"image": image}).shape[1] == 8 * 8
