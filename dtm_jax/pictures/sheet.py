"""A sheet of panels of the same size: photos, groups of patches and maps, each under a title.

All panels share one pair of axes, whose unit is a patch. That is faster than one pair for each panel, and
the lines keep their width at any size of the figure.
"""

import importlib
import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dtm_jax.arrays import Array, Float, Int, Shaped
from dtm_jax.errors import UserError

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure
else:
  Axes = Figure = Any  # matplotlib is imported when a figure is made

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""The colours of Okabe and Ito, which people with colour blindness can tell apart."""
TEXT_POINTS = 7.0
GAP = 0.05
"""Distance of two panels, as a share of a panel's width."""
TITLE_INCHES = 0.19
Image = Shaped[Array | np.ndarray, "H W 3"]


class MissingMatplotlibError(UserError, ImportError):
  """matplotlib is not installed."""


def require(module: str) -> Any:
  """Import a module of matplotlib.

  Raises:
    MissingMatplotlibError: it is not installed. The message gives the command that installs it.
  """
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "matplotlib":
      raise
    message = 'Pictures need matplotlib, which is not installed: pip install "dtm_jax[studies]"'
    raise MissingMatplotlibError(message) from error


def new_figure(width: float, height: float, **options: Any) -> Figure:
  """Return an empty figure of this size in inches. pyplot does not know it, so nothing has to be closed."""
  return require("matplotlib.figure").Figure(figsize=(width, height), dpi=150, **options)


def to_svg(figure: Figure, name: str = "figure") -> str:
  """Return the figure as an `<svg>` element, without the lines that only a file of its own needs.

  Args:
    name: several figures in one page need several names, because SVG elements are referred to by id.

  >>> from dtm_jax.pictures import draw_groups
  >>> to_svg(draw_groups(np.zeros((8, 8, 3), np.uint8), np.array([0, 0, 2, 3])))[:4]
  '<svg'
  """
  file = io.StringIO()
  with require("matplotlib").rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
    figure.savefig(file, format="svg", metadata={"Date": None})
  text = file.getvalue()
  return text[text.index("<svg") :]


def as_pixels(image: Image) -> Float[np.ndarray, "H W 3"]:
  """Return the image with values from 0 to 1. The values of a uint8 image are divided by 255."""
  pixels = np.asarray(image)
  return pixels / 255.0 if pixels.dtype == np.uint8 else pixels.astype(np.float64).clip(0.0, 1.0)


def mean_colours(image: Image, grid: tuple[int, int]) -> Float[np.ndarray, "R Q 3"]:
  """Return the mean colour of each patch, from 0 to 1. Pixels beyond the last whole patch do not count."""
  (rows, columns), pixels = grid, as_pixels(image)
  height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
  pixels = pixels[: rows * height, : columns * width]
  return pixels.reshape(rows, height, columns, width, 3).mean(axis=(1, 3))


def border_segments(label_RQ: Int[np.ndarray, "R Q"]) -> Float[np.ndarray, "L 2 2"]:
  """Return the sides of patches where two groups meet, as two points (x, y) each, in units of a patch."""
  row, column = np.nonzero(label_RQ[:, 1:] != label_RQ[:, :-1])
  upright = np.stack([np.stack([column + 1, row], -1), np.stack([column + 1, row + 1], -1)], axis=1)
  row, column = np.nonzero(label_RQ[1:] != label_RQ[:-1])
  level = np.stack([np.stack([column, row + 1], -1), np.stack([column + 1, row + 1], -1)], axis=1)
  return np.concatenate([upright, level]).astype(np.float64)


