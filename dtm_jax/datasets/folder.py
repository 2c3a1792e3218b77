"""Any tree of image files, with one sub-folder for each class or without classes."""

import dataclasses
import os
import re

import numpy as np
from absl import logging
from etils import epath

from dtm_jax import progress
from dtm_jax.data import Dataset, Example
from dtm_jax.datasets import _class_names, _image_files, _splits, sliceable
from dtm_jax.datasets._image_files import EXTENSIONS
from dtm_jax.errors import NotThereError, OptionError
from dtm_jax.storage import paths

_BESIDE = re.compile(
  r"(label|mask|annot|annotation|seg|segmentation|box|boxe|bbox|bboxe|meta|metadata|doc|extra|unlabell?ed)s?",
  re.I,
)
"""Folders that may lie beside a folder of photos and are not classes."""
_ANNOTATIONS = re.compile(r".*annotations?\.(txt|tsv|csv)", re.I)


class _Files:
  """Image files that are read when an example is asked for."""

  def __init__(self, paths: list[str], labels: np.ndarray):
    self._paths, self._labels = paths, labels

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> Example:
    path = self._paths[index]
    return {"image": _image_files.read_file(path), "label": int(self._labels[index]), "name": path}


@sliceable
def build(split: str = "train", *, data_dir: str | None, labels: bool = True) -> Dataset:
  """Open the images below `data_dir`/`split`, or below `data_dir` itself if it has no folders of splits.

  The class of an image is the first folder below that root. The classes of all splits are numbered together
  in natural order (5 before 14). So a class that is missing in one split does not shift the others. If a
  split's folders are not classes, a file such as Tiny ImageNet's val_annotations.txt may name the classes
  ("<file> <class> ..." on each line). Images directly in the root have label -1.

  Folders are searched to any depth in sorted order. Links are followed, and hidden folders are skipped. One
  line of the log says what was found and what was skipped.

  Args:
    split: name of the folder, or another usual name: "val" also finds Valid/ and validation/.
    data_dir: the folder of the images.
    labels: whether folders are classes. False gives all images label -1.

  Raises:
    NotThereError: the folder is not there.
    OptionError: `data_dir` is not given, the root has no images, or the split is missing or may be one of two
      folders. Also if the names of two classes differ only in upper and lower case.
    UserError: a folder cannot be read.
  """
  tree = _Tree.at(data_dir)
  root = tree.root(split)
  skipped = _image_files.Skipped()
  found = list(progress.track(_image_files.walk(root, skipped), f"Listing {root}", unit="images"))
  if not found:
    more = "; ".join(["", *skipped.phrases()])
    raise OptionError(f"No images in {root}{more}. The extensions read are: {' '.join(EXTENSIONS)}.")
  class_of, class_names = _classes(tree, root, found) if labels else ([None] * len(found), ())
  ids: dict[str | None, int] = {name: label for label, name in enumerate(class_names)}
  label_of = np.array([ids.get(name, -1) for name in class_of], np.int32)
  _tell(tree, root, found, label_of if class_names else None, skipped)
  source = _Files([path for _, path in found], label_of)
  if not class_names:
    return Dataset(os.fspath(root), len(found), None, source)
  return Dataset(os.fspath(root), len(found), class_names, source, labels=label_of)


def splits(*, data_dir: str | None, labels: bool = True) -> tuple[str, ...]:
  """Return the names of the folders of splits in `data_dir`.

  There are none if `data_dir` holds class folders or images directly.

  Raises:
    NotThereError: the folder is not there.
  """
  return _Tree.at(data_dir).splits


@dataclasses.dataclass(frozen=True)
class _Tree:
  """A data_dir, and which of its folders are splits.

  Attributes:
    splits: folders of splits, in the order train, val, test, eval.
    others: the other folders.
    num_images: number of images directly in the folder.
  """

  folder: epath.Path
  splits: tuple[str, ...]
  others: tuple[str, ...]
  num_images: int

  @classmethod
  def at(cls, data_dir: str | None) -> "_Tree":
    """List `data_dir` and decide which folders are splits."""
    if data_dir is None:
      raise OptionError("Data set 'folder' needs data_dir, the folder of the images.")
    folder = paths.require_local(data_dir, "data_dir", "every image is read as a local file")
    if not folder.is_dir():
      what = "data_dir is a file, not a folder" if folder.exists() else "No such folder of images"
      raise NotThereError(f"{what}: {folder}")
    listing = _image_files.list_folder(folder)
    names = sorted(name for name in listing.folders if not _image_files.is_hidden(name))
    present = tuple(sorted(filter(_splits.kind_of, names), key=_order_of_kinds))
    num_images = sum(map(_image_files.is_image, listing.files))
    others = tuple(name for name in names if name not in present)
    if len(present) == 1 and _is_class(folder, present[0], others):
      beside = ", ".join(others[:5])
      _image_files.say_once(
        logging.WARNING,
        f"{folder}: {present[0]} is read as a class like {beside}, because it holds images and no class "
        "folders. To read it alone, give it as data_dir.",
      )
      return cls(folder, (), tuple(names), num_images)
    return cls(folder, present, others, num_images)

  def root(self, split: str) -> epath.Path:
    """Return the folder that `split` means."""
    named = self.folder / split if split and not _splits.kind_of(split) else None
    if named is not None and named.is_dir():
      return named
    if not self.splits:
      self._require_no_splits_below()
      return self.folder
    name = _splits.find(split, self.splits, str(self.folder))
    if name is None:
      raise OptionError(f"No split {split!r} in {self.folder}. Available: {', '.join(self.splits)}.")
    return self.folder / name

  def _require_no_splits_below(self) -> None:
    """Refuse splits one level further down, which would be read as one data set."""
    for name in self.others[:3]:
      below = [each for each in _image_files.list_folder(self.folder / name).folders if _splits.kind_of(each)]
      if len({_splits.kind_of(each) for each in below}) > 1:
        raise OptionError(
          f"{self.folder} has no folders of splits, but {name}/ in it has: {', '.join(sorted(below))}. Give "
          f"{self.folder / name} as data_dir, or move the splits up: {self.folder / min(below) / name}."
        )


