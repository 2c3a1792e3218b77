"""Prepare ImageNet-1k as ArrayRecord files, which a run reads by index, so that a resumed run starts at once.

    python scripts/prepare_imagenet.py ~/archives --out ~/imagenet     # the two tar files of image-net.org
    python scripts/prepare_imagenet.py ~/tensorflow_datasets/imagenet2012/5.1.0 --out gs://BUCKET/imagenet
    python scripts/prepare_imagenet.py ~/ILSVRC --out ~/imagenet       # train/<synset>/ and val/<synset>/
    python scripts/prepare_imagenet.py --out ~/imagenet --verify       # read all shards again

Then `--config.data.dataset.data_dir=~/imagenet` names the data. Encoded images are copied as they are.
Archives are not unpacked. Their images are read in a random order, so the archives belong on an SSD. The
labels of the validation images come from ILSVRC2012_devkit_t12.tar.gz if it lies beside the archives, or else
from TFDS. A second start after an interruption checks and keeps the finished shards.
"""

import io
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from dtm_jax.errors import NotThereError, OptionError
from dtm_jax.options.command_line import run_script, script_parser, start_above
from dtm_jax.storage import paths, writing

if not __package__:
  start_above(__file__)

from . import array_records, imagenet_sources, tfrecord_to_array_record
from .array_records import Checksums, Shard
from .imagenet_sources import Image

NAME, VERSION = "imagenet2012", "5.1.0"
SHARDS = {"train": 1024, "validation": 64}


def prepare_images(
  source: pathlib.Path, out: epath.Path, *, shards: dict[str, int], seed: int, workers: int
) -> epath.Path:
  """Write the images of archives or of a tree, shuffled once, and return the folder of the data set.

  Args:
    shards: number of shards of each split; a split with fewer images has as many shards as images.
    seed: of the order of the images.
  """
  import tensorflow_datasets as tfds

  splits = imagenet_sources.find(source)
  folder = out / NAME / VERSION
  _require_space(folder, sum(image.size for images in splits.values() for image in images))
  builder = tfds.builder(f"{NAME}:{VERSION}", data_dir=os.fspath(out), file_format="array_record")
  writing.make_writable_folder(folder, "--out")
  checksums = Checksums(folder)
  counts = {split: min(shards[split], len(images)) for split, images in splits.items()}
  sizes = {split: [len(images), sum(image.size for image in images)] for split, images in splits.items()}
  checksums.begin({"source": "images", "images and bytes": sizes, "shards": counts, "seed": seed})
  lengths, plan = {}, []
  for split, images in splits.items():
    parts = np.array_split(np.random.default_rng(seed).permutation(len(images)), counts[split])
    lengths[split] = [len(part) for part in parts]
    for number, part in enumerate(parts):
      name = f"{NAME}-{split}.array_record-{number:05d}-of-{counts[split]:05d}"
      chosen = [images[index] for index in part]
      plan.append(Shard(name, lambda chosen=chosen: _examples(chosen, builder.info.features)))  # type: ignore[misc]
  array_records.write_shards(plan, checksums, workers)
  _write_info(builder, folder, lengths, checksums)
  return folder


def prepare_tfds(source: pathlib.Path, out: epath.Path, *, workers: int) -> epath.Path:
  """Write the shards of a data set that TFDS prepared, in its order, and return the new folder."""
  info = tfrecord_to_array_record.read_info(source, ("tfrecord", "array_record"))
  folder = epath.Path(tfrecord_to_array_record.target_of(source, out, info))
  if folder == epath.Path(source):
    raise OptionError(f"--out={out} has the data set {source} itself. Give another folder.")
  _require_space(folder, sum(path.stat().st_size for path in source.iterdir()))
  writing.make_writable_folder(folder, "--out")
  checksums = Checksums(folder)
  old = info["fileFormat"]
  files = sorted(path for path in source.iterdir() if f".{old}-" in path.name)
  checksums.begin(
    {"source": info["name"], "format": old, "bytes": sum(path.stat().st_size for path in files)}
  )
  plan = [
    Shard(path.name.replace(f".{old}-", ".array_record-"), lambda path=path: _records(path))  # type: ignore[misc]
    for path in files
  ]
  array_records.write_shards(plan, checksums, workers)
  tfrecord_to_array_record.write_metadata(source, folder, info)
  return folder


