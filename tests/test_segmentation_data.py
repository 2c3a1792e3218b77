"""Label maps from files to batches: what is read, what is refused, and the joint view of image and map."""

import io
import itertools

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tensorflow_tfds
from PIL import Image

from dtm_jax import data
from dtm_jax.data import label_maps
from dtm_jax.data.image_decoding import CorruptImageError
from dtm_jax.data.views import JointView, TrainView
from dtm_jax.datasets import ade20k, segmentation_folder, shapes, tfds

IGNORE = label_maps.IGNORE


def png(array, mode=None):
  file = io.BytesIO()
  image = Image.fromarray(array)
  if mode == "P":
    image.putpalette([int(x) for x in np.random.default_rng(0).integers(0, 256, 768)])
  image.save(file, "PNG")
  return file.getvalue()


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_pair(root, name, label_map, split="train", shape=None):
  """An image whose red is its map, times ten."""
  image = np.zeros((*(shape or label_map.shape), 3), np.uint8)
  if shape is None:
    image[..., 0] = 10 * label_map
  write(root / "images" / split / f"{name}.png", png(image))
  write(root / "annotations" / split / f"{name}.png", png(label_map))


@pytest.mark.parametrize("kind", ["L", "P", "uint16", "RGB", "array"])
def test_a_map_of_any_kind_is_its_integers(kind):
  raw = np.array([[0, 1, 2], [255, 2, 0]], np.uint8)
  stored = {
    "L": lambda: png(raw), "P": lambda: png(raw, "P"), "uint16": lambda: png(raw.astype(np.uint16)),
    "RGB": lambda: png(np.repeat(raw[..., None], 3, axis=2)), "array": lambda: raw.astype(np.uint16),
  }[kind]()  # fmt: skip
  np.testing.assert_array_equal(label_maps.MapCoding(3).decode(stored, "x"), raw)
  shifted = label_maps.MapCoding(2, zero_is_ignored=True).decode(stored, "x")
  np.testing.assert_array_equal(shifted, [[255, 0, 1], [255, 1, 255]])


def test_all_150_classes_of_ade20k_fit():
  raw = np.arange(151, dtype=np.uint8)[None]
  decoded = label_maps.MapCoding(150, zero_is_ignored=True).decode(raw, "x")
  assert decoded[0].tolist() == [IGNORE, *range(150)]


@pytest.mark.parametrize(
  ("coding", "value", "message"),
  [
    (
      label_maps.MapCoding(3),
      3,
      r"x\.png: label 3 at 2 pixels is not allowed\. .* 3 classes 0\.\.2, and 255",
    ),
    (label_maps.MapCoding(3), 300, "label 300 at 2 pixels"),
    (label_maps.MapCoding(3, True), 4, r"x\.png: label 4 at 2 pixels .* 3 classes 1\.\.3, and 0 or 255"),
  ],
)
def test_a_label_that_is_no_class_names_file_value_and_classes(coding, value, message):
  with pytest.raises(ValueError, match=message):
    coding.decode(np.array([[1, value, value]], np.uint16), "x.png")


