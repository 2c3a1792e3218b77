"""Any tree of image files: one class to a sub-folder, or no classes at all."""

import os
import pathlib
from collections.abc import Iterator

from dtm_jax.data import Dataset, Example
from dtm_jax.datasets import sliceable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp")
SPLITS = ("train", "val", "validation", "test")


class _Files:
  """Image files, read when they are asked for."""

  def __init__(self, paths: list[str], labels: list[int]):
    self._paths, self._labels = paths, labels

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> Example:
    path = self._paths[index]
    with open(path, "rb") as file:
      return {"image": file.read(), "label": self._labels[index], "name": path}


@sliceable
def build(split: str = "train", *, data_dir: str | None, labels: bool = True) -> Dataset:
  """The images under `data_dir`/`split`, or under `data_dir` itself where it has no folders of splits.

  The class of an image is the first folder below that root. Classes are numbered in the sorted order of
  those of all splits, so that one missing in a split does not shift the others; images straight in the
  root, and all images with `labels=False`, have label -1. Sub-folders are searched to any depth, in sorted
  order, following links; hidden ones are passed over.

  Raises:
    FileNotFoundError: no such folder.
    ValueError: no `data_dir`, the root holds no images, or `data_dir` has splits but not this one.
  """
  folder = _existing(data_dir)
  root = _root(folder, split)
  paths = list(image_files(root))
  if not paths:
    raise ValueError(f"No images in {root}. The extensions read are: {' '.join(EXTENSIONS)}.")
  folders = [os.path.relpath(path, root).split(os.sep)[:-1] for path in paths]
  class_names = _classes(folder, root) if labels else ()
  ids = {name: label for label, name in enumerate(class_names)}
  label_of = [ids.get(parts[0], -1) if parts else -1 for parts in folders]
  return Dataset(str(root), len(paths), class_names or None, _Files(paths, label_of))


def splits(*, data_dir: str | None, labels: bool = True) -> tuple[str, ...]:
  """The folders of splits in `data_dir`, of the usual names; none where classes or images lie in it directly.

  Raises:
    FileNotFoundError: no such folder.
  """
  folder = _existing(data_dir)
  return tuple(name for name in SPLITS if (folder / name).is_dir())


def _existing(data_dir: str | None) -> pathlib.Path:
  if data_dir is None:
    raise ValueError("Data set 'folder' needs data_dir, the folder of the images.")
  folder = pathlib.Path(data_dir).expanduser()
  if not folder.is_dir():
    raise FileNotFoundError(f"No such folder of images: {folder}")
  return folder


def _root(folder: pathlib.Path, split: str) -> pathlib.Path:
  present = [name for name in dict.fromkeys((split, *SPLITS)) if (folder / name).is_dir()]
  if split in present or not present:
    return folder / split if present else folder
  raise ValueError(f"No split {split!r} in {folder}. Available: {', '.join(present)}.")


def _classes(folder: pathlib.Path, root: pathlib.Path) -> tuple[str, ...]:
  """The folders with images below `root`, and below the other splits where it is one."""
  roots = [root] if root == folder else [root, *(folder / split for split in SPLITS)]
  below = (path for each in roots for path in each.glob("[!.]*/"))
  return tuple(sorted({path.name for path in below if next(image_files(path), None)}))


def image_files(root: pathlib.Path) -> Iterator[str]:
  """The images below a folder, to any depth, in sorted order."""
  for parent, folders, names in os.walk(root, followlinks=True):
    folders[:] = sorted(name for name in folders if not name.startswith("."))  # os.walk follows this
    yield from (os.path.join(parent, name) for name in sorted(names) if name.lower().endswith(EXTENSIONS))
