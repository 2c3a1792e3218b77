"""Draw the groups of patches of images, at the end of the matching and after each of its rounds."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dtm_jax import morphing
from dtm_jax.arrays import Array, Float, Int, Shaped
from dtm_jax.pictures.sheet import Figure, Image, Sheet, grid_for

Images = Shaped[Array | np.ndarray, "... H W 3"]
Labels = Int[Array | np.ndarray, "... N"]


def group_tokens(
  target_BNC: Float[Array | np.ndarray, "B N C"], num_groups: int, merges: int = 4
) -> Int[Array, "B N"]:
  """Match until exactly `num_groups` groups remain, in rounds of at most `merges` merges.

  The split of each round is random, with a fixed key. Training draws its schedules at random instead; a
  picture needs a fixed number of groups.

  >>> label_BN = group_tokens(jax.random.normal(jax.random.key(0), (1, 16, 8)), num_groups=5)
  >>> len(set(label_BN[0].tolist()))
  5

  Raises:
    ValueError: `num_groups` is not between 1 and N, or `merges` is below 1.
  """
  left = target_BNC.shape[1]
  if not 1 <= num_groups <= left or merges < 1:
    raise ValueError(f"num_groups={num_groups} must be 1 to {left}, and merges={merges} at least 1.")
  schedule = []
  while left > num_groups:
    schedule.append(min(merges, left // 2, left - num_groups))  # a round can at most halve the tokens
    left -= schedule[-1]
  merges_K = jnp.array(schedule or [0], jnp.int32)
  target_BNC = jnp.asarray(target_BNC)
  return morphing.bipartite_match(target_BNC, merges_K, split="random", key=jax.random.key(0))


def label_after_rounds(
  target_BNC: Float[Array | np.ndarray, "B N C"], merges_K: Int[Array | np.ndarray, " K"], **options: Any
) -> Int[np.ndarray, "P B N"]:
  """Return the labels before the first round and after each of the K rounds, P = K + 1.

  Args:
    merges_K: r_p, the number of tokens that round p merges.
    options: those of `morphing.bipartite_match`.

  >>> token_BNC = jax.random.normal(jax.random.key(0), (1, 16, 8))
  >>> label_PBN = label_after_rounds(token_BNC, np.array([4, 4]))
  >>> [len(set(label_BN[0].tolist())) for label_BN in label_PBN]
  [16, 12, 8]
  """
  target_BNC = jnp.asarray(target_BNC)
  match = jax.jit(lambda merges_K: morphing.bipartite_match(target_BNC, merges_K, **options))
  round_K = np.arange(merges_K.shape[0])
  # A round without merges changes nothing, and each round has its own random split.
  stopped = [jnp.where(round_K < done, jnp.asarray(merges_K), 0) for done in range(len(round_K) + 1)]
  return np.stack([np.asarray(match(merges_K)) for merges_K in stopped])


def draw_groups(
  image: Images,
  label: Labels | Mapping[str, Labels],
  *,
  grid: tuple[int, int] | None = None,
  halves: int = 1,
  inches: float = 1.0,
) -> Figure:
  """Draw images beside their groups of patches, which have the mean colour of their pixels.

  Args:
    image: one image or several, uint8, or float from 0 to 1.
    label: the group of each patch, [N] or [B, N] as the images. A mapping from titles to labels gives a
      column for each.
    grid: (rows, columns) of patches. By default, the grid has the shape of the image.
    halves: the second half of the images stands beside the first for 2, and so on.
    inches: width of an image.

  >>> image = np.zeros((32, 32, 3), np.uint8)
  >>> figure = draw_groups(image, np.array([0, 0, 2, 2]))
  >>> figure.savefig("/dev/null", format="png")  # or figure.savefig("groups.png")

  Raises:
    ValueError: the labels do not fit the images, or float images have values outside of 0 to 1.
    MissingMatplotlibError: matplotlib is not installed.
  """
  image_BHW3 = np.asarray(image)
  low, high = image_BHW3.min(), image_BHW3.max()
  if image_BHW3.dtype != np.uint8 and not (low >= -1e-3 and high <= 1 + 1e-3):  # also if a value is NaN
    raise ValueError(f"Float images must have values from 0 to 1, but theirs are {low:.4g} to {high:.4g}.")
  if image_BHW3.ndim == 3:
    image_BHW3 = image_BHW3[None]
  columns = {title: np.asarray(each) for title, each in label.items()} if isinstance(label, Mapping) else {}
  if not isinstance(label, Mapping):
    columns[_count_words(np.asarray(label))] = np.asarray(label)
  label_CBN = np.stack([each if each.ndim == 2 else each[None] for each in columns.values()])
  if label_CBN.shape[1] != len(image_BHW3):
    raise ValueError(f"{len(image_BHW3)} images have labels of {label_CBN.shape[1]} images.")
  grid = grid or grid_for(image_BHW3[0], label_CBN.shape[2])
  width = 1 + len(columns)
  halves = min(halves, len(image_BHW3))
  rows = -(-len(image_BHW3) // halves)
  sheet = Sheet(grid, rows, width * halves, inches=inches)
  for place, title in enumerate(["image", *columns] * halves):
    sheet.title(0, place, title)
  for index, pixels in enumerate(image_BHW3):
    half, row = divmod(index, rows)
    sheet.photo(row, half * width, pixels)
    for place, label_BN in enumerate(label_CBN, start=1):
      sheet.groups(row, half * width + place, pixels, label_BN[index].reshape(grid))
  return sheet.figure


def draw_rounds(
  image: Image,
  label_PN: Int[Array | np.ndarray, "P N"],
  *,
  grid: tuple[int, int] | None = None,
  columns: int = 4,
  inches: float = 1.6,
) -> Figure:
  """Draw the groups of one image after each round of matching, with a line between groups that merged.

  Args:
    label_PN: labels before the first round and after each, such as `label_after_rounds(...)[:, 0]`.
    grid: (rows, columns) of patches. By default, the grid has the shape of the image.
    columns: number of panels in a row.
    inches: width of a panel.

  >>> label_PBN = label_after_rounds(jax.random.normal(jax.random.key(0), (1, 16, 8)), np.array([4, 4]))
  >>> figure = draw_rounds(np.zeros((32, 32, 3), np.uint8), label_PBN[:, 0])

  Raises:
    ValueError: the labels do not fit the image.
    MissingMatplotlibError: matplotlib is not installed.
  """
  label_PN = np.asarray(label_PN)
  grid = grid or grid_for(image, label_PN.shape[1])
  columns = min(columns, len(label_PN))
  sheet = Sheet(grid, -(-len(label_PN) // columns), columns, inches=inches, every_title=True)
  for done, label_N in enumerate(label_PN):
    row, column = divmod(done, columns)
    count = _count_words(label_N)
    sheet.title(row, column, f"round {done}: {count}" if done else f"{count} at the start")
    sheet.groups(row, column, image, label_N.reshape(grid))
    for merged in _merged_centres(label_PN[max(0, done - 1)], label_N, grid):
      for width, colour in ((2.2, "black"), (1.0, "white")):
        sheet.line(
          row, column, merged, color=colour, linewidth=width, marker="o", markersize=1.2 + width,
          markeredgewidth=0, solid_capstyle="round",
        )  # fmt: skip
  return sheet.figure


def _merged_centres(
  before_N: Int[np.ndarray, " N"], after_N: Int[np.ndarray, " N"], grid: tuple[int, int]
) -> list[Float[np.ndarray, "L 2"]]:
  """Return, for each group that a round made of several, the centres (x, y) of these, in units of a patch."""
  place_N2 = np.stack(np.divmod(np.arange(len(after_N)), grid[1])[::-1], axis=1) + 0.5
  parts = [np.unique(before_N[after_N == group]) for group in np.unique(after_N)]
  centres = lambda groups: np.stack([place_N2[before_N == group].mean(axis=0) for group in groups])
  return [centres(groups) for groups in parts if len(groups) > 1]


def _count_words(label: Int[np.ndarray, "*B N"]) -> str:
  """Return how many groups the labels have, in words: "12 groups", or "5 to 9 groups"."""
  counts = [len(np.unique(label_N)) for label_N in label.reshape(-1, label.shape[-1])]
  low, high = min(counts), max(counts)
  if low != high:
    return f"{low} to {high} groups"
  return f"{low} groups" if low > 1 else "one group"
