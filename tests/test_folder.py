"""Folders as people have them: splits with many names, numbered classes, companion files, and links."""

import errno
import logging as std_logging
import os
import pathlib
import threading
import unicodedata

import numpy as np
import pytest
from PIL import Image

from dtm_jax import data, datasets
from dtm_jax.data import image_decoding
from dtm_jax.datasets import _class_names, _image_files, _splits, folder, segmentation_folder
from dtm_jax.errors import NotThereError, OptionError, UserError


def write(root: pathlib.Path, *names: str, content: bytes = b"\xff\xd8") -> pathlib.Path:
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return root


def opened(root, split="train", **options):
  """Return the class names of a split, and the class name of every file."""
  dataset = folder.build(split, data_dir=str(root), **options)
  examples = [dataset.source[i] for i in range(dataset.num_examples)]
  name_of = lambda label: dataset.class_names[label] if label >= 0 else None
  return dataset.class_names, {os.path.relpath(x["name"], root): name_of(x["label"]) for x in examples}


@pytest.fixture
def lines(caplog):
  """Return a function that returns the lines that opening a data set has logged."""
  caplog.set_level(std_logging.INFO)
  return lambda: [record.getMessage() for record in caplog.records if "ata set" in record.getMessage()]


class TestSplits:
  @pytest.mark.parametrize(
    ("name", "kind"),
    [
      ("Train", "train"), ("training", "train"), ("TRAIN_SET", "train"), ("train images", "train"),
      ("valid", "val"), ("Validation", "val"), ("dev", "val"), ("Test", "test"), ("testing_data", "test"),
      ("evaluation", "eval"), ("trainer", None), ("valley", None), ("dataset", None), ("dog", None),
    ],
  )  # fmt: skip
  def test_names_of_splits(self, name, kind):
    assert _splits.kind_of(name) == kind

  @pytest.mark.parametrize(
    ("train", "val"), [("Train", "valid"), ("training", "Validation"), ("TRAIN", "dev"), ("train_set", "val")]
  )
  def test_folders_of_splits_have_many_names_and_are_not_classes(self, tmp_path, train, val):
    write(tmp_path, *(f"{split}/{name}/1.jpg" for split in (train, val) for name in ("cat", "dog")))
    for split, found in (
      ("train", train),
      ("training", train),
      ("val", val),
      ("validation", val),
      (val, val),
    ):
      assert opened(tmp_path, split) == (
        ("cat", "dog"),
        {f"{found}/cat/1.jpg": "cat", f"{found}/dog/1.jpg": "dog"},
      )
    assert datasets.evaluation_split({"name": "folder", "data_dir": str(tmp_path)}) == val
    with pytest.raises(OptionError, match=rf"No split 'test' in {tmp_path}. Available: {train}, {val}"):
      folder.build("test", data_dir=str(tmp_path))

  def test_two_folders_of_one_kind_need_the_exact_name(self, tmp_path, lines):
    write(tmp_path, "train/cat/1.jpg", "valid/cat/1.jpg", "validation/cat/1.jpg")
    with pytest.raises(OptionError, match=rf"'val' of {tmp_path} may be valid or validation"):
      folder.build("val", data_dir=str(tmp_path))
    with pytest.raises(OptionError, match="valid or validation"):
      datasets.evaluation_split({"name": "folder", "data_dir": str(tmp_path)})
    assert opened(tmp_path, "valid")[1] == {"valid/cat/1.jpg": "cat"}
    assert "1 folder (validation) beside the splits not read" in lines()[-1]

  def test_a_class_may_have_the_name_of_a_split(self, tmp_path, caplog):
    write(tmp_path / "a", *(f"{name}/{i}.jpg" for name in ("bus", "car", "train") for i in range(3)))
    names, found = opened(tmp_path / "a")
    assert (names, len(found)) == (("bus", "car", "train"), 9)
    assert "train is read as a class like bus, car" in caplog.text
    write(
      tmp_path / "b", *(f"{split}/{name}/1.jpg" for split in ("train", "val") for name in ("bus", "train"))
    )
    assert opened(tmp_path / "b")[0] == ("bus", "train")

  def test_a_split_of_unlabelled_photos_beside_label_maps_stays_a_split(self, tmp_path):
    write(tmp_path, "train/1.jpg", "labels/1.png")
    assert opened(tmp_path) == (None, {"train/1.jpg": None})

  def test_the_log_names_what_lies_beside_the_splits(self, tmp_path, lines):
    write(
      tmp_path, "train/a/1.jpg", "test/a/1.jpg", "extra/b/1.jpg", "__MACOSX/train/1.jpg", "1.jpg", "2.png"
    )
    assert opened(tmp_path)[0] == ("a",)
    (line,) = lines()
    assert "2 folders (__MACOSX, extra) beside the splits not read" in line
    assert f"2 images directly in {tmp_path} not read" in line

  @pytest.mark.parametrize("name", ["tiny-imagenet-200/{}/a", "a/{}"])
  def test_splits_one_level_further_down_are_refused(self, tmp_path, name):
    write(tmp_path, *(f"{name.format(split)}/1.jpg" for split in ("train", "test")))
    with pytest.raises(OptionError, match=r"no folders of splits, but .*/ in it has: test, train. Give .*"):
      folder.build("train", data_dir=str(tmp_path))

  def test_the_splits_of_a_segmentation_folder_have_many_names(self, tmp_path):
    write(tmp_path, "images/validation/1.jpg", "annotations/validation/1.png", "images/validation/._1.jpg")
    write(tmp_path, "classes.txt", content=b"a\nb\n")
    options = {"name": "segmentation_folder", "data_dir": str(tmp_path)}
    assert datasets.evaluation_split(options) == "validation"
    assert segmentation_folder.build("val", data_dir=str(tmp_path)).num_examples == 1


