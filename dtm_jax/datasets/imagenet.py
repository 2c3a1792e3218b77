"""ImageNet-1k (ILSVRC 2012): 1,281,167 training and 50,000 validation photos in 1,000 classes."""

import dataclasses

from dtm_jax.data import Dataset
from dtm_jax.datasets import _splits, folder
from dtm_jax.errors import OptionError
from dtm_jax.normalizations import NORMALIZATIONS
from dtm_jax.storage import paths

NUM_CLASSES = 1000
TFDS_NAME = "imagenet2012"
TFDS_SPLITS = {"train": "train", "val": "validation"}


def build(split: str = "train", *, data_dir: str | None = None) -> Dataset:
  """Open "train" or "val".

  Args:
    data_dir: a folder with `train/<class>/*.JPEG` and `val/<class>/*.JPEG`, or a TFDS folder in which
      `imagenet2012` is prepared in either file format. Default: the folder of TFDS.

  Raises:
    OptionError: the data are not there (the message says where it looked and how to get them), or they do
      not have 1,000 classes.
  """
  if data_dir is not None and _has_training_folder(data_dir):
    dataset = folder.build(split, data_dir=data_dir)
  else:
    dataset = _prepared(split, data_dir)
  if len(dataset.class_names or ()) != NUM_CLASSES:
    found = len(dataset.class_names or ())
    raise OptionError(f"{dataset.name} has {found} classes; ImageNet-1k has {NUM_CLASSES}.")
  return dataclasses.replace(dataset, mean_and_std=NORMALIZATIONS["imagenet"])


def _has_training_folder(data_dir: str) -> bool:
  place = paths.resolve(data_dir)
  return place.is_dir() and any(
    _splits.kind_of(each.name) == "train" for each in place.iterdir() if each.is_dir()
  )


def splits(*, data_dir: str | None = None) -> tuple[str, ...]:
  """Return both splits, whether or not their files are there. TFDS's "test" is left out: it has no labels."""
  return tuple(TFDS_SPLITS)


def _prepared(split: str, data_dir: str | None) -> Dataset:
  import tensorflow_datasets  # takes seconds, and a folder of images does not need it

  from dtm_jax.datasets import tfds

  base, bracket, part = split.partition("[")
  builder = tensorflow_datasets.builder(TFDS_NAME, data_dir=data_dir)
  if not builder.is_prepared():
    looked = [] if data_dir is None else [f"{data_dir}/train (a folder for each class)"]
    looked.append(f"{builder.data_path} (TFDS)")
    raise OptionError(
      f"ImageNet-1k is not here. Looked in: {'; '.join(looked)}. Get ILSVRC2012_img_train.tar and "
      "ILSVRC2012_img_val.tar from https://image-net.org/download (registration needed). Then either unpack "
      "them to <data_dir>/train/<class>/ and <data_dir>/val/<class>/, or place them in "
      "<data_dir>/downloads/manual/ and run tensorflow_datasets.builder('imagenet2012', "
      "data_dir=<data_dir>, file_format='array_record').download_and_prepare()."
    )
  return tfds.build(TFDS_SPLITS.get(base, base) + bracket + part, variant=TFDS_NAME, data_dir=data_dir)
