"""Convert a data set that TFDS prepared as `tfrecord` to `array_record`, which is read by index.

    python scripts/tfrecord_to_array_record.py ~/tensorflow_datasets/imagenet2012/5.1.0 --out ~/array_records

The script copies the records shard by shard and decodes no image. It changes only the format in
`dataset_info.json`. `tfds.builder(name, data_dir=<out>)` opens the result. TensorFlow is needed.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Sequence

from dtm_jax import progress
from dtm_jax.errors import OptionError
from dtm_jax.options.command_line import run_script, script_parser
from dtm_jax.storage import paths

OLD, NEW = "tfrecord", "array_record"


def convert(source: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
  """Convert the data set in the folder `source`, and return its new folder in `out`.

  The folder <name>[/<config>]/<version> keeps these names. A second run after an interruption keeps the
  shards that are complete.

  Raises:
    OptionError: `source` is not a `tfrecord` data set of TFDS.
  """
  info_path = source / "dataset_info.json"
  info = json.loads(info_path.read_text()) if info_path.exists() else {}
  if info.get("fileFormat") != OLD:
    raise OptionError(f"{source} is not a folder in which TFDS prepared a data set as {OLD}.")
  config = [info["configName"]] if source.parent.name == info.get("configName") else []
  target = out.joinpath(info["name"], *config, source.name)
  target.mkdir(parents=True, exist_ok=True)
  paths_in_source = sorted(source.iterdir())
  for path in progress.track(paths_in_source, f"Converting {source}", len(paths_in_source), "files"):
    if f".{OLD}-" in path.name:
      _convert_shard(path, target / path.name.replace(f".{OLD}-", f".{NEW}-"))
    elif path != info_path:
      shutil.copyfile(path, target / path.name)
  info["fileFormat"] = NEW
  for split in info["splits"]:
    split["filepathTemplate"] = split["filepathTemplate"].replace(OLD, NEW)
  # TFDS opens a folder that has this file, so the file comes last, when the data set is complete.
  (target / info_path.name).write_text(json.dumps(info, indent=2))
  return target


def _convert_shard(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copy the records of one shard, unless `target` exists."""
  import tensorflow as tf
  from array_record.python.array_record_module import ArrayRecordWriter

  if target.exists():
    return
  partial = target.with_name(target.name + ".partial")
  writer = ArrayRecordWriter(str(partial), "group_size:1")
  for record in tf.data.TFRecordDataset(str(source)).as_numpy_iterator():
    writer.write(record)
  writer.close()
  os.replace(partial, target)


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  parser = script_parser(__doc__)
  parser.add_argument("source", help="the folder that contains dataset_info.json")
  parser.add_argument("--out", required=True, help="a data_dir of TFDS")
  args = parser.parse_args(argv)
  reason = "files of array_record are read and written as local files"
  source, out = (
    paths.require_local(args.source, "source", reason),
    paths.require_local(args.out, "--out", reason),
  )
  print(convert(source, out))


if __name__ == "__main__":
  run_script(main)
