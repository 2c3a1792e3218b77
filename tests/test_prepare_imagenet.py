"""scripts/prepare_imagenet.py on small archives with the structure of the real ones."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dtm_jax import plugins
from dtm_jax.errors import OptionError, UserError
from dtm_jax.storage import paths
from scripts.data import array_records, imagenet_sources, prepare_imagenet

ROOT = Path(__file__).parents[1]
SYNSETS = ("n01440764", "n01443537", "n15075141")
TRAIN, VAL = 8, 5


def jpeg(number: int) -> bytes:
  pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, "JPEG")
  return stream.getvalue()


def tar(files: dict[str, bytes], path: Path | io.BytesIO, mode: str = "w:") -> None:
  stream = {"fileobj": path} if isinstance(path, io.BytesIO) else {"name": path}
  with tarfile.open(mode=mode, **stream) as archive:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))


def training_images() -> dict[str, dict[str, bytes]]:
  return {
    synset: {f"{synset}_{n}.JPEG": jpeg(100 * s + n) for n in range(TRAIN)}
    for s, synset in enumerate(SYNSETS)
  }


def validation_images() -> dict[str, bytes]:
  return {f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(1000 + n) for n in range(1, VAL + 1)}


def write_devkit(folder: Path, numbers: list[int]) -> None:
  """Write the development kit: synset k has number k + 1, image n has the number numbers[n]."""
  import scipy.io

  kinds = np.array(
    [(k + 1, synset) for k, synset in enumerate(SYNSETS)], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")]
  )
  meta = io.BytesIO()
  scipy.io.savemat(meta, {"synsets": kinds})
  truth = "".join(f"{number}\n" for number in numbers).encode()
  data = "ILSVRC2012_devkit_t12/data"
  tar(
    {f"{data}/meta.mat": meta.getvalue(), f"{data}/ILSVRC2012_validation_ground_truth.txt": truth},
    folder / "ILSVRC2012_devkit_t12.tar.gz",
    "w:gz",
  )


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
  folder = tmp_path_factory.mktemp("archives")
  inner = {}
  for synset, images in training_images().items():
    stream = io.BytesIO()
    tar(images, stream)
    inner[f"{synset}.tar"] = stream.getvalue()
  tar(inner, folder / imagenet_sources.TRAIN_ARCHIVE)
  tar(validation_images(), folder / imagenet_sources.VAL_ARCHIVE)
  write_devkit(folder, [3, 1, 2, 3, 1])
  return folder


def prepare(source: Path, out: Path | str, *more: str) -> None:
  prepare_imagenet.main([str(source), "--out", str(out), "--train-shards=6", "--val-shards=2", *more])


@pytest.fixture(scope="module")
def prepared(archives, tmp_path_factory):
  out = tmp_path_factory.mktemp("prepared")
  prepare(archives, out)
  return out


def data_set(out: Path) -> Path:
  return out / "imagenet2012" / "5.1.0"


def shards(out: Path) -> dict[str, list[bytes]]:
  """Return the records of every shard. Two files with the same records may differ in some bytes."""
  found = sorted(data_set(out).glob("*.array_record-*-of-?????"))
  return {path.name: [*array_records.read_shard(path)] for path in found}


def test_the_data_set_imagenet_reads_every_image_and_label(prepared):
  names = tfds.builder("imagenet2012", data_dir=str(prepared)).info.features["label"].names
  wanted = {
    "train": {(content, synset) for synset, each in training_images().items() for content in each.values()},
    "val": {
      (content, SYNSETS[k]) for content, k in zip(validation_images().values(), [2, 0, 1, 2, 0], strict=True)
    },
  }
  for split, images in wanted.items():
    dataset = plugins.build("datasets", {"name": "imagenet", "data_dir": str(prepared)}, split=split)
    assert dataset.num_examples == len(images)
    examples = [dataset.source[index] for index in range(dataset.num_examples)]
    assert {(example["image"], names[example["label"]]) for example in examples} == images
    labels = [example["label"] for example in examples]
    assert labels != sorted(labels)  # shuffled


def test_the_order_is_that_of_the_seed(archives, prepared, tmp_path):
  prepare(archives, tmp_path / "same")
  assert shards(tmp_path / "same") == shards(prepared)
  prepare(archives, tmp_path / "other", "--seed=1")
  assert shards(tmp_path / "other") != shards(prepared)


def test_a_tree_of_folders_gives_the_same_shards(prepared, tmp_path):
  for synset, images in training_images().items():
    (tmp_path / "tree" / "train" / synset).mkdir(parents=True)
    for name, content in images.items():
      (tmp_path / "tree" / "train" / synset / name).write_bytes(content)
  for (name, content), number in zip(validation_images().items(), [3, 1, 2, 3, 1], strict=True):
    folder = tmp_path / "tree" / "val" / SYNSETS[number - 1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
  prepare(tmp_path / "tree", tmp_path / "out")
  assert shards(tmp_path / "out") == shards(prepared)


def test_without_the_kit_the_labels_are_those_of_tfds(archives, tmp_path):
  os.symlink(archives / imagenet_sources.VAL_ARCHIVE, tmp_path / imagenet_sources.VAL_ARCHIVE)
  images = imagenet_sources.find(tmp_path)["validation"]
  first = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()[:VAL]
  assert [image.synset for image in images] == first


def test_a_data_set_of_tfds_is_converted_and_checked(prepared, tmp_path):
  prepare(data_set(prepared), tmp_path)
  assert {*shards(tmp_path)} == {*shards(prepared)}
  read = lambda out: [
    plugins.build("datasets", {"name": "imagenet", "data_dir": str(out)}).source[i]["image"] for i in range(4)
  ]
  assert read(tmp_path) == read(prepared)
  with pytest.raises(OptionError, match=r"has the data set .* itself"):
    prepare(data_set(prepared), prepared)


def test_a_second_start_keeps_what_is_finished_and_replaces_what_is_damaged(archives, prepared, tmp_path):
  prepare(archives, tmp_path)
  paths_ = sorted(data_set(tmp_path).glob("*.array_record-*"))
  content = bytearray(paths_[1].read_bytes())
  content[len(content) // 2] ^= 1  # one bit
  paths_[1].write_bytes(content)
  paths_[2].unlink()
  times = {path: path.stat().st_mtime_ns for path in paths_ if path.exists()}
  with pytest.raises(UserError) as caught:
    prepare_imagenet.main(["--out", str(tmp_path), "--verify"])
  assert f"{paths_[1].name}: its bytes have changed since it was written" in str(caught.value)
  assert f"{paths_[2].name}: it is missing" in str(caught.value)
  prepare(archives, tmp_path)
  assert shards(tmp_path) == shards(prepared)
  assert {path for path, then in times.items() if path.stat().st_mtime_ns == then} == {*times} - {paths_[1]}


def test_verify_compares_the_counts_that_tfds_reads(prepared, tmp_path):
  prepare_imagenet.main(["--out", str(prepared), "--verify"])
  info = json.loads((data_set(prepared) / "dataset_info.json").read_text())
  info["splits"][0]["shardLengths"][0] = "99"
  (tmp_path / "dataset_info.json").write_text(json.dumps(info))
  for path in data_set(prepared).iterdir():
    if path.name != "dataset_info.json":
      (tmp_path / path.name).symlink_to(path)
  with pytest.raises(UserError, match="counts other records in the split"):
    prepare_imagenet.main(["--out", str(tmp_path), "--verify"])


def test_other_images_or_another_seed_do_not_mix_with_finished_shards(archives, tmp_path):
  prepare(archives, tmp_path)
  with pytest.raises(OptionError, match=r"made from something else .*seed 0 -> 1"):
    prepare(archives, tmp_path, "--seed=1")


def test_killed_in_the_middle_and_started_again(archives, prepared, tmp_path):
  """Writing is slowed down, so that the kill -9 comes between two shards."""
  slow = (
    "import time; from scripts.data import array_records, prepare_imagenet\n"
    "write = array_records.write_shard\n"
    "array_records.write_shard = lambda *args: (time.sleep(0.3), write(*args))[1]\n"
    f"prepare_imagenet.main([{str(archives)!r}, '--out', {str(tmp_path)!r}, '--train-shards=6',"
    " '--val-shards=2', '--workers=1'])"
  )
  process = subprocess.Popen([sys.executable, "-c", slow], cwd=ROOT, stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 60
  while len([*data_set(tmp_path).glob("*-of-?????")]) < 3 and time.monotonic() < deadline:
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait(timeout=300)
  assert 3 <= len(shards(tmp_path)) < 8
  finished = array_records.Checksums(paths.resolve(data_set(tmp_path))).shards
  times = {name: (data_set(tmp_path) / name).stat().st_mtime_ns for name in finished}
  assert finished
  prepare(archives, tmp_path)
  assert shards(tmp_path) == shards(prepared)
  assert {name: (data_set(tmp_path) / name).stat().st_mtime_ns for name in finished} == times


def test_a_cut_archive_is_named(archives, tmp_path):
  content = (archives / imagenet_sources.TRAIN_ARCHIVE).read_bytes()
  (tmp_path / imagenet_sources.TRAIN_ARCHIVE).write_bytes(content[: len(content) * 2 // 3])
  with pytest.raises(UserError, match=r"ILSVRC2012_img_train.tar.*(damaged|ends inside)"):
    prepare(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
  ("name", "message"),
  [("cats", "'cats' is not a synset of ImageNet-1k"), (None, "has no ImageNet. It must contain ILSVRC2012")],
)
def test_other_folders_are_refused(tmp_path, name, message):
  if name:
    (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "train" / name / "a.jpg").write_bytes(jpeg(0))
  with pytest.raises(UserError, match=message):
    prepare(tmp_path, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_too_small_a_disk_is_refused_before_any_work(archives, tmp_path, monkeypatch):
  monkeypatch.setattr(prepare_imagenet.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
  with pytest.raises(OptionError, match=r"GB free, and the shards need"):
    prepare(archives, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_shards_in_a_bucket(archives, prepared, tmp_path, monkeypatch):
  import emulators

  for name, value in emulators.google().items():
    monkeypatch.setenv(name, value)
  prepare(archives, f"gs://{emulators.BUCKET}/imagenet")
  folder = paths.resolve(f"gs://{emulators.BUCKET}/imagenet/imagenet2012/5.1.0")
  wanted = shards(prepared)

  def copies() -> dict[str, list[bytes]]:
    data_set(tmp_path).mkdir(parents=True, exist_ok=True)
    for name in wanted:
      (data_set(tmp_path) / name).write_bytes((folder / name).read_bytes())
    return shards(tmp_path)

  assert copies() == wanted
  name = next(iter(wanted))
  (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b"x")
  with pytest.raises(UserError, match=f"{name}: its bytes have changed"):
    prepare_imagenet.main(["--out", f"gs://{emulators.BUCKET}/imagenet", "--verify"])
  prepare(archives, f"gs://{emulators.BUCKET}/imagenet")
  assert copies() == wanted