class TestClasses:
  def test_numbers_are_sorted_as_numbers(self, tmp_path):
    write(tmp_path, *(f"{number}/1.jpg" for number in range(5, 15)))
    assert opened(tmp_path)[0] == tuple(str(number) for number in range(5, 15))
    write(tmp_path / "padded", *(f"train/{number:03d}/1.jpg" for number in range(5, 15)))
    assert opened(tmp_path / "padded")[0] == tuple(f"{number:03d}" for number in range(5, 15))

  def test_class_names_sort_as_in_timm(self):
    """timm's natural_key treats runs of digits as numbers, and the rest as text in lower case."""
    names = ["", "9a", "10", "A", "b", "class2", "Class3", "class10", "n01440764", "n01443537", "x-1"]
    assert sorted(names[::-1], key=_class_names.natural_order) == names

  def test_class_names_have_one_normal_form_in_all_splits(self, tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write(tmp_path, f"train/{composed}/1.jpg", "train/tea/1.jpg", f"val/{decomposed}/1.jpg")
    write(tmp_path, f"train/{decomposed}/2.jpg")
    assert opened(tmp_path)[0] == (composed, "tea")
    assert set(opened(tmp_path)[1].values()) == {composed, "tea"}
    assert opened(tmp_path, "val") == ((composed, "tea"), {f"val/{decomposed}/1.jpg": composed})

  def test_classes_that_differ_only_in_case_are_refused(self, tmp_path):
    write(tmp_path, "train/Dog/1.jpg", "train/cat/1.jpg", "val/dog/1.jpg")
    with pytest.raises(OptionError, match=r"case: train/Dog, val/dog"):
      folder.build("train", data_dir=str(tmp_path))
    write(tmp_path / "letters", "train/A/1.jpg", "train/a/1.jpg", "val/a/1.jpg")  # A and a are two classes
    assert opened(tmp_path / "letters", "val")[0] == ("A", "a")

  def test_a_split_without_training_classes_keeps_its_own_names(self, tmp_path):
    write(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "test/images/1.jpg")
    assert opened(tmp_path)[0] == ("cat", "dog")
    assert opened(tmp_path, "test")[0] == ("images",)

  def test_tiny_imagenet_takes_its_classes_from_the_annotations(self, tmp_path):
    write(tmp_path, *(f"train/{name}/images/{name}_0.JPEG" for name in ("n02", "n01")))
    write(tmp_path, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG")
    rows = "val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n"
    write(tmp_path, "val/val_annotations.txt", content=rows.encode())
    assert opened(tmp_path)[0] == ("n01", "n02")
    assert opened(tmp_path, "val") == (
      ("n01", "n02"),
      {"val/images/val_0.JPEG": "n02", "val/images/val_1.JPEG": "n01"},
    )
    write(tmp_path, "val/images/val_2.JPEG")
    with pytest.raises(
      OptionError, match=r"val_annotations.txt does not give the class of 1 image \(.*val_2"
    ):
      folder.build("val", data_dir=str(tmp_path))

  def test_an_image_without_a_class_is_refused_before_training(self, tmp_path):
    write(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg")
    data.require_known_labels(folder.build("train", data_dir=str(tmp_path)))
    write(tmp_path, "train/1.jpg")
    with pytest.raises(
      OptionError, match=r"Example 0 of .* has label -1, .* 2 classes. It lies in no class fol"
    ):
      data.require_known_labels(folder.build("train", data_dir=str(tmp_path)))


class TestFiles:
  @pytest.mark.parametrize("kind", ["pgm", "ppm", "gif", "jfif", "JPE", "bmp", "tiff", "webp", "jp2", "avif"])
  def test_formats_of_pillow_are_read(self, tmp_path, kind):
    path = tmp_path / "train" / "a" / f"1.{kind}"
    path.parent.mkdir(parents=True)
    Image.new("L" if kind == "pgm" else "RGB", (8, 8), 77).save(path)
    dataset = folder.build("train", data_dir=str(tmp_path))
    assert image_decoding.decode(dataset.source[0]["image"]).shape == (8, 8, 3)

  def test_one_log_line_tells_what_was_left_out(self, tmp_path, lines):
    write(
      tmp_path, "train/a/1.jpg", "train/b/1.heic", "train/b/2.heic", "train/a/notes.txt", "train/a/README"
    )
    write(
      tmp_path, "train/a/._1.jpg", "train/a/Thumbs.db", "train/.git/1.jpg", "train/c/x.mp4", "train/2.jpg"
    )
    assert opened(tmp_path) == (("a",), {"train/2.jpg": None, "train/a/1.jpg": "a"})
    opened(tmp_path)
    assert lines() == [
      f"Data set {tmp_path}/train: 2 images in 1 class; 1 image in no class folder; 2 class folders (b, c) "
      "without an image that can be read; skipped 2 .heic, 1 .mp4, 1 .txt, 1 without an extension; "
      "3 hidden or companion files skipped."
    ]

  def test_companions_of_maps_and_images_are_skipped(self, tmp_path):
    write(tmp_path, "images/train/x.jpg", "images/train/._x.jpg", "annotations/train/x.png")
    write(tmp_path, "annotations/train/._y.png", "images/train/__MACOSX/z.jpg")
    assert segmentation_folder.build("train", data_dir=str(tmp_path), num_classes=2).num_examples == 1

  def test_an_error_on_an_empty_folder_names_the_other_files(self, tmp_path):
    write(tmp_path, "train/a/1.heic")
    with pytest.raises(
      OptionError, match=r"No images in .*train; skipped 1 \.heic\. The extensions read are"
    ):
      folder.build("train", data_dir=str(tmp_path))
    with pytest.raises(NotThereError, match="is a file, not a folder"):
      folder.build("train", data_dir=str(tmp_path / "train" / "a" / "1.heic"))


class TestLinks:
  def test_loops_are_not_followed(self, tmp_path, lines):
    write(tmp_path, "train/a/1.jpg", "train/b/1.jpg")
    (tmp_path / "train" / "a" / "up").symlink_to("..")
    (tmp_path / "train" / "a" / "root").symlink_to(tmp_path)
    (tmp_path / "train" / "b" / "other").symlink_to("../a")
    assert list(opened(tmp_path)[1]) == ["train/a/1.jpg", "train/b/1.jpg"]
    assert "3 links (" in lines()[-1]
    assert f"{tmp_path}/train/a/up" in lines()[-1]

  def test_links_that_lead_elsewhere_are_followed(self, tmp_path):
    write(tmp_path, "store/x/1.jpg", "store/x/deep/2.jpg")
    (tmp_path / "store" / "x" / "back").symlink_to("../x")
    (tmp_path / "d" / "train").mkdir(parents=True)
    for name in ("a", "b"):
      (tmp_path / "d" / "train" / name).symlink_to(tmp_path / "store" / "x")
    (tmp_path / "d" / "train" / "b2.jpg").symlink_to(tmp_path / "store" / "x" / "1.jpg")
    names, found = opened(tmp_path / "d")
    assert names == ("a", "b")
    assert list(found) == [
      f"train/{name}" for name in ("b2.jpg", "a/1.jpg", "a/deep/2.jpg", "b/1.jpg", "b/deep/2.jpg")
    ]

  def test_broken_links_are_named_and_left_out(self, tmp_path, lines):
    write(tmp_path, "train/a/1.jpg")
    for name, target in (("2.jpg", "nowhere.jpg"), ("3.jpg", "3.jpg"), ("4.jpg", "1.jpg/x")):
      (tmp_path / "train" / "a" / name).symlink_to(target)
    assert len(opened(tmp_path)[1]) == 1
    assert f"3 broken links ({tmp_path}/train/a/2.jpg, " in lines()[-1]

  def test_pipes_are_not_opened(self, tmp_path):
    write(tmp_path, "train/a/1.jpg")
    os.mkfifo(tmp_path / "train" / "a" / "2.jpg")
    assert len(opened(tmp_path)[1]) == 1


class TestReading:
  @pytest.fixture
  def photos(self, tmp_path):
    for i in range(8):
      path = tmp_path / "train" / "a" / f"{i}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new("RGB", (8, 8), (i, i, i)).save(path)
    return tmp_path

  def train(self, dataset, steps=3):
    others = threading.enumerate()  # among them may be threads of earlier tests that never end
    batches = data.train_batches(dataset, batch_size=8, image_size=8, seed=0, num_threads=2, crop="none")
    try:
      return np.concatenate([next(batches)["index"] for _ in range(steps)])
    finally:  # a thread that still reads would count its errors in the next test
      batches.close()
      for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch") and thread not in others:
          thread.join(timeout=60)

  def test_a_missing_file_is_named_once_and_counted_each_time(self, photos, caplog):
    dataset, before = folder.build("train", data_dir=str(photos)), data.corrupt_count()
    gone = photos / "train" / "a" / "5.png"
    gone.unlink()
    assert 5 not in self.train(dataset)
    assert data.corrupt_count() - before >= 3
    (line,) = [record.getMessage() for record in caplog.records if str(gone) in record.getMessage()]
    assert "Unreadable file" in line
    (batch,) = data.eval_batches(dataset, batch_size=8, image_size=8)
    assert batch["valid"].tolist() == [i != 5 for i in range(8)]

  def test_a_corrupt_file_is_named_once(self, photos, caplog):
    (photos / "train" / "a" / "5.png").write_bytes(b"no picture")
    dataset, before = folder.build("train", data_dir=str(photos)), data.corrupt_count()
    self.train(dataset)
    list(data.eval_batches(dataset, batch_size=8, image_size=8))
    assert data.corrupt_count() - before >= 4
    assert caplog.text.count("5.png") == 1

  @pytest.mark.parametrize(
    "number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EMFILE]
  )
  def test_reading_waits_until_a_temporary_error_passes(self, photos, monkeypatch, number):
    read, failures, waited = _image_files._read, iter(range(3)), []

    def sometimes(path):
      if next(failures, None) is not None:
        raise OSError(number, os.strerror(number), path)
      return read(path)

    monkeypatch.setattr(_image_files, "_read", sometimes)
    monkeypatch.setattr(_image_files.time, "sleep", waited.append)
    dataset, before = folder.build("train", data_dir=str(photos)), data.corrupt_count()
    assert sorted(self.train(dataset, 1)) == list(range(8))
    assert data.corrupt_count() == before
    assert len(waited) == 3

  def test_a_lasting_error_ends_the_run_and_is_named(self, photos, monkeypatch):
    def never(path):
      raise OSError(errno.EIO, "Input/output error", path)

    dataset = folder.build("train", data_dir=str(photos))
    monkeypatch.setattr(_image_files, "_read", never)
    monkeypatch.setattr(_image_files, "WAITS", (0,))
    with pytest.raises(UserError, match=r"An image and its 10 replacements .*Input/output error"):
      self.train(dataset)
    with pytest.raises(UserError, match=r"Example \d of data set .*Input/output error"):
      list(data.eval_batches(dataset, batch_size=8, image_size=8))

  def test_a_folder_without_permission_is_named(self, photos, monkeypatch):
    def forbidden(path):
      raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(_image_files, "_scan", forbidden)
    with pytest.raises(UserError, match=rf"No permission to read the folder {photos}: Permission denied"):
      folder.build("train", data_dir=str(photos))


class TestSubsets:
  def dataset(self, labels):
    examples = [{"image": b"", "label": label, "name": str(i)} for i, label in enumerate(labels)]
    return data.Dataset("set", len(labels), tuple("abcdefghij"), examples, labels=np.array(labels))

  def first(self, dataset, count):
    part = datasets.spread(dataset, count)
    return [part.source[i]["label"] for i in range(count)]

  def test_examples_of_a_sorted_data_set_are_spread_over_its_classes(self):
    dataset = self.dataset([0] * 40 + [1] * 40 + [2] * 40 + [3] * 40)
    assert np.bincount(self.first(dataset, 64)).tolist() == [16] * 4
    assert datasets.spread(dataset, 64).labels.tolist() == self.first(dataset, 64)
    assert np.bincount(self.first(dataset, 130)).tolist() == [33, 32, 33, 32]

  def test_a_rare_class_is_included_and_classes_may_outnumber_examples(self):
    assert set(self.first(self.dataset([0] * 90 + [1] * 10), 50)) == {0, 1}
    assert self.first(self.dataset(sorted([*range(10)] * 10)), 5) == [0, 2, 4, 6, 8]

  def test_a_shuffled_data_set_keeps_its_first_examples(self):
    labels = np.random.default_rng(0).integers(0, 10, 3000).tolist()
    dataset = self.dataset(labels)
    assert datasets.spread(dataset, 1000) is dataset
    assert datasets.spread(dataset, None) is datasets.spread(dataset, 3000) is dataset

  def test_examples_with_unknown_labels_are_spread_evenly(self):
    dataset = data.Dataset("set", 10, None, [{"label": i} for i in range(10)])
    assert self.first(dataset, 4) == [0, 2, 5, 7]
