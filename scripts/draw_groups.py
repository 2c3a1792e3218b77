"""A dozen test images of CIFAR-10 with their morphed groups: one row an image, one column a number of groups.

    python scripts/draw_groups.py --teacher=assets/tiny_clip_cifar10 --out=groups.png

Every patch is painted with the mean colour of its group, and lines run where two groups meet.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from PIL import Image

from dtm_jax import morphing, plugins
from dtm_jax.augment import normalize, to_float

_TEACHER = flags.DEFINE_string("teacher", None, "Folder of the CLIP whose tokens are matched.", required=True)
_OUT = flags.DEFINE_string("out", "groups.png", "The picture.")
_GROUPS = flags.DEFINE_list("groups", ["48", "32", "16", "8", "4"], "Numbers of groups, one column each.")
_IMAGES = flags.DEFINE_integer("images", 12, "How many images.")
SCALE = 4


def main(_) -> None:
  dataset = plugins.load("datasets", "cifar10").build(split="test")
  image = np.stack([dataset.source[index]["image"] for index in range(_IMAGES.value)])
  teacher = plugins.load("teachers", "clip").build(_TEACHER.value, tokens="normalized")
  target_BNC = teacher.tokens(teacher.params, normalize(to_float(image), teacher.mean, teacher.std))
  columns = [enlarge(image)]
  for num_groups in map(int, _GROUPS.value):
    rounds = 4
    merges_K = morphing.paper_merges(num_groups, rounds, target_BNC.shape[1], rounds)
    label_BN = morphing.bipartite_match(
      target_BNC, jnp.broadcast_to(merges_K, (len(image), rounds)), split="random", key=jax.random.key(0)
    )
    columns.append(paint(image, np.asarray(label_BN).reshape(-1, *teacher.grid), teacher.patch_size))
  picture = np.concatenate(
    [np.pad(column, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255) for column in columns], axis=2
  )
  Image.fromarray(np.concatenate(picture)).save(_OUT.value)


def enlarge(image: np.ndarray) -> np.ndarray:
  """[B, H, W, 3], every pixel SCALE times as large."""
  return image.repeat(SCALE, axis=1).repeat(SCALE, axis=2)


def paint(image: np.ndarray, label: np.ndarray, patch_size: int) -> np.ndarray:
  """The images with the mean colour of each group, and its outlines."""
  owner = label.repeat(patch_size, axis=1).repeat(patch_size, axis=2)
  painted = image.astype(np.float64)
  for pixels, groups in zip(painted, owner, strict=True):
    for group in np.unique(groups):
      pixels[groups == group] = pixels[groups == group].mean(axis=0)
  painted, owner = enlarge(painted.astype(np.uint8)), owner.repeat(SCALE, axis=1).repeat(SCALE, axis=2)
  edge = np.zeros(owner.shape, bool)
  edge[:, 1:] |= owner[:, 1:] != owner[:, :-1]
  edge[:, :, 1:] |= owner[:, :, 1:] != owner[:, :, :-1]
  painted[edge] = 255
  return painted


if __name__ == "__main__":
  app.run(main)
