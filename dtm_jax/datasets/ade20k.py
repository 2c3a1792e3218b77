"""ADE20K for scene parsing (MIT, 2016 challenge): 20,210 + 2,000 photos, all pixels in 150 classes."""

import dataclasses

from dtm_jax.data import Dataset
from dtm_jax.data.label_maps import MapCoding
from dtm_jax.datasets import segmentation_folder
from dtm_jax.errors import OptionError
from dtm_jax.storage import paths

NUM_CLASSES = 150
FOLDER_SPLITS = {"train": "training", "val": "validation"}
TFDS_SPLITS = {"train": "train", "val": "test"}  # TFDS names the validation images "test"
URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"


def build(split: str = "train", *, data_dir: str | None = None, variant: str = "scene_parse150") -> Dataset:
  """Open "train" or "val" with label maps. Pixels of 0 in a file have no class and are ignored.

  `scene_parse150` as TFDS 1.0.0 prepares it is refused when its maps are read. It holds the *instance*
  annotations of the 2017 challenge, with three channels and 100 classes. Use the zip at `URL`.

  Args:
    data_dir: the unpacked folder ADEChallengeData2016 with images/ and annotations/, or a TFDS folder.
    variant: name of the data set in a TFDS folder, with the features "image" and "annotation".

  Raises:
    OptionError: the data are not there. The message says where it looked and how to get them.
  """
  base, bracket, part = split.partition("[")
  if data_dir is not None and (paths.resolve(data_dir) / "images").is_dir():
    return segmentation_folder.build(
      FOLDER_SPLITS.get(base, base) + bracket + part,
      data_dir=data_dir, num_classes=NUM_CLASSES, zero_is_ignored=True,
    )  # fmt: skip
  return _prepared(TFDS_SPLITS.get(base, base) + bracket + part, data_dir, variant)


def splits(**options) -> tuple[str, ...]:
  """Return both splits, whether or not their files are there."""
  return tuple(FOLDER_SPLITS)


def _prepared(split: str, data_dir: str | None, variant: str) -> Dataset:
  import tensorflow_datasets  # takes seconds, and a folder of images does not need it

  from dtm_jax.datasets import tfds

  builder = tensorflow_datasets.builder(variant, data_dir=data_dir)
  if not builder.is_prepared():
    looked = [] if data_dir is None else [f"{data_dir}/images"]
    raise OptionError(
      f"ADE20K is not here. Looked in: {'; '.join([*looked, f'{builder.data_path} (TFDS)'])}. Unpack {URL} "
      "and name its folder ADEChallengeData2016 as data_dir."
    )
  dataset = tfds.build(
    split, variant=variant, data_dir=data_dir, label_map="annotation",
    maps=MapCoding(NUM_CLASSES, zero_is_ignored=True),
  )  # fmt: skip
  return dataclasses.replace(dataset, class_names=tuple(str(label) for label in range(NUM_CLASSES)))