def _examples(images: Sequence[Image], features: Any) -> Iterator[bytes]:
  """Yield the records of images, as TFDS reads them. The same images always give the same bytes."""
  from tensorflow_datasets.proto import tf_example_pb2

  for image in images:
    record = features.serialize_example(
      {"image": io.BytesIO(image.read()), "label": image.synset, "file_name": image.name}
    )
    yield tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)  # features in order


def _records(path: pathlib.Path) -> Iterator[bytes]:
  """Return the records of a shard in either format."""
  read = array_records.read_shard if ".array_record-" in path.name else tfrecord_to_array_record.read_shard
  return read(path)


def _write_info(
  builder: Any, folder: epath.Path, lengths: dict[str, list[int]], checksums: Checksums
) -> None:
  """Write the files that TFDS opens. `dataset_info.json` comes last, when the data set is complete."""
  import tensorflow_datasets as tfds

  with writing.local_folder_for(folder) as local:
    infos = []
    for split, shard_lengths in lengths.items():
      size = sum(entry["bytes"] for name, entry in checksums.shards.items() if f"-{split}." in name)
      template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(local), dataset_name=NAME, split=split, filetype_suffix="array_record"
      )
      infos.append(
        tfds.core.SplitInfo(
          name=split, shard_lengths=shard_lengths, num_bytes=size, filename_template=template
        )
      )
    builder.info.set_splits(tfds.core.splits.SplitDict(infos))
    builder.info.write_to_directory(local)


def _require_space(folder: epath.Path, size: int) -> None:
  """Raise an OptionError if a local disk has less free space than the shards need."""
  if paths.is_remote(folder):
    return
  place = pathlib.Path(folder)
  done = sum(path.stat().st_size for path in place.glob("*.array_record-*")) if place.exists() else 0
  while not place.exists():
    place = place.parent
  free = shutil.disk_usage(place).free
  if free + done < size:
    raise OptionError(
      f"--out: the disk of {folder} has {free / 1e9:.1f} GB free, and the shards need "
      f"{(size - done) / 1e9:.1f} GB."
    )


def _folder_to_verify(out: epath.Path) -> epath.Path:
  """Return the folder with checksums: `out` itself, or the data set in it."""
  for folder in (out, out / NAME / VERSION, *sorted((out / NAME).glob("*"))):
    if (folder / array_records.CHECKSUMS).exists():
      return folder
  raise NotThereError(f"--out={out}: neither this folder nor {NAME}/{VERSION} has {array_records.CHECKSUMS}.")


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  parser = script_parser(__doc__)
  add = parser.add_argument
  add("source", nargs="?", help="folder of the archives, of the tree, or of dataset_info.json")
  add("--out", required=True, help="a data_dir of TFDS to write to, local or in a bucket")
  add("--seed", type=int, default=0, help="of the order of the images (default: 0)")
  add("--train-shards", type=int, default=SHARDS["train"], help="default: 1024, of 140 MB each")
  add("--val-shards", type=int, default=SHARDS["validation"], help="default: 64")
  add("--workers", type=int, default=8, help="shards that are written at the same time (default: 8)")
  add("--verify", action="store_true", help="only read all shards again and compare their checksums")
  args = parser.parse_args(argv)
  for option in ("train_shards", "val_shards", "workers"):
    if getattr(args, option) < 1:
      raise OptionError(f"--{option.replace('_', '-')}={getattr(args, option)} must be at least 1.")
  out = paths.resolve(args.out)
  if args.verify:
    folder = _folder_to_verify(out)
  else:
    if args.source is None:
      raise OptionError(
        "The source is missing: the folder of the archives, of the tree, or of dataset_info.json."
      )
    source = pathlib.Path(paths.require_local(args.source, "source", "its files are read as local files"))
    if not source.is_dir():
      raise NotThereError(f"There is no folder {source}.")
    if (source / "dataset_info.json").exists():
      folder = prepare_tfds(source, out, workers=args.workers)
    else:
      shards = {"train": args.train_shards, "validation": args.val_shards}
      folder = prepare_images(source, out, shards=shards, seed=args.seed, workers=args.workers)
  count, records = array_records.verify(folder)
  logging.info("%s: %d shards with %s images, all as they were written.", folder, count, f"{records:,}")
  print(folder)


if __name__ == "__main__":
  run_script(main)
