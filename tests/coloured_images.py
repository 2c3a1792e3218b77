"""Data sets of images in plain colours, and a predict function that gives the mean colour as features."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image


def write_cifar10(folder: Path) -> dict[str, str]:
  """Write a CIFAR-10 of 50 images and return its options. The class is the brightest channel.

  A fifth of the test labels is wrong.
  """
  rng = np.random.default_rng(0)
  label = np.arange(50) % 3
  image = np.zeros((50, 32, 32, 3), np.uint8)
  image[np.arange(50), :, :, label] = rng.integers(100, 255, (50, 1, 1))
  test_label = np.where(np.arange(50) % 5 == 0, (label + 1) % 3, label)
  arrays = folder / "cifar10" / "arrays"
  arrays.mkdir(parents=True)
  for split, labels in (("train", label), ("test", test_label)):
    np.save(arrays / f"{split}_images.npy", image)
    np.save(arrays / f"{split}_labels.npy", labels.astype(np.int32))
  return {"name": "cifar10", "data_dir": str(folder)}


def write_folder(
  root: Path, splits=("train", "val"), classes=("a", "b", "c", "d"), count: int = 12
) -> dict[str, str]:
  """Write `count` images of each class into class folders and return the options of the data set.

  Each class has its own colour, but c and d have the same.
  """
  for split in splits:
    for label, name in enumerate(classes):
      for i in range(count):
        path = root / split / name / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = [(200, 0, i), (0, 200, i), (0, i, 200), (0, i, 200)][label]
        Image.new("RGB", (8, 8), colour).save(path)
  return {"name": "folder", "data_dir": str(root)}


def mean_colour(state, batch):
  """Return the mean colour of each image, [B, 3]."""
  return jnp.asarray(batch["image"], jnp.float32).mean((1, 2)) / 255