class Sheet:
  """A figure with a table of panels.

  Args:
    grid: (rows, columns) of patches in a panel.
    rows, columns: number of panels.
    inches: width of a panel.
    every_title: whether each row of panels has titles. By default, only the first row has.
    right: inches to leave free at the right, for a scale of colours.
  """

  def __init__(
    self,
    grid: tuple[int, int],
    rows: int,
    columns: int,
    *,
    inches: float,
    every_title: bool = False,
    right: float = 0.0,
  ):
    self.grid = grid
    scale = inches / grid[1]  # inches of a patch
    self._gap, self._title = GAP * grid[1], TITLE_INCHES / scale
    self._title_rows = rows if every_title else 1
    width, height = self._corner(rows, columns)
    self.figure = new_figure(width * scale + right, height * scale)
    share = width * scale / (width * scale + right)
    self.axes: Axes = self.figure.add_axes((0, 0, share, 1))
    self.axes.set(xlim=(0, width), ylim=(height, 0))
    self.axes.set_autoscale_on(False)
    self.axes.axis("off")

  def title(self, row: int, column: int, text: str) -> None:
    """Write a title above a panel."""
    x, y = self._corner(row, column)
    x += self.grid[1] / 2
    self.axes.text(x, y - self._title * 0.45, text, ha="center", va="center", fontsize=TEXT_POINTS)

  def photo(self, row: int, column: int, image: Image) -> None:
    """Place a photo in a panel, without the pixels beyond the last whole patch."""
    height, width = (side // count * count for side, count in zip(image.shape[:2], self.grid, strict=True))
    self._show(row, column, as_pixels(image)[:height, :width], interpolation="auto")

  def groups(self, row: int, column: int, image: Image, label_RQ: Int[np.ndarray, "R Q"]) -> None:
    """Place a map in which each group has its mean colour, with lines between the groups."""
    colour_RQ3 = mean_colours(image, self.grid)
    for group in np.unique(label_RQ):
      colour_RQ3[label_RQ == group] = colour_RQ3[label_RQ == group].mean(axis=0)
    self.map(row, column, colour_RQ3)
    self.borders(row, column, label_RQ)

  def borders(self, row: int, column: int, label_RQ: Int[np.ndarray, "R Q"]) -> None:
    """Draw white lines with a dark rim between groups, so that they can be seen on any colour."""
    corner, patches = self._corner(row, column), require("matplotlib.patches")
    points = border_segments(label_RQ).reshape(-1, 2) + np.array(corner)
    if not len(points):
      return
    path = require("matplotlib.path").Path(points, [1, 2] * (len(points) // 2))  # MOVETO, LINETO
    panel = patches.Rectangle(corner, self.grid[1], self.grid[0], transform=self.axes.transData)
    for width, colour in ((1.2, (0, 0, 0, 0.35)), (0.7, "white")):
      lines = patches.PathPatch(path, fill=False, linewidth=width, edgecolor=colour, capstyle="projecting")
      self.axes.add_patch(lines)
      lines.set_clip_path(panel)

  def map(
    self, row: int, column: int, value: Float[np.ndarray, "R Q *C"], lowest: float = 0.0, highest: float = 1.0
  ) -> Any:
    """Place a map of one colour, or of one number, for each patch, and return its artist."""
    return self._show(row, column, value, interpolation="none", cmap="viridis", vmin=lowest, vmax=highest)

  def line(self, row: int, column: int, point_L2: Float[np.ndarray, "L 2"], **options: Any) -> None:
    """Draw a line through points (x, y), in units of a patch. The options are those of `Axes.plot`."""
    place = point_L2 + np.array(self._corner(row, column))
    self.axes.plot(place[:, 0], place[:, 1], **options)

  def _show(self, row: int, column: int, value: Any, **options: Any) -> Any:
    x, y = self._corner(row, column)
    extent = (x, x + self.grid[1], y + self.grid[0], y)
    return self.axes.imshow(value, extent=extent, aspect="auto", **options)

  def _corner(self, row: int, column: int) -> tuple[float, float]:
    """Return the top left corner (x, y) of a panel."""
    titles = min(row + 1, self._title_rows) * self._title
    rows, columns = self.grid
    return self._gap + column * (columns + self._gap), self._gap + row * (rows + self._gap) + titles


def grid_for(image: Image, num_tokens: int) -> tuple[int, int]:
  """Return the (rows, columns) of N patches whose shape is nearest to the shape of the image.

  Raises:
    ValueError: N patches do not fill a grid of this shape. The message asks for `grid`.
  """
  height, width = np.asarray(image).shape[:2]
  rows = round(math.sqrt(num_tokens * height / width))
  if not rows or num_tokens % rows or rows > height or num_tokens // rows > width:
    raise ValueError(
      f"{num_tokens} tokens do not fill a grid with the shape of an image of {height}x{width} pixels. "
      "Give grid=(rows, columns)."
    )
  return rows, num_tokens // rows
