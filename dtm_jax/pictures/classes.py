"""Draw the class of each patch of an image."""

from collections.abc import Mapping, Sequence

import numpy as np

from dtm_jax.arrays import Array, Int, Shaped
from dtm_jax.pictures.sheet import COLOURS, TEXT_POINTS, Figure, Sheet, grid_for, require

OTHER = "#999999"
LEGEND_INCHES = 1.0


def draw_token_classes(
  image_BHW3: Shaped[Array | np.ndarray, "B H W 3"],
  class_BN: Mapping[str, Int[Array | np.ndarray, "B N"]],
  class_names: Sequence[str],
  *,
  grid: tuple[int, int] | None = None,
  inches: float = 1.1,
) -> Figure:
  """Draw images beside maps of the class that a classifier gives to each patch.

  The seven most frequent classes have colours, and all others are grey.

  Args:
    class_BN: the class of each token. A mapping from titles gives a column for each, such as the tokens
      before and after morphing.
    class_names: the names for the legend.
    grid: (rows, columns) of patches. By default, the grid has the shape of the images.
    inches: width of an image.

  >>> image_BHW3, class_BN = np.zeros((1, 32, 32, 3), np.uint8), np.array([[0, 1, 1, 1]])
  >>> figure = draw_token_classes(image_BHW3, {"tokens": class_BN}, ["cat", "ship"])

  Raises:
    ValueError: the classes do not fit the images.
    MissingMatplotlibError: matplotlib is not installed.
  """
  found = {title: np.asarray(each) for title, each in class_BN.items()}
  image_BHW3 = np.asarray(image_BHW3)
  grid = grid or grid_for(image_BHW3[0], next(iter(found.values())).shape[1])
  counts = np.bincount(np.concatenate([each.reshape(-1) for each in found.values()]))
  frequent = [int(index) for index in np.argsort(-counts, kind="stable")[: len(COLOURS)] if counts[index]]
  to_rgb = require("matplotlib.colors").to_rgb
  colour_G3 = np.tile(to_rgb(OTHER), (len(counts), 1))
  colour_G3[frequent] = [to_rgb(colour) for colour in COLOURS[: len(frequent)]]
  sheet = Sheet(grid, len(image_BHW3), 1 + len(found), inches=inches, right=LEGEND_INCHES)
  for place, title in enumerate(["image", *found]):
    sheet.title(0, place, title)
  for row, pixels in enumerate(image_BHW3):
    sheet.photo(row, 0, pixels)
    for place, each in enumerate(found.values(), start=1):
      sheet.map(row, place, colour_G3[each[row].reshape(grid)])
  patch = require("matplotlib.patches").Patch
  handles = [patch(color=tuple(colour_G3[index]), label=class_names[index]) for index in frequent]
  if len(frequent) < np.count_nonzero(counts):
    handles.append(patch(color=OTHER, label="others"))
  sheet.figure.legend(handles=handles, loc="center right", fontsize=TEXT_POINTS, frameon=False)
  return sheet.figure
