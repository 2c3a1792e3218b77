"""Convert a data set that TFDS prepared as `tfrecord` to `array_record`, which can be read by index.

The records are copied as they are (no image is decoded), shard by shard; `dataset_info.json` is changed to
say so. The result opens with tfds.builder(name, data_dir=<out>). Needs TensorFlow.

  python scripts/tfrecord_to_array_record.py ~/tensorflow_datasets/imagenet2012/5.1.0 --out ~/array_records
"""

import argparse
import json
import os
import pathlib
import shutil

import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordWriter

from dtm_jax.storage import paths

OLD, NEW = "tfrecord", "array_record"


def convert(source: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
  """Convert the folder <name>[/<config>]/<version> into `out`, under the same names; that new folder.

  Shards already converted are kept, so an interrupted run may be started again.

  Raises:
    ValueError: the folder is not a `tfrecord` set of TFDS.
  """
  info_path = source / "dataset_info.json"
  info = json.loads(info_path.read_text()) if info_path.exists() else {}
  if info.get("fileFormat") != OLD:
    raise ValueError(f"{source} is not a folder in which TFDS prepared a data set as {OLD}.")
  config = [info["configName"]] if source.parent.name == info.get("configName") else []
  target = out.joinpath(info["name"], *config, source.name)
  target.mkdir(parents=True, exist_ok=True)
  for path in sorted(source.iterdir()):
    if f".{OLD}-" in path.name:
      _convert_shard(path, target / path.name.replace(f".{OLD}-", f".{NEW}-"))
    elif path != info_path:
      shutil.copyfile(path, target / path.name)
  info["fileFormat"] = NEW
  for split in info["splits"]:
    split["filepathTemplate"] = split["filepathTemplate"].replace(OLD, NEW)
  (target / info_path.name).write_text(json.dumps(info, indent=2))  # last: only a whole set can be opened
  return target


def _convert_shard(source: pathlib.Path, target: pathlib.Path):
  if target.exists():
    return
  partial = target.with_name(target.name + ".partial")
  writer = ArrayRecordWriter(str(partial), "group_size:1")
  for record in tf.data.TFRecordDataset(str(source)).as_numpy_iterator():
    writer.write(record)
  writer.close()
  os.replace(partial, target)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("source", help="the folder that holds dataset_info.json")
  parser.add_argument("--out", required=True, help="a TFDS data_dir")
  args = parser.parse_args()
  reason = "files of array_record are read and written as local files"
  print(
    convert(
      paths.require_local(args.source, "source", reason), paths.require_local(args.out, "--out", reason)
    )
  )


if __name__ == "__main__":
  main()
