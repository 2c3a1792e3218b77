"""Fetch three photos of PASCAL VOC with their label maps: real data, but only enough to see that all works.

They are the example of semantic segmentation in the source package of `labelme` (PyPI; GPL-3.0), outlined by
hand: 20 classes and the background, of which a few occur, and 255 where nobody would say. Written to
<out>/images/train/*.jpg, <out>/annotations/train/*.png and <out>/classes.txt, which
`dtm_jax.datasets.segmentation_folder` reads.

  python scripts/get_segmentation_photos.py --out ~/.cache/dtm_jax/segmentation_photos
"""

import argparse
import hashlib
import io
import pathlib
import subprocess
import sys
import tarfile
import tempfile

from dtm_jax.storage import paths

PACKAGE = "labelme==6.3.1"
SHA256 = "2947e0d8341a92faa7b3ee50cf4b672f838051c6bf24892526e95b64fd3a707e"
FOLDER = "labelme-6.3.1/examples/semantic_segmentation/data_dataset_voc"
PLACES = {"JPEGImages": "images/train", "SegmentationClass": "annotations/train"}


def fetch() -> bytes:
  """The package's source archive, checked."""
  with tempfile.TemporaryDirectory() as work:
    command = [
      sys.executable,
      "-m",
      "pip",
      "download",
      "--no-deps",
      "--no-binary=labelme",
      "--quiet",
      PACKAGE,
    ]
    subprocess.run([*command, "-d", work], check=True)
    (path,) = pathlib.Path(work).iterdir()
    archive = path.read_bytes()
  digest = hashlib.sha256(archive).hexdigest()
  if digest != SHA256:
    raise ValueError(f"{PACKAGE} has SHA-256 {digest}, expected {SHA256}.")
  return archive


def export(archive: bytes, out: pathlib.Path) -> int:
  """Write photos, maps and class names; the number of photos."""
  count = 0
  with tarfile.open(fileobj=io.BytesIO(archive)) as package:
    for member in package.getmembers():
      parent, _, name = member.name.rpartition("/")
      folder, _, kind = parent.rpartition("/")
      if member.name == f"{FOLDER}/class_names.txt":
        target = out / "classes.txt"
      elif member.isfile() and folder == FOLDER and kind in PLACES:
        target = out / PLACES[kind] / name
        count += kind == "JPEGImages"
      else:
        continue
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(package.extractfile(member).read())
  return count


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", required=True)
  out = paths.require_local(parser.parse_args().out, "--out", "a folder of images is read as local files")
  print(f"{out}: {export(fetch(), out)} photos")


if __name__ == "__main__":
  main()
