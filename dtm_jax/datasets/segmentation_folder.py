"""Images and their label maps in two trees of files: the layout of ADEChallengeData2016, and of many others.

<data_dir>/images/<split>/.../NAME.jpg      <data_dir>/annotations/<split>/.../NAME.png
<data_dir>/classes.txt                      (a class a line) or objectInfo150.txt (ADE20K's table)
"""

import os
import pathlib

from dtm_jax.data import Dataset, Example
from dtm_jax.datasets import sliceable
from dtm_jax.datasets.folder import EXTENSIONS, image_files
from dtm_jax.label_maps import MapCoding

CLASS_FILES = ("classes.txt", "objectInfo150.txt")
SHOWN = 5


class _Pairs:
  """Two files an example, read when they are asked for."""

  def __init__(self, images: list[str], maps: list[str]):
    self._images, self._maps = images, maps

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Example:
    image, label_map = self._images[index], self._maps[index]
    contents = [pathlib.Path(path).read_bytes() for path in (image, label_map)]
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
  """The pairs of a split; an image and its map have the same path but for the extension.

  Maps are PNGs (or other lossless pictures) of one channel. Their values are 0..G-1, or 1..G with 0 for "no
  class" where `zero_is_ignored`; 255 is always ignored. Class names come from a file in `data_dir`; without
  one, `num_classes` makes them numbers.

  Raises:
    FileNotFoundError: a folder is not there; the message lists the splits that are.
    ValueError: no images; images without maps or the other way round; two of one name; no class names, or
      another number of them than `num_classes`.
  """
  folder = pathlib.Path(data_dir).expanduser()
  image_of, map_of = (_by_stem(folder / tree, split) for tree in (images, maps))
  _require_pairs(image_of, map_of)
  class_names = _class_names(folder, num_classes)
  stems = sorted(image_of)
  source = _Pairs([image_of[stem] for stem in stems], [map_of[stem] for stem in stems])
  coding = MapCoding(len(class_names), zero_is_ignored)
  return Dataset(str(folder / images / split), len(stems), class_names, source, maps=coding)


def splits(*, data_dir: str, images: str = "images", **options) -> tuple[str, ...]:
  """The folders of images."""
  return tuple(sorted(path.name for path in (pathlib.Path(data_dir).expanduser() / images).glob("[!.]*/")))


def _require_pairs(image_of: dict[str, str], map_of: dict[str, str]) -> None:
  problems = []
  for kind, mine, other, theirs in (
    ("images", image_of, "label map", map_of), ("label maps", map_of, "image", image_of)
  ):  # fmt: skip
    if alone := [mine[stem] for stem in sorted(mine.keys() - theirs.keys())]:
      more = ", ..." if len(alone) > SHOWN else ""
      problems.append(f"{len(alone)} of {len(mine)} {kind} have no {other}: {', '.join(alone[:SHOWN])}{more}")
  if problems:
    raise ValueError("\n".join(problems))


def _by_stem(tree: pathlib.Path, split: str) -> dict[str, str]:
  """Files below tree/split by their path without extension."""
  root = tree / split
  if not root.is_dir():
    present = sorted(path.name for path in tree.glob("[!.]*/")) if tree.is_dir() else []
    raise FileNotFoundError(f"No folder {root}. Splits in {tree}: {', '.join(present) or 'none'}.")
  found = {}
  for path in image_files(root):
    stem = os.path.splitext(os.path.relpath(path, root))[0]
    if stem in found:
      raise ValueError(f"{found[stem]} and {path} have the same name.")
    found[stem] = path
  if not found:
    raise ValueError(f"No pictures in {root}. The extensions read are: {' '.join(EXTENSIONS)}.")
  return found


def _class_names(folder: pathlib.Path, num_classes: int | None) -> tuple[str, ...]:
  path = next((path for name in CLASS_FILES if (path := folder / name).is_file()), None)
  if path is None:
    if num_classes is None:
      raise ValueError(
        f"No class names in {folder}: it needs one of {', '.join(CLASS_FILES)}, or give num_classes."
      )
    return tuple(str(label) for label in range(num_classes))
  lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
  if path.name == CLASS_FILES[1]:  # Idx, Ratio, Train, Val, Name; the first line says so
    lines = [line.split("\t")[-1].split(",")[0].strip() for line in lines[1:]]
  if num_classes not in (None, len(lines)):
    raise ValueError(f"{path} names {len(lines)} classes, num_classes={num_classes}.")
  return tuple(lines)
