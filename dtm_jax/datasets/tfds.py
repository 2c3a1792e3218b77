"""Any image data set that TensorFlow Datasets (TFDS) has prepared on disk.

A data set in the file format `array_record` is read by index, without TensorFlow. One in `tfrecord`, TFDS's
default, can only be read in sequence, by tf.data; `scripts/tfrecord_to_array_record.py` converts it. In both
cases the images stay encoded until `dtm_jax.data` decodes them.
"""

import dataclasses
import difflib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from dtm_jax.data import Dataset, Example, Source, Stream
from dtm_jax.data.label_maps import MapCoding
from dtm_jax.datasets import _splits
from dtm_jax.errors import OptionError
from dtm_jax.storage import object_stores, paths
from dtm_jax.training import startup


def build(
  split: str = "train",
  *,
  variant: str,
  data_dir: str | None = None,
  image: str = "image",
  label: str = "label",
  label_map: str | None = None,
  maps: MapCoding | None = None,
  shuffle_buffer: int = 4096,
) -> Dataset:
  """Open a split of a prepared data set.

  A config names it "tfds/<variant>", for example `--config.data.dataset.name=tfds/oxford_flowers102`.

  Args:
    split: name of the split, another usual name ("val" finds "validation"), or a part ("train[:90%]").
    variant: TFDS's name of the data set, "name/config:version".
    data_dir: TFDS's folder. Default: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    image: name of the feature of images.
    label: name of the feature of labels. If there is none, all labels are -1.
    label_map: name of the feature of label maps. None: no label maps.
    maps: how the label maps are written, a `label_maps.MapCoding`. Only code can give it.
    shuffle_buffer: number of encoded images in tf.data's shuffle buffer. Only `tfrecord` needs it. The
      order of its files is shuffled too.

  Raises:
    OptionError: the data set is unknown or not prepared, has no such split or feature, or lies in a bucket
      that its reader cannot open.
  """
  builder = _prepared(variant, data_dir)
  split = _split(builder, split)
  num_examples = builder.info.splits[split].num_examples
  features = builder.info.features
  labelled = label in features
  class_names = tuple(getattr(features[label], "names", ())) if labelled else ()
  for feature in filter(None, (image, label_map)):
    if feature not in features:
      available = ", ".join(features)
      raise OptionError(f"{builder.info.full_name} has no feature {feature!r}. Available: {available}.")
  wanted = _Features(image, label if labelled else None, label_map)
  _check_readable(builder)
  source: Source | Stream
  if "array_record" in builder.info.file_format.value:
    source = _Indexed(builder, split, wanted)
  else:
    source = _Streamed(builder, split, wanted, shuffle_buffer)
  image_size = _one_size(features[image].shape)
  return Dataset(
    builder.info.full_name, num_examples, class_names or None, source, image_size=image_size, maps=maps
  )


def splits(*, variant: str, data_dir: str | None = None, **options: Any) -> tuple[str, ...]:
  """Return the names of the prepared splits.

  Raises:
    OptionError: the data set is unknown or not prepared.
  """
  return tuple(_prepared(variant, data_dir).info.splits)