def _order_of_kinds(name: str) -> tuple:
  return ("train", *_splits.EVALUATION_KINDS).index(_splits.kind_of(name)), name


def _is_class(folder: epath.Path, name: str, others: tuple[str, ...]) -> bool:
  """Return whether a folder with the name of a split is a class, as in bus/ car/ train/.

  It is a class if it holds images and no class folders, and a folder beside it also holds images.
  """
  classes = [other for other in others if not _BESIDE.fullmatch(other)]
  if not any(_image_files.holds_image(folder / other) for other in classes):
    return False
  listing = _image_files.list_folder(folder / name)
  flat = any(map(_image_files.is_image, listing.files))
  return flat and not any(_image_files.holds_image(folder / name / below) for below in listing.folders)


def _classes(tree: _Tree, root: epath.Path, found: list) -> tuple[list[str | None], tuple[str, ...]]:
  """Return the class name of every image, None without a class, and the names of all classes in order."""
  first = {first: _image_files.normal_name(first) for first, _ in found if first}
  class_of = [first[each] if each else None for each, _ in found]
  if root == tree.folder:
    return class_of, _class_names.classes_of_split(None, {None: set(first.values())})
  mine = os.path.relpath(root, tree.folder)
  others = [each for each in tree.splits if each != mine]
  names: dict[str | None, set[str]] = {each: _class_folders(tree.folder / each) for each in others}
  trained = set().union(*(names[each] for each in others if _splits.kind_of(each) == "train"))
  if trained.isdisjoint(first.values()) and (class_in_file := _annotated(root, found)):
    class_of = [*class_in_file]
  names[mine] = set(filter(None, class_of))
  return class_of, _class_names.classes_of_split(mine, names)


def _class_folders(root: epath.Path) -> set[str]:
  """Return the names of the folders below `root` that hold images."""
  folders = _image_files.visible_folders(root)
  return {_image_files.normal_name(name) for name in folders if _image_files.holds_image(root / name)}


def _annotated(root: epath.Path, found: list) -> list[str] | None:
  """Return the class of every image from a file such as val_annotations.txt in `root`, or None without one.

  Raises:
    OptionError: the file does not name the class of an image.
  """
  files = sorted(filter(_ANNOTATIONS.fullmatch, _image_files.list_folder(root).files))
  if not files:
    return None
  lines = _image_files.read_file(os.fspath(root / files[0])).decode("utf-8", "replace").splitlines()
  columns = (re.split(r"[\t,]|\s+", line.strip()) for line in lines)
  class_of = {row[0]: _image_files.normal_name(row[1]) for row in columns if len(row) > 1}
  unknown = [path for _, path in found if os.path.basename(path) not in class_of]
  if unknown:
    raise OptionError(f"{root / files[0]} does not give the class of {_image_files.some(unknown, 'image')}.")
  return [class_of[os.path.basename(path)] for _, path in found]


def _tell(tree: _Tree, root: epath.Path, found, label_of, skipped: _image_files.Skipped) -> None:
  """Log one line on what was found and what was left out, as a warning if it needs the user's attention."""
  concerns = []
  if label_of is not None:
    if unlabelled := int((label_of < 0).sum()):
      concerns.append(f"{_image_files.number(unlabelled, 'image')} in no class folder")
    firsts = {first for first, _ in found}
    if empty := sorted(name for name in _image_files.visible_folders(root) if name not in firsts):
      concerns.append(f"{_image_files.some(empty, 'class folder')} without an image that can be read")
  if root != tree.folder:
    beside = (name for name in _image_files.list_folder(tree.folder).folders if not name.startswith("."))
    kind, mine = _splits.kind_of(root.name), os.path.relpath(root, tree.folder)
    if unread := sorted(name for name in beside if _splits.kind_of(name) in (None, kind) and name != mine):
      concerns.append(f"{_image_files.some(unread, 'folder')} beside the splits not read")
    if tree.num_images:
      concerns.append(f"{_image_files.number(tree.num_images, 'image')} directly in {tree.folder} not read")
  classes = "without classes"
  if label_of is not None:
    classes = f"in {_image_files.number(len(np.unique(label_of[label_of >= 0])), 'class')}"
  found_all = f"Data set {root}: {_image_files.number(len(found), 'image')} {classes}"
  text = "; ".join([found_all, *concerns, *skipped.phrases()]) + "."
  _image_files.say_once(
    logging.WARNING if concerns or skipped.broken or skipped.loops else logging.INFO, text
  )
