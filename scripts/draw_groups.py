"""A dozen test images of CIFAR-10 with their morphed groups: beside each image, a column a number of groups.

    python scripts/draw_groups.py --teacher=assets/tiny_clip_cifar10 --out=groups.png

Every patch is painted with the mean colour of its group, and lines run where two groups meet.
"""

import jax
import numpy as np
from absl import app, flags
from einops import rearrange
from PIL import Image, ImageDraw

from dtm_jax import morphing, plugins
from dtm_jax.augment import normalize, to_float

SCALE, HEADER = 4, 24


def main(_) -> None:
  dataset = plugins.load("datasets", "cifar10").build(split="test")
  image = np.stack([dataset.source[index]["image"] for index in range(_IMAGES.value)])
  teacher = plugins.load("teachers", "clip").build(_TEACHER.value, tokens="normalized")
  target_BNC = teacher.tokens(teacher.params, normalize(to_float(image), teacher.mean, teacher.std))
  columns = [enlarge(image)]
  for num_groups in map(int, _GROUPS.value):
    label_BN = match(target_BNC, num_groups)
    columns.append(paint(image, np.asarray(label_BN).reshape(-1, *teacher.grid), teacher.patch_size))
  lay_out(columns, ["image", *(f"{number} groups" for number in _GROUPS.value)]).save(_OUT.value)


def match(target_BNC: jax.Array, num_groups: int, merges: int = 4) -> jax.Array:
  """Labels of exactly `num_groups` groups, in rounds of few merges: a round can at most halve the tokens."""
  num_tokens = target_BNC.shape[1]
  rounds = -(-(num_tokens - num_groups) // merges)
  merges_K = morphing.paper_merges(num_groups, rounds, num_tokens, rounds)
  label_BN = morphing.bipartite_match(target_BNC, merges_K, split="random", key=jax.random.key(0))
  if (found := set(np.unique(morphing.num_groups(label_BN)).tolist())) != {num_groups}:
    raise ValueError(f"{num_groups} groups of {num_tokens} tokens are out of reach; found {found}.")
  return label_BN


def lay_out(columns: list[np.ndarray], titles: list[str], halves: int = 2, margin: int = 2) -> Image.Image:
  """Columns of pictures [B, h, w, 3] under their titles, the second half of the images beside the first."""
  padding = ((0, 0), (margin, margin), (margin, margin), (0, 0))
  tiles = np.stack([np.pad(column, padding, constant_values=255) for column in columns])
  pictures = rearrange(tiles, "c (half b) h w rgb -> (b h) (half c w) rgb", half=halves)
  image = Image.fromarray(np.pad(pictures, ((HEADER, 0), (0, 0), (0, 0)), constant_values=255))
  for place, title in enumerate(titles * halves):
    position = ((place + 0.5) * image.width / len(titles) / halves, HEADER / 2)
    ImageDraw.Draw(image).text(position, title, fill="black", anchor="mm", font_size=HEADER * 0.6)
  return image


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


if __name__ == "__main__":  # the flags too: scripts/consistency_drawing.py imports this file
  _TEACHER = flags.DEFINE_string(
    "teacher", None, "Folder of the CLIP whose tokens are matched.", required=True
  )
  _OUT = flags.DEFINE_string("out", "groups.png", "The picture.")
  _GROUPS = flags.DEFINE_list("groups", ["48", "32", "16", "8", "4"], "Numbers of groups, one column each.")
  _IMAGES = flags.DEFINE_integer("images", 12, "How many images.")
  app.run(main)
