"""Images and their label maps in two trees of files: the layout of ADEChallengeData2016 and many others.

<data_dir>/images/<split>/.../NAME.jpg      <data_dir>/annotations/<split>/.../NAME.png
<data_dir>/classes.txt                      one class on each line, or objectInfo150.txt, ADE20K's table
"""

import os

from absl import logging
from etils import epath

from dtm_jax.data import Dataset, Example
from dtm_jax.data.label_maps import MapCoding
from dtm_jax.datasets import _image_files, _splits, sliceable
from dtm_jax.datasets._image_files import EXTENSIONS
from dtm_jax.errors import NotThereError, OptionError
from dtm_jax.storage import paths

CLASS_FILES = ("classes.txt", "objectInfo150.txt")
_WHY_LOCAL = "every picture is read as a local file"
_SHOWN = 5


class _Pairs:
  """Images and maps that are read when an example is asked for."""

  def __init__(self, images: list[str], maps: list[str]):
    self._images, self._maps = images, maps

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Example:
    image, label_map = self._images[index], self._maps[index]
    contents = [_image_files.read_file(path) for path in (image, label_map)]
    return {"image": contents[0], "map": contents[1], "label": -1, "name": image, "map_name": label_map}


@sliceable
def build(
  split: str = "train",
  *,
  data_dir: str,
  images: str = "images",
  maps: str = "annotations",
  num_classes: int | None = None,
  zero_is_ignored: bool = False,
) -> Dataset:
  """Open the pairs of a split. An image and its map have the same path, except for the extension.

  Maps are PNGs, or other lossless pictures, of one channel; see `label_maps.MapCoding` for their values.

  Args:
    split: name of the folders, or another usual name: "val" also finds validation/.
    data_dir: the folder that holds both trees.
    images: the folder of the images in `data_dir`.
    maps: the folder of the label maps in `data_dir`.
    num_classes: number of classes if no file in `data_dir` names them. The names are then "0", "1", ...
    zero_is_ignored: whether 0 in a map means "no class" and the classes are 1..G, as in ADE20K. Otherwise the
      classes are 0..G-1. 255 is ignored in both cases.

  Raises:
    NotThereError: a folder does not exist. The message lists the splits that exist.
    OptionError: there are no images, an image has no map, a map has no image, or two files have the same
      name. Also if there are no class names, or their number is not `num_classes`.
  """
  folder = paths.require_local(data_dir, "data_dir", _WHY_LOCAL)
  skipped = _image_files.Skipped()
  root = _root(folder / images, split)
  image_of = _by_stem(root, skipped)
  map_of = _by_stem(_root(folder / maps, split), skipped)
  _require_pairs(image_of, map_of)
  class_names = _class_names(folder, num_classes)
  stems = sorted(image_of)
  source = _Pairs([image_of[stem] for stem in stems], [map_of[stem] for stem in stems])
  coding = MapCoding(len(class_names), zero_is_ignored)
  found = (
    f"Data set {root}: {_image_files.number(len(stems), 'image')} with maps of {len(class_names):,} classes"
  )
  _image_files.say_once(
    logging.WARNING if skipped.broken or skipped.loops else logging.INFO,
    "; ".join([found, *skipped.phrases()]) + ".",
  )
  return Dataset(os.fspath(root), len(stems), class_names, source, maps=coding)


def splits(*, data_dir: str, images: str = "images", **options) -> tuple[str, ...]:
  """Return the names of the folders of images, one for each split."""
  tree = paths.require_local(data_dir, "data_dir", _WHY_LOCAL) / images
  return _splits_in(tree) if tree.is_dir() else ()


def _splits_in(tree: epath.Path) -> tuple[str, ...]:
  return tuple(sorted(_image_files.visible_folders(tree)))


def _require_pairs(image_of: dict[str, str], map_of: dict[str, str]) -> None:
  """Raise an OptionError that names the images without a map, and the maps without an image."""
  problems = []
  for kind, mine, other, theirs in (
    ("images", image_of, "label map", map_of), ("label maps", map_of, "image", image_of)
  ):  # fmt: skip
    if alone := [mine[stem] for stem in sorted(mine.keys() - theirs.keys())]:
      more = ", ..." if len(alone) > _SHOWN else ""
      problems.append(
        f"{len(alone)} of {len(mine)} {kind} have no {other}: {', '.join(alone[:_SHOWN])}{more}"
      )
  if problems:
    raise OptionError("\n".join(problems))


def _root(tree: epath.Path, split: str) -> epath.Path:
  present = _splits_in(tree) if tree.is_dir() else ()
  name = split if (tree / split).is_dir() else _splits.find(split, present, str(tree))
  if name is None:
    raise NotThereError(f"No folder {tree / split}. Splits in {tree}: {', '.join(present) or 'none'}.")
  return tree / name


def _by_stem(root: epath.Path, skipped: _image_files.Skipped) -> dict[str, str]:
  """Return the paths of the images below a folder, by their relative path without extension."""
  found: dict[str, str] = {}
  for _, path in _image_files.walk(root, skipped):
    stem = _image_files.normal_name(os.path.splitext(os.path.relpath(path, root))[0])
    if stem in found:
      raise OptionError(f"{found[stem]} and {path} have the same name.")
    found[stem] = path
  if not found:
    raise OptionError(f"No pictures in {root}. The extensions read are: {' '.join(EXTENSIONS)}.")
  return found


def _class_names(folder: epath.Path, num_classes: int | None) -> tuple[str, ...]:
  path = next((path for name in CLASS_FILES if (path := folder / name).is_file()), None)
  if path is None:
    if num_classes is None:
      raise OptionError(
        f"No class names in {folder}: it needs one of {', '.join(CLASS_FILES)}, or give num_classes."
      )
    return tuple(str(label) for label in range(num_classes))
  lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
  if path.name == CLASS_FILES[1]:  # the first line has the columns: Idx, Ratio, Train, Val, Name
    lines = [line.split("\t")[-1].split(",")[0].strip() for line in lines[1:]]
  if num_classes not in (None, len(lines)):
    raise OptionError(f"{path} names {len(lines)} classes, num_classes={num_classes}.")
  return tuple(lines)
