"""Convert a data set that TFDS prepared as `tfrecord` to `array_record`, which is read by index.

    python scripts/tfrecord_to_array_record.py ~/tensorflow_datasets/imagenet2012/5.1.0 --out ~/array_records

The script copies the records shard by shard and decodes no image. It changes only the format in
`dataset_info.json`. `tfds.builder(name, data_dir=<out>)` opens the result. TensorFlow is needed.
"""

import copy
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from dtm_jax import progress
from dtm_jax.errors import OptionError
from dtm_jax.options.command_line import run_script, script_parser, start_above
from dtm_jax.storage import paths

if not __package__:
  start_above(__file__)

from . import array_records

OLD, NEW = "tfrecord", "array_record"
OWN_FILES = ("dataset_info.json", array_records.CHECKSUMS)


def convert(source: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
  """Convert the data set in the folder `source`, and return its new folder in `out`.

  The folder <name>[/<config>]/<version> keeps these names. A second run after an interruption keeps the
  shards that are complete.

  Raises:
    OptionError: `source` is not a `tfrecord` data set of TFDS.
  """
  info = read_info(source, (OLD,))
  target = pathlib.Path(target_of(source, out, info))
  target.mkdir(parents=True, exist_ok=True)
  paths_in_source = sorted(source.iterdir())
  for path in progress.track(paths_in_source, f"Converting {source}", len(paths_in_source), "files"):
    if f".{OLD}-" in path.name:
      shard = target / path.name.replace(f".{OLD}-", f".{NEW}-")
      if not shard.exists():
        array_records.write_shard(shard, read_shard(path))
  write_metadata(source, epath.Path(target), info)
  return target


def read_info(source: pathlib.Path, formats: Sequence[str]) -> dict[str, Any]:
  """Return the content of `dataset_info.json` of a data set in one of the file formats.

  Raises:
    OptionError: the folder has none, or the data set is in another format.
  """
  path = source / "dataset_info.json"
  info = json.loads(path.read_text()) if path.exists() else {}
  if info.get("fileFormat") not in formats:
    raise OptionError(
      f"{source} is not a folder in which TFDS prepared a data set as {' or '.join(formats)}."
    )
  return info


def target_of(source: pathlib.Path, out: os.PathLike, info: dict[str, Any]) -> epath.Path:
  """Return the folder <name>[/<config>]/<version> in `out`."""
  config = [info["configName"]] if source.parent.name == info.get("configName") else []
  return epath.Path(out).joinpath(info["name"], *config, source.name)


def read_shard(path: pathlib.Path) -> Iterator[bytes]:
  """Yield the records of a `tfrecord` file."""
  import tensorflow as tf

  yield from tf.data.TFRecordDataset(str(path)).as_numpy_iterator()


def write_metadata(source: pathlib.Path, target: epath.Path, info: dict[str, Any]) -> None:
  """Copy the files that are not shards. `dataset_info.json` gets the new format."""
  old = info["fileFormat"]
  for path in sorted(source.iterdir()):
    if path.is_file() and f".{old}-" not in path.name and path.name not in OWN_FILES:
      (target / path.name).write_bytes(path.read_bytes())
  info = copy.deepcopy(info) | {"fileFormat": NEW}
  for split in info["splits"]:
    split["filepathTemplate"] = split["filepathTemplate"].replace(OLD, NEW)
  # TFDS opens a folder that has this file, so the file comes last, when the data set is complete.
  (target / "dataset_info.json").write_text(json.dumps(info, indent=2))


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
