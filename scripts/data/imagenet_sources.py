"""List the images of ImageNet-1k in the archives as they are downloaded, or in a tree of folders.

Nothing is unpacked: an image in an archive is a range of bytes in a file. The archives are not compressed.
"""

import dataclasses
import io
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

from absl import logging

from dtm_jax.errors import NotThereError, OptionError, UserError
from dtm_jax.progress import track

TRAIN_ARCHIVE, VAL_ARCHIVE = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
SPLITS = {"train": "train", "validation": "val"}
"""The name of each split in TFDS, and that of its folder in a tree."""
COUNTS = {"train": 1_281_167, "validation": 50_000}


@dataclasses.dataclass(frozen=True)
class Image:
  """An encoded image: `size` bytes of `file` from `offset` on. `synset` is its class, such as "n01440764"."""

  name: str
  synset: str
  file: pathlib.Path
  offset: int
  size: int

  def read(self) -> bytes:
    """Return the encoded image.

    Raises:
      UserError: the file is shorter than it was.
    """
    with open(self.file, "rb") as file:
      file.seek(self.offset)
      content = file.read(self.size)
    if len(content) != self.size:
      raise UserError(f"{self.file} ends inside of {self.name}: it is damaged or incomplete.")
    return content


def find(source: pathlib.Path) -> dict[str, list[Image]]:
  """Return the images of each split, "train" and "validation", sorted by name.

  Args:
    source: a folder with the archives, or with train/<synset>/ and val/<synset>/.

  Raises:
    NotThereError: the folder has neither.
    OptionError: a folder of the tree is not a synset of ImageNet-1k.
    UserError: an archive is damaged or incomplete.
  """
  found: dict[str, list[Image]] = {}
  if (source / TRAIN_ARCHIVE).is_file():
    found["train"] = list(_training_images(source / TRAIN_ARCHIVE))
  if (source / VAL_ARCHIVE).is_file():
    found["validation"] = list(_validation_images(source / VAL_ARCHIVE, source / DEVKIT))
  if not found:
    found = {
      split: list(_tree_images(source / folder))
      for split, folder in SPLITS.items()
      if (source / folder).is_dir()
    }
  if not any(found.values()):
    raise NotThereError(
      f"{source} has no ImageNet. It must contain {TRAIN_ARCHIVE} and {VAL_ARCHIVE} "
      "(https://image-net.org/download), or train/<synset>/*.JPEG and val/<synset>/*.JPEG, or "
      "dataset_info.json of TFDS."
    )
  for split in SPLITS:
    images = found.get(split, [])
    if len(images) != COUNTS[split]:
      logging.warning(
        "%s has %s images in the split %r; ImageNet-1k has %s.",
        source, f"{len(images):,}", split, f"{COUNTS[split]:,}",
      )  # fmt: skip
  return {split: sorted(images, key=lambda image: image.name) for split, images in found.items() if images}


def synsets() -> list[str]:
  """Return the 1,000 synsets in the order of their labels."""
  return _file_of_tfds("labels.txt")


def _training_images(path: pathlib.Path) -> Iterator[Image]:
  """Yield the images of the archives, one a class, in the training archive."""
  with _opened(path) as outer:
    for member in track(_files(outer, path), f"Listing {path.name}", 1000, "classes"):
      synset = pathlib.PurePosixPath(member.name).stem
      _require_synset(synset, path)
      with _opened(path, outer.extractfile(member)) as inner:
        for each in _files(inner, path):
          name = pathlib.PurePosixPath(each.name).name
          yield Image(name, synset, path, member.offset_data + each.offset_data, each.size)


def _validation_images(path: pathlib.Path, devkit: pathlib.Path) -> Iterator[Image]:
  """Yield the validation images. Their labels are those of the development kit, or of TFDS without one."""
  labels = _labels_of_devkit(devkit) if devkit.is_file() else _file_of_tfds("validation_labels.txt")
  with _opened(path) as archive:
    for member in _files(archive, path):
      name = pathlib.PurePosixPath(member.name).name
      number = name.removesuffix(".JPEG").rpartition("_")[2]
      if not number.isdecimal() or not 1 <= int(number) <= len(labels):
        raise UserError(f"{path}: {member.name} is not named ILSVRC2012_val_<1 to {len(labels)}>.JPEG.")
      yield Image(name, labels[int(number) - 1], path, member.offset_data, member.size)


def _labels_of_devkit(path: pathlib.Path) -> list[str]:
  """Return the synset of each validation image, in the order of their names."""
  import scipy.io

  try:
    with tarfile.open(path) as kit:
      contents = {
        name: kit.extractfile(member).read()  # type: ignore[union-attr]
        for member in kit
        if (name := pathlib.PurePosixPath(member.name).name)
        in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
      }
    table: Any = scipy.io.loadmat(io.BytesIO(contents["meta.mat"]), squeeze_me=True)["synsets"]
    of_number = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    numbers = contents["ILSVRC2012_validation_ground_truth.txt"].split()
    labels = [of_number[int(number)] for number in numbers]
  except (tarfile.TarError, OSError, EOFError, KeyError, ValueError) as error:
    raise UserError(f"{path} is not the development kit of ILSVRC 2012: {error!r}") from error
  for label in {*labels}:
    _require_synset(label, path)
  return labels


def _tree_images(folder: pathlib.Path) -> Iterator[Image]:
  """Yield the files of <folder>/<synset>/."""
  for place in sorted(each for each in folder.iterdir() if each.is_dir()):
    _require_synset(place.name, folder)
    for path in sorted(place.iterdir()):
      if path.suffix.lower() in (".jpeg", ".jpg", ".png"):
        yield Image(path.name, place.name, path, 0, path.stat().st_size)


def _files(archive: tarfile.TarFile, path: pathlib.Path) -> Iterator[tarfile.TarInfo]:
  """Yield the files of an open archive."""
  try:
    yield from (member for member in archive if member.isfile())
  except tarfile.TarError as error:
    raise UserError(
      f"{path} is damaged or incomplete: {error}. Compare its size and MD5 with the website's."
    ) from error


def _opened(path: pathlib.Path, inner: Any = None) -> tarfile.TarFile:
  try:
    return tarfile.open(path, "r:", fileobj=inner)
  except tarfile.TarError as error:
    raise UserError(f"{path} is not a plain tar archive, or it is damaged: {error}.") from error


def _require_synset(name: str, where: pathlib.Path) -> None:
  if name not in _KNOWN:
    _KNOWN.update(synsets())
  if name not in _KNOWN:
    raise OptionError(
      f"{where}: {name!r} is not a synset of ImageNet-1k, such as 'n01440764'. Other images need no "
      "preparation: --config.data.dataset.name=folder reads any tree."
    )


_KNOWN: set[str] = set()


def _file_of_tfds(name: str) -> list[str]:
  import tensorflow_datasets as tfds

  return tfds.core.tfds_path(f"datasets/imagenet2012/{name}").read_text().split()