def test_pictures_that_are_no_maps_are_refused():
  colored = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
  with pytest.raises(ValueError, match=r"x\.png: a picture of shape \(2, 4, 3\)"):
    label_maps.MapCoding(200).decode(png(colored), "x.png")
  noise = png(np.random.default_rng(0).integers(0, 3, (30, 30)).astype(np.uint8))
  for bad in (noise[: len(noise) // 2], b"", b"no picture"):
    with pytest.raises(CorruptImageError, match=r"x\.png"):
      label_maps.MapCoding(3).decode(bad, "x.png")
  with pytest.raises(ValueError, match="num_classes=300"):
    label_maps.MapCoding(300)


class TestFolder:
  @pytest.fixture
  def root(self, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("b", "deep/a", "c"):
      write_pair(tmp_path, name, rng.integers(0, 3, (20, 30)).astype(np.uint8))
    write(tmp_path / "classes.txt", "sky\nsea\n\nland\n")
    return tmp_path

  def test_pairs_by_path_and_classes_by_line(self, root):
    dataset = segmentation_folder.build("train", data_dir=str(root))
    assert dataset.class_names == ("sky", "sea", "land")
    assert dataset.maps == label_maps.MapCoding(3)
    assert [dataset.source[i]["name"].split("/train/")[1] for i in range(3)] == [
      "b.png",
      "c.png",
      "deep/a.png",
    ]
    for image, label_map in data.whole_examples(dataset, process_index=0, process_count=1):
      np.testing.assert_array_equal(image[..., 0], 10 * label_map)

  def test_parts_of_splits(self, root):
    parts = [segmentation_folder.build(f"train[{part}]", data_dir=str(root)) for part in (":1", "1:")]
    assert [part.num_examples for part in parts] == [1, 2]
    names = [part.source[i]["name"] for part in parts for i in range(part.num_examples)]
    assert len(set(names)) == 3
    assert parts[0].maps == label_maps.MapCoding(3)

  def test_whatever_has_no_partner_is_named_at_once(self, root):
    write(root / "images" / "train" / "lonely.jpg", b"")
    write(root / "annotations" / "train" / "deep" / "odd.png", b"")
    with pytest.raises(
      ValueError, match=r"(?s)1 of 4 images have no label map: \S+lonely\.jpg.*deep/odd\.png"
    ):
      segmentation_folder.build("train", data_dir=str(root))

  def test_two_of_one_name(self, root):
    write(root / "images" / "train" / "b.jpg", b"")
    with pytest.raises(ValueError, match=r"b\.jpg and \S+b\.png have the same name"):
      segmentation_folder.build("train", data_dir=str(root))

  def test_missing_names_and_folders(self, root):
    with pytest.raises(FileNotFoundError, match=r"images/val\. Splits in \S+images: train"):
      segmentation_folder.build("val", data_dir=str(root))
    (root / "images" / "val").mkdir()
    with pytest.raises(ValueError, match=r"No pictures in \S+images/val.*\.jpg"):
      segmentation_folder.build("val", data_dir=str(root))
    with pytest.raises(ValueError, match=r"classes\.txt names 3 classes, num_classes=4"):
      segmentation_folder.build("train", data_dir=str(root), num_classes=4)
    (root / "classes.txt").unlink()
    with pytest.raises(ValueError, match=rf"No class names in {root}.*classes\.txt, objectInfo150\.txt"):
      segmentation_folder.build("train", data_dir=str(root))
    assert segmentation_folder.build("train", data_dir=str(root), num_classes=3).class_names == (
      "0",
      "1",
      "2",
    )

  @pytest.mark.parametrize("reader", ["training", "evaluation"])
  def test_a_map_of_another_size_names_both(self, root, reader):
    write_pair(root, "b", np.zeros((20, 30), np.uint8), shape=(21, 30))
    dataset = segmentation_folder.build("train", data_dir=str(root))
    with pytest.raises(
      ValueError, match=r"annotations/train/b\.png has 20x30.*images/train/b\.png has 21x30"
    ):
      read(dataset, reader)

  @pytest.mark.parametrize("reader", ["training", "evaluation"])
  def test_a_corrupt_map_costs_its_image_only(self, root, reader, caplog):
    path = root / "annotations" / "train" / "b.png"
    path.write_bytes(path.read_bytes()[:80])
    dataset, before = segmentation_folder.build("train", data_dir=str(root)), data.corrupt_count()
    read(dataset, reader)
    assert data.corrupt_count() > before
    assert "b.png" in caplog.text


def read(dataset, reader):
  if reader == "training":
    return next(batches(dataset, batch_size=6))
  return list(data.whole_examples(dataset, process_index=0, process_count=1))


class TestAde20k:
  def test_the_folder_of_the_challenge(self, tmp_path):
    write_pair(tmp_path, "ADE_val_1", np.array([[0, 1, 150]], np.uint8), split="validation")
    names = "".join(f"{i}\t0.1\t1\t1\tname {i}, other\n" for i in range(1, 151))
    write(tmp_path / "objectInfo150.txt", "Idx\tRatio\tTrain\tVal\tName\n" + names)
    dataset = ade20k.build("val", data_dir=str(tmp_path))
    assert dataset.class_names[:2] == ("name 1", "name 2")
    ((_, label_map),) = data.whole_examples(dataset, process_index=0, process_count=1)
    assert label_map.tolist() == [[IGNORE, 0, 149]]

  def test_where_it_looked(self, tmp_path):
    with pytest.raises(
      ValueError, match=rf"{tmp_path}/images; {tmp_path}/scene_parse150.*ADEChallengeData2016"
    ):
      ade20k.build("val", data_dir=str(tmp_path))

  @pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
  def test_what_tfds_has_prepared(self, tmp_path, file_format):
    builder = TinyScenes(data_dir=str(tmp_path), file_format=file_format)
    builder.download_and_prepare()
    dataset = ade20k.build("val", data_dir=str(tmp_path), variant="tiny_scenes")
    assert dataset.num_examples == 5
    assert len(dataset.class_names) == 150
    parts = [list(data.whole_examples(dataset, process_index=p, process_count=2)) for p in range(2)]
    values = [int(label_map[0, 0]) for _, label_map in itertools.chain(*parts)]
    assert sorted(values) == [0, 1, 2, 3, IGNORE]  # in the files 0..4, of which 0 is ignored
    with pytest.raises(ValueError, match=r"no feature 'map'. Available: .*annotation"):
      tfds.build("test", variant="tiny_scenes", data_dir=str(tmp_path), label_map="map")


class TinyScenes(tensorflow_tfds.core.GeneratorBasedBuilder):
  """Grey maps, the value is the number."""

  VERSION = tensorflow_tfds.core.Version("1.0.0")

  def _info(self):
    features = {
      "image": tensorflow_tfds.features.Image(encoding_format="jpeg"),
      "annotation": tensorflow_tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
    }
    features = tensorflow_tfds.features.FeaturesDict(features)
    return tensorflow_tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(3), "test": self._generate_examples(5)}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, {"image": np.zeros((6, 8, 3), np.uint8), "annotation": np.full((6, 8, 1), i, np.uint8)}


def test_shapes_are_a_function_of_split_and_number():
  train, again, val = (shapes.build(split, side=32) for split in ("train", "train", "val"))
  first = train.source[3]
  np.testing.assert_array_equal(first["image"], again.source[3]["image"])
  assert first["image"].shape[:2] == first["map"].shape
  assert not np.array_equal(first["map"], val.source[3]["map"])
  seen = set().union(*(np.unique(train.source[i]["map"]).tolist() for i in range(20)))
  assert seen == {0, 1, 2, 3}
  assert (shapes.build("val", side=32, border=5).source[0]["map"][:5] == IGNORE).all()
  with pytest.raises(ValueError, match=r"split of shapes 'test'. Available: train, val"):
    shapes.build("test")


def batches(dataset, process=(0, 1), **changes):
  options = dict(batch_size=8, image_size=24, seed=5, num_threads=2, crop="joint") | changes
  return data.train_batches(dataset, process_index=process[0], process_count=process[1], **options)


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def assert_same(some, others):
  for batch, other in zip(some, others, strict=True):
    assert batch.keys() == other.keys() == {"image", "map", "label", "index"}
    for name, value in batch.items():
      np.testing.assert_array_equal(value, other[name])


@pytest.fixture(scope="module")
def dataset():
  return shapes.build("train", side=32, num_examples=23)


class TestJointBatches:
  def test_a_batch_has_the_agreed_arrays(self, dataset):
    batch = next(batches(dataset))
    assert (batch["image"].shape, batch["image"].dtype) == ((8, 24, 24, 3), np.uint8)
    assert (batch["map"].shape, batch["map"].dtype) == ((8, 24, 24), np.uint8)
    assert set(np.unique(batch["map"])) <= {0, 1, 2, 3, IGNORE}

  def test_processes_threads_and_starts_do_not_change_the_stream(self, dataset):
    whole = take(batches(dataset), 5)
    parts = [take(batches(dataset, (p, 2)), 5) for p in range(2)]
    joined = [{k: np.concatenate([x[k], y[k]]) for k in x} for x, y in zip(*parts, strict=True)]
    assert_same(joined, whole)
    assert_same(take(batches(dataset, start=3 * 8, num_threads=5), 2), whole[3:])

  def test_without_maps_there_is_no_joint_crop_but_the_others_there_are(self, dataset):
    plain = data.Dataset("photos", 23, None, dataset.source)
    with pytest.raises(ValueError, match="'photos' has no label maps"):
      next(batches(plain))
    only_images = [next(batches(each, crop="random_resized")) for each in (plain, dataset)]
    assert only_images[0].keys() == only_images[1].keys() == {"image", "label", "index"}
    np.testing.assert_array_equal(only_images[0]["image"], only_images[1]["image"])
    with pytest.raises(ValueError, match=r"'both'.*random_resized, pad, none, joint"):
      next(batches(dataset, crop="both"))


def test_the_streams_of_images_are_what_they_were():
  """The view of an image alone under the generator of its place: nothing else is drawn from that."""
  dataset = shapes.build("train", side=32, num_examples=23)
  batch = take(batches(dataset, crop="random_resized", scale=(0.3, 0.9)), 3)[2]
  for row in range(8):
    rng = np.random.Generator(np.random.Philox(key=[5, 2 * 8 + row]))
    image = dataset.source[int(batch["index"][row])]["image"]
    np.testing.assert_array_equal(batch["image"][row], TrainView(24, scale=(0.3, 0.9))(image, rng))


class TestJointView:
  def test_image_and_map_stay_together(self):
    """The image shows its map: so must every view, but where two classes meet."""
    rng = np.random.default_rng(0)
    label_map = np.kron(rng.integers(0, 5, (6, 8)), np.ones((9, 9))).astype(np.uint8)
    image = np.repeat(50 * label_map[..., None], 3, axis=2)
    view = JointView(32, scale=(0.5, 2.0))
    for _ in range(50):
      pixels, crop = view(image, label_map, rng)
      around = [f(crop, np.ones((3, 3), np.uint8), borderValue=7) for f in (cv2.erode, cv2.dilate)]
      within = (around[0] == around[1]) & (crop != IGNORE)
      assert within.sum() > 50
      np.testing.assert_array_equal(pixels[within][:, 0], 50 * crop[within])
      assert (pixels[crop == IGNORE] == (124, 116, 104)).all()

  def test_sizes_are_uniform_between_the_scales_and_keep_the_aspect(self):
    assert label_maps.fit_size((300, 400), 150, 600) == (150, 200)
    assert label_maps.fit_size((100, 1000), 150, 600) == (60, 600)  # the longer side decides
    label_map = np.zeros((64, 64), np.uint8)
    label_map[:, ::2] = 1
    view = JointView(64, scale=(0.5, 1.0))
    rng = np.random.default_rng(0)
    crops = [view(np.zeros((64, 64, 3), np.uint8), label_map, rng)[1] for _ in range(300)]
    sides = [int((crop != IGNORE).any(1).sum()) for crop in crops]
    assert (min(sides), max(sides)) == (32, 64)
    assert np.histogram(sides, 4)[0].min() > 50

  def test_a_crop_of_one_class_is_drawn_anew(self):
    label_map = np.zeros((64, 64), np.uint8)
    label_map[:, 40:] = 1  # a crop of 16 has both in the columns 25..39 only
    share = {}
    for cap in (0.75, 1.0):
      rng = np.random.default_rng(0)
      view = JointView(16, scale=(4.0, 4.0), max_class_share=cap)
      crops = [view(np.zeros((64, 64, 3), np.uint8), label_map, rng)[1] for _ in range(200)]
      share[cap] = np.mean([np.bincount(crop.ravel()).max() <= 0.75 * crop.size for crop in crops])
    # Of the 15 places with two classes 9 of 49 will do; of eleven draws one does in 89 % of all cases.
    np.testing.assert_allclose([share[1.0], share[0.75]], [9 / 15, 1 - (1 - 9 / 49) ** 11], atol=0.08)

  def test_ignored_pixels_are_no_class(self):
    label_map = np.full((20, 20), IGNORE, np.uint8)
    _, crop = JointView(16)(np.zeros((20, 20, 3), np.uint8), label_map, np.random.default_rng(0))
    assert (crop == IGNORE).all()
