"""Settings taken from a labelled data set: classes, evaluation split, image size and colour statistics."""

import importlib
import json

import numpy as np
import pytest
import small_world
import tensorflow_datasets
from PIL import Image

from dtm_jax import data, datasets, loop, plugins
from dtm_jax.data import settings as dataset_settings
from dtm_jax.datasets import folder, tfds
from dtm_jax.normalizations import NORMALIZATIONS, mean_and_std

COLOURS = {"blue": (20, 40, 200), "green": (30, 180, 60), "red": (210, 30, 10)}


def write_folder(root, **counts):
  """Write <root>/<split>/<class>/<number>.png: `counts` noisy squares of 20 pixels in each class."""
  rng = np.random.default_rng(0)
  for split, count in counts.items():
    for name, colour in COLOURS.items():
      (root / split / name).mkdir(parents=True)
      for number in range(count):
        pixels = np.clip(colour + rng.normal(0, 20, (20, 20, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / split / name / f"{number}.png")
  return root


class TinySquares(tensorflow_datasets.core.GeneratorBasedBuilder):
  """Squares of 16 pixels in three classes, with a train and a test split."""

  VERSION = tensorflow_datasets.core.Version("1.0.0")

  def _info(self):
    features = {
      "image": tensorflow_datasets.features.Image(shape=(16, 16, 3), encoding_format="png"),
      "label": tensorflow_datasets.features.ClassLabel(names=sorted(COLOURS)),
    }
    features = tensorflow_datasets.features.FeaturesDict(features)
    return tensorflow_datasets.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(30), "test": self._generate_examples(13)}

  def _generate_examples(self, count):
    for i in range(count):
      colour = list(COLOURS.values())[i % 3]
      yield i, {"image": np.full((16, 16, 3), colour, np.uint8), "label": i % 3}


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def squares(request, tmp_path_factory):
  place = str(tmp_path_factory.mktemp(request.param))
  TinySquares(data_dir=place, file_format=request.param).download_and_prepare()
  return place


def transfer_config(name, data_dir):
  """Return configs/finetune_cifar10.py at toy size. Of the data section, only name and folder change."""
  config = importlib.import_module("configs.finetune_cifar10").get_config()
  config.lock()
  config.data.dataset.name, config.data.dataset.data_dir = name, str(data_dir)
  config.batch_size, config.total_steps = 8, 3
  config.model.update(width=24, depth=1, num_heads=2)
  config.init_from.path = ""
  config.optim.warmup_steps = 0
  config.log.log_steps = 1
  config.evals.test.outputs = ("logits",)
  return config


def test_a_folder_trains_by_its_name_alone(one_device, tmp_path):
  config = transfer_config("folder", write_folder(tmp_path / "squares", train=6, validation=5))
  config.augment.normalization = "dataset"
  state = loop.train(config, str(tmp_path / "run"))
  assert state["params"]["head"]["kernel"].shape == (24, 3)
  line = small_world.metrics(tmp_path / "run")[-1]
  assert (15 * line["test/top1"]) == pytest.approx(round(15 * line["test/top1"]), abs=1e-4)
  assert line["test/top5"] == 1.0
  written = json.loads((tmp_path / "run" / "config.json").read_text())
  assert written["evals"]["test"]["dataset"] == written["data"]["dataset"]
  mean, std = mean_and_std(written["augment"]["normalization"])  # as a teacher made of this run reads it
  np.testing.assert_allclose(mean, np.mean(list(COLOURS.values()), axis=0) / 255, atol=0.01)
  assert min(std) > 0.2


@pytest.mark.long  # a folder trains above, and the reading of TFDS is tested below
@pytest.mark.parametrize("squares", ["array_record"], indirect=True)
def test_a_tfds_set_trains_by_its_name_alone(squares, tmp_path):
  """The image size is that of the images, because the config leaves it open."""
  config = transfer_config("tfds/tiny_squares", squares)
  config.data.image_size = 0
  state = loop.train(config, str(tmp_path / "run"))
  assert state["params"]["head"]["kernel"].shape == (24, 3)
  written = json.loads((tmp_path / "run" / "config.json").read_text())
  assert written["data"]["image_size"] == written["evals"]["test"]["image_size"] == 16
  line = small_world.metrics(tmp_path / "run")[-1]
  assert (13 * line["test/top1"]) == pytest.approx(round(13 * line["test/top1"]), abs=1e-4)


@pytest.mark.parametrize(
  ("name", "section"),
  [
    ("finetune_vitb16_in1k", "val"),
    ("finetune_cifar10", "test"),
    ("linear_probe_vitb16_in1k", "test"),
    ("linear_probe_cifar10", "test"),
    ("knn_vitb16_in1k", "knn"),
    ("knn_cifar10", "knn"),
    ("zeroshot_cifar10", "zeroshot"),
    ("zeroshot_vitb16_in1k", "zeroshot"),
  ],
)
def test_evaluation_follows_the_training_set_unless_it_is_set(name, section):
  config = importlib.import_module(f"configs.{name}").get_config()
  config.lock()
  evaluation = config.evals[section]
  config.data.dataset.name, config.data.dataset.data_dir, config.data.image_size = "folder", "/here", 96
  assert evaluation.dataset.to_dict() == {"name": "folder", "data_dir": "/here"}
  assert evaluation.image_size == 96
  evaluation.dataset.data_dir = "/there"
  assert config.data.dataset.data_dir == "/here"
  written = json.loads(config.to_json_best_effort())
  assert written["evals"][section]["dataset"] == {"name": "folder", "data_dir": "/there"}
  assert config.copy_and_resolve_references().evals[section].dataset.name == "folder"


# Splits --------------------------------------------------------------------------------------------------


def test_the_first_existing_evaluation_split_is_used(tmp_path, squares):
  options = {"name": "folder", "data_dir": str(write_folder(tmp_path, train=1, test=1))}
  assert datasets.evaluation_split(options) == "test"
  write_folder(tmp_path, validation=1)
  assert datasets.evaluation_split(options) == "validation"
  assert datasets.evaluation_split({"name": "tfds/tiny_squares", "data_dir": squares}) == "test"
  assert datasets.evaluation_split({"name": "cifar10"}) == "test"
  assert datasets.evaluation_split({"name": "imagenet", "data_dir": None}) == "val"


def test_a_set_without_an_evaluation_split_is_refused(tmp_path):
  options = {"name": "folder", "data_dir": str(write_folder(tmp_path, train=1))}
  with pytest.raises(ValueError, match=r"'folder' has none of the splits val.* It has: train.*train\[90%:\]"):
    datasets.evaluation_split(options)
  with pytest.raises(ValueError, match="It has: no splits"):
    datasets.evaluation_split(options | {"data_dir": str(tmp_path / "train")})


def test_every_data_set_lists_its_splits():
  for name in plugins.available("datasets"):
    assert callable(plugins.load("datasets", name).splits)


# Size and colours -----------------------------------------------------------------------------------------


def test_colour_statistics_skip_corrupt_images(tmp_path):
  write_folder(tmp_path, train=4)
  dataset = folder.build("train", data_dir=str(tmp_path))
  pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(tmp_path.rglob("*.png"))]) / 255
  mean, std = dataset_settings.measure(dataset)
  np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), atol=6e-5)
  np.testing.assert_allclose(std, pixels.std((0, 1, 2)), atol=6e-5)
  (tmp_path / "train" / "red" / "broken.png").write_bytes(b"no image")
  assert dataset_settings.measure(folder.build("train", data_dir=str(tmp_path))) == (mean, std)


