"""ADE20K for scene parsing (MIT, 2016 challenge): 20,210 + 2,000 photos, all pixels in 150 classes."""

import dataclasses

import tensorflow_datasets

from dtm_jax.data import Dataset
from dtm_jax.data.label_maps import MapCoding
from dtm_jax.datasets import segmentation_folder, tfds
from dtm_jax.errors import OptionError
from dtm_jax.storage import paths

NUM_CLASSES = 150
FOLDER_SPLITS = {"train": "training", "val": "validation"}
TFDS_SPLITS = {"train": "train", "val": "test"}  # TFDS calls the validation images "test"
URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"


def build(split: str = "train", *, data_dir: str | None = None, variant: str = "scene_parse150") -> Dataset:
  """The "train" or "val" images with their label maps (0 in a file is "no class", and ignored).

  `data_dir` is the unpacked folder ADEChallengeData2016, with images/ and annotations/, or a TFDS folder in
  which `variant` is prepared with the features "image" and "annotation". Beware: `scene_parse150`, as TFDS
  1.0.0 builds it, holds the *instance* annotations of the 2017 challenge, of three channels and 100 classes;
  such pictures are refused when they are read. A set of one's own from the zip below is not.

  Raises:
    OptionError: neither is there (the message says where it looked and how to get the data).
  """
  base, bracket, part = split.partition("[")
  if data_dir is not None and (paths.resolve(data_dir) / "images").is_dir():
    return segmentation_folder.build(
      FOLDER_SPLITS.get(base, base) + bracket + part,
      data_dir=data_dir, num_classes=NUM_CLASSES, zero_is_ignored=True,
    )  # fmt: skip
  return _prepared(TFDS_SPLITS.get(base, base) + bracket + part, data_dir, variant)


def splits(**options) -> tuple[str, ...]:
  """Both, wherever they are."""
  return tuple(FOLDER_SPLITS)


def _prepared(split: str, data_dir: str | None, variant: str) -> Dataset:
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
