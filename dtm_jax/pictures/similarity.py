"""Draw the cosine similarity of one token to all tokens of an image."""

from collections.abc import Mapping

import numpy as np

from dtm_jax.arrays import Array, Float
from dtm_jax.pictures.sheet import TEXT_POINTS, Figure, Image, Sheet, grid_for

Tokens = Float[Array | np.ndarray, "N C"]
SCALE_INCHES = 0.5
SMALLEST_NORM = 1e-12


def cosine_to(token_NC: Tokens, place: int) -> Float[np.ndarray, " N"]:
  """Return the cosine similarity of the token `place` to each token. A token of zeros has similarity 0.

  >>> cosine_to(np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), 0).tolist()
  [1.0, 0.0, 1.0]
  """
  token_NC = np.asarray(token_NC, np.float64)
  unit_NC = token_NC / np.maximum(np.linalg.norm(token_NC, axis=1, keepdims=True), SMALLEST_NORM)
  return unit_NC @ unit_NC[place]


def draw_similarity(
  image: Image,
  tokens: Tokens | Mapping[str, Tokens],
  query: tuple[int, int] | None = None,
  *,
  grid: tuple[int, int] | None = None,
  inches: float = 1.3,
) -> Figure:
  """Draw an image and the cosine similarity of one of its tokens to all tokens, on one colour scale.

  Args:
    tokens: the tokens of the image. A mapping from titles to tokens gives a panel for each, such as the
      teacher's tokens and the morphed ones.
    query: (row, column) of the token. By default, it is in the middle.
    grid: (rows, columns) of patches. By default, the grid has the shape of the image.
    inches: width of a panel.

  >>> figure = draw_similarity(np.zeros((32, 32, 3), np.uint8), np.eye(16), query=(1, 2))

  Raises:
    ValueError: the tokens do not fit the image, or the query is not in the grid.
    MissingMatplotlibError: matplotlib is not installed.
  """
  tokens = tokens if isinstance(tokens, Mapping) else {"cosine similarity": tokens}
  grid = grid or grid_for(image, next(iter(tokens.values())).shape[0])
  row, column = query or (grid[0] // 2, grid[1] // 2)
  if not (0 <= row < grid[0] and 0 <= column < grid[1]):
    raise ValueError(f"query={query} is not in the grid of {grid[0]}x{grid[1]} patches.")
  cosines = {title: cosine_to(each, row * grid[1] + column).reshape(grid) for title, each in tokens.items()}
  lowest = min(float(cosine_RQ.min()) for cosine_RQ in cosines.values())
  sheet = Sheet(grid, 1, 1 + len(cosines), inches=inches, right=SCALE_INCHES)
  sheet.title(0, 0, "image")
  sheet.photo(0, 0, np.asarray(image))
  artists = []
  for place, (title, cosine_RQ) in enumerate(cosines.items(), start=1):
    sheet.title(0, place, title)
    artists.append(sheet.map(0, place, cosine_RQ, lowest, 1.0))
  for place in range(1 + len(cosines)):
    for size, colour in ((5.0, "black"), (3.4, "white")):
      centre = np.array([[column + 0.5, row + 0.5]])
      sheet.line(0, place, centre, marker="o", markersize=size, color=colour, markeredgewidth=0)
  width = sheet.figure.get_figwidth()
  scale = sheet.figure.add_axes(((width - SCALE_INCHES * 0.95) / width, 0.06, 0.1 / width, 0.78))
  sheet.figure.colorbar(artists[0], cax=scale).ax.tick_params(labelsize=TEXT_POINTS - 1, length=2, pad=1)
  return sheet.figure