def test_a_sample_is_spread_over_the_classes(tmp_path):
  """Files are sorted by class, so three evenly spaced files have three classes."""
  dataset = folder.build("train", data_dir=str(write_folder(tmp_path, train=4)))
  mean, _ = dataset_settings.measure(dataset, sample=3)
  np.testing.assert_allclose(mean, np.mean(list(COLOURS.values()), axis=0) / 255, atol=0.02)


def test_a_tfds_set_is_measured_in_every_format(squares):
  dataset = tfds.build("train", variant="tiny_squares", data_dir=squares)
  assert dataset.image_size == 16
  assert isinstance(dataset.source, data.Stream) == ("tfrecord" in squares)
  mean, std = dataset_settings.measure(dataset)
  colours = np.array(list(COLOURS.values())) / 255
  np.testing.assert_allclose(mean, colours.mean(0), atol=6e-5)
  np.testing.assert_allclose(std, colours.std(0), atol=6e-5)


def test_a_set_with_many_image_sizes_has_no_image_size(tmp_path):
  dataset = folder.build("train", data_dir=str(write_folder(tmp_path, train=1)))
  config = transfer_config("folder", tmp_path)
  config.data.image_size = None
  with pytest.raises(ValueError, match=r"data.image_size=None .*train', and its images have several sizes"):
    dataset_settings.resolve(config, dataset)


def test_known_constants_are_used(tmp_path):
  small_world.write_cifar10(tmp_path)
  config = transfer_config("cifar10", tmp_path)
  config.data.image_size, config.augment.normalization = 0, "dataset"
  given, before = config, config.to_yaml()
  config = dataset_settings.resolve(given, plugins.build("datasets", given.data.dataset, split="train[:50%]"))
  assert given.to_yaml() == before  # nothing changes the caller's config
  assert config.data.image_size == config.evals.test.image_size == 32
  assert mean_and_std(config.augment.normalization)[0] == (0.4914, 0.4822, 0.4465)
  assert mean_and_std("imagenet") == NORMALIZATIONS["imagenet"]
  with pytest.raises(ValueError, match="known only once a run has started"):
    mean_and_std("dataset")