def _prepared(variant: str, data_dir: str | None) -> Any:
  if data_dir is not None:
    data_dir = os.fspath(paths.resolve(data_dir))
  try:
    builder = tfds.builder(variant, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    name = variant.partition("/")[0].partition(":")[0]
    near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    where = f"in data_dir={data_dir}, nor is it" if data_dir else "here, nor is it"
    raise OptionError(f"Data set {variant!r} is not prepared {where} one that TFDS knows.{hint}") from error
  except ValueError as error:  # an unknown config, or a version that cannot be read
    raise OptionError(f"Data set {variant!r} of TFDS: {error}") from error
  if not builder.is_prepared():
    missing = f" There is no folder {data_dir}." if data_dir and not paths.resolve(data_dir).is_dir() else ""
    raise OptionError(
      f"Data set {variant!r} is not prepared in {builder.data_path}.{missing} "
      f"Prepare it there with tfds.builder({variant!r}, file_format='array_record').download_and_prepare()."
    )
  return builder


def _split(builder: Any, split: str) -> str:
  """Return `split` with the name that the data set uses for it.

  Raises:
    OptionError: the data set has no such split.
  """
  base, bracket, part = split.partition("[")
  present = tuple(builder.info.splits)
  split = (_splits.find(base, present, builder.info.full_name) or base) + bracket + part
  try:
    builder.info.splits[split]
  except (KeyError, ValueError) as error:
    available = ", ".join(present)
    raise OptionError(
      f"Split {split!r} of {builder.info.full_name}: {error} Available: {available}, "
      f"and parts as {present[0]}[:90%]."
    ) from error
  return split


def _check_readable(builder: Any) -> None:
  """Raise an OptionError if the files lie in a bucket that their reader cannot open."""
  place, kind = os.fspath(builder.data_path), builder.info.file_format.value
  if not paths.is_remote(place):
    return
  if "array_record" in kind:
    reason = "the reader of array_record only opens local files"
  elif not place.startswith("gs://"):
    reason = "tf.data, which reads tfrecord files, does not know s3://"
  elif object_stores.endpoint("gs") is not None:
    reason = "tf.data, which reads tfrecord files, only reaches Google's endpoint"
  else:
    return
  raise OptionError(
    f"data_dir={place}: data set {builder.info.full_name} has to lie on a disk of this machine, because "
    f"{reason}. Copy it there, or mount the bucket as a folder."
  )


def _one_size(shape: tuple[int | None, ...]) -> int | None:
  """Return the side of the images in pixels if all are squares of one size, else None."""
  return shape[0] if shape[0] == shape[1] else None


@dataclasses.dataclass(frozen=True)
class _Features:
  """Names of the features that are read from a record. Images and maps stay encoded."""

  image: str
  label: str | None
  label_map: str | None

  def decoders(self) -> dict[str, Any]:
    return {name: tfds.decode.SkipDecoding() for name in (self.image, self.label_map) if name}

  def example(self, record: dict[str, Any], name: str) -> Example:
    label = int(record[self.label]) if self.label else -1
    example = {"image": record[self.image], "label": label, "name": name}
    if self.label_map:
      example |= {"map": record[self.label_map], "map_name": f"{name} ({self.label_map})"}
    return example


class _Indexed:
  """An `array_record` data set, read by index."""

  def __init__(self, builder: Any, split: str, features: _Features):
    self._records = builder.as_data_source(split=split, decoders=features.decoders())
    self._name, self._features = f"{builder.info.full_name}/{split}", features

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    return self._features.example(self._records[index], f"{self._name}/{index}")


@dataclasses.dataclass(frozen=True)
class _Streamed:
  """A `tfrecord` data set, read in sequence. Every process reads an even part of the split."""

  builder: Any
  split: str
  features: _Features
  shuffle_buffer: int

  def num_local(self, process_index: int, process_count: int) -> int:
    return self.builder.info.splits[self._part(process_index, process_count)].num_examples

  def read(self, process_index: int, process_count: int, seed: int | None, skip: int) -> Iterator[Example]:
    tf = _tensorflow()
    options = tf.data.Options()
    options.deterministic = True
    config = tfds.ReadConfig(
      options=options, shuffle_seed=seed, add_tfds_id=True, try_autocache=False, skip_prefetch=True
    )
    if seed is None:
      config.interleave_cycle_length = 1
    records = self.builder.as_dataset(
      split=self._part(process_index, process_count),
      decoders=self.features.decoders(),
      shuffle_files=seed is not None,
      read_config=config,
    )
    if seed is not None:
      records = records.shuffle(self.shuffle_buffer, seed=seed, reshuffle_each_iteration=False)
    starts = self._shard_starts()
    for record in records.skip(skip).prefetch(64).as_numpy_iterator():
      name = record["tfds_id"].decode()  # "<file>-<shard>-of-<shards>__<place in the shard>"
      file, place = name.rsplit("__", 1)
      index = starts[int(file.rsplit("-of-", 1)[0].rsplit("-", 1)[1])] + int(place)
      yield self.features.example(record, name) | {"index": index}

  def _part(self, process_index: int, process_count: int) -> Any:
    return tfds.even_splits(self.split, process_count, drop_remainder=False)[process_index]

  def _shard_starts(self) -> list[int]:
    lengths = self.builder.info.splits[self.split.split("[")[0]].shard_lengths
    return list(itertools.accumulate(lengths, initial=0))


def _tensorflow() -> Any:
  """Return TensorFlow, with the accelerators hidden from it because JAX owns them."""
  startup.hide_accelerators_from_tensorflow()
  import tensorflow

  return tensorflow
