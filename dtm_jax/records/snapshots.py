"""Keep what a run makes of the same few images over time: the images, and the groups of their tokens.

    WORKDIR/snapshots/images.npz          image uint8 [B, H, W, 3], index [B], label [B] or -1
    WORKDIR/snapshots/step_00000100.npz   index [B], and for each kind of tokens the groups [B, N]

Every file is written whole. A resumed run writes the files of its steps again, with the same content.
"""

import dataclasses
import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from dtm_jax.arrays import Int, UInt8
from dtm_jax.storage import writing

FOLDER = "snapshots"
IMAGES = "images.npz"
_STEP = re.compile(r"step_(\d+)\.npz")


@dataclasses.dataclass(frozen=True)
class Snapshots:
  """The images of a run, and the groups of their tokens at each recorded step.

  Attributes:
    image: the B images as the network saw them, before normalisation.
    index_B: their places among the images that are measured.
    label_B: their classes; -1 means none.
    groups: from step and kind of tokens to the group of each token [B, N].
    unreadable: the names of files that cannot be read.
  """

  image: UInt8[np.ndarray, "B H W 3"]
  index_B: Int[np.ndarray, " B"]
  label_B: Int[np.ndarray, " B"]
  groups: Mapping[int, Mapping[str, Int[np.ndarray, "B N"]]]
  unreadable: tuple[str, ...] = ()


def write_images(
  workdir: epath.Path,
  image: UInt8[np.ndarray, "B H W 3"],
  index_B: Int[np.ndarray, " B"],
  label_B: Int[np.ndarray, " B"],
) -> None:
  """Write the images. Later snapshots of the same `index_B` belong to them."""
  _write(workdir / FOLDER / IMAGES, image=image, index=index_B, label=label_B)


def write_groups(
  workdir: epath.Path,
  step: int,
  index_B: Int[np.ndarray, " B"],
  groups: Mapping[str, Int[np.ndarray, "B N"]],
) -> None:
  """Write the groups of the images' tokens after `step`, by kind of tokens."""
  labels = {name: label_BN.astype(np.uint16) for name, label_BN in groups.items()}
  _write(workdir / FOLDER / f"step_{step:08d}.npz", index=index_B, **labels)


def read(workdir: epath.Path) -> Snapshots | None:
  """Return the snapshots of a run, or None if it has no readable images.

  Groups of other images than the last ones are left out. Files that cannot be read are named.
  """
  folder = workdir / FOLDER
  if not (folder / IMAGES).exists():
    return None
  images = _read(folder / IMAGES)
  if images is None:
    return None
  groups, unreadable = {}, []
  for path in sorted(folder.iterdir()):
    if found := _STEP.fullmatch(path.name):
      content = _read(path)
      if content is None:
        unreadable.append(path.name)
      elif np.array_equal(content.pop("index"), images["index"]):
        groups[int(found[1])] = {name: label_BN.astype(np.int32) for name, label_BN in content.items()}
  return Snapshots(images["image"], images["index"], images["label"], groups, tuple(unreadable))


def _write(path: epath.Path, **arrays: np.ndarray) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  file = io.BytesIO()
  np.savez_compressed(file, allow_pickle=False, **arrays)
  writing.write_whole(path, file.getvalue())


def _read(path: epath.Path) -> dict[str, Any] | None:
  """Return the arrays of a file, or None if the file cannot be read."""
  try:
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
      return {name: file[name] for name in file.files}
  except Exception as error:  # a damaged archive raises many kinds of errors
    logging.warning("%s cannot be read and is left out: %s", path, error)
    return None
