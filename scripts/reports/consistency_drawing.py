"""The drawings of a consistency report: SVG over an image, in units of a patch."""

import base64
import html
import io
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from einops import reduce
from PIL import Image

from dtm_jax import pictures
from dtm_jax.arrays import Bool, Float, Int, UInt8
from dtm_jax.evaluators._unit_norm import unit_norm
from dtm_jax.evaluators.consistency import UNMORPHED, Examples
from dtm_jax.report.strips import borders

SHARES = (3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
"""The drawn numbers of groups, as shares of the number of tokens."""
SMALLEST = 128
"""Images with a smaller side in pixels are enlarged."""
# Viridis (CC0) at equal distances. People with colour blindness can read it.
SCALE = np.array(
  [(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
   (170, 220, 50), (253, 231, 37)], float,
)  # fmt: skip


class Pictures:
  """Draws cards of HTML, one for each example.

  Args:
    examples: the images with their tokens.
    class_names: the names of the classes in captions.
    names: the ways of morphing, the unmorphed tokens first.
    groups: how many groups each morpher makes, in words.
    shown: indices in `names` of the ways to draw.
  """

  def __init__(
    self,
    examples: Examples,
    class_names: Sequence[str],
    names: Sequence[str],
    groups: dict[str, str],
    shown: list[int],
  ):
    self.examples, self.class_names = examples, class_names
    self.names, self._groups, self.shown = names, groups, shown
    side = math.isqrt(examples.group_BSN.shape[2])
    self.grid, self._query = (side, side), (side // 2, side // 2)
    self._cosine_BSN = self._cosines()
    self.lowest = float(self._cosine_BSN.min())

  def _cosines(self) -> Float[np.ndarray, "B S N"]:
    """Return the cosine similarity of each token to the query token, unmorphed and by the first morpher."""
    unit_BSNC = unit_norm(self.examples.token_BSNC[:, self.shown[:2]])
    place = self._query[0] * self.grid[1] + self._query[1]
    return np.einsum("bsnc,bsc->bsn", unit_BSNC, unit_BSNC[:, :, place])

  def definitions(self) -> str:
    """Return every image once. The drawings refer to it."""
    rows, columns = self.grid
    return "\n".join(
      f'<image id="photo{i}" width="{columns}" height="{rows}" href="{data_uri(image)}"/>'
      for i, image in enumerate(self.examples.image_BHW3)
    )

  def right_wrong(self) -> str:
    """Return cards of each image and of its right and wrong tokens in every shown way."""
    cards = []
    for i, label in enumerate(self.examples.label_B):
      panels = [self._image(i)]
      for way in self.shown:
        right_RQ = (self.examples.zeroshot_BSN[i, way] == label).reshape(self.grid)
        share = f"{right_RQ.sum()} of {right_RQ.size}"
        words = f"{share} tokens of the {self._class(i)} are right, {self.way(way)}"
        picture = self._svg(i, words, marks(right_RQ), "faded")
        count = f'<data class="count" value="{right_RQ.sum()}">{share}</data>'
        panels.append(figure(picture, f"{self.way(way)}<br>{count} right"))
      cards.append(card(self._title(i), panels))
    return "\n".join(cards)

  def group_maps(self) -> str:
    """Return cards of each image and of several numbers of groups in the mean colours of their pixels."""
    num_tokens = math.prod(self.grid)
    counts = sorted({max(1, round(share * num_tokens)) for share in SHARES}, reverse=True)
    token_BNC = jnp.asarray(self.examples.token_BSNC[:, 0])
    label_CBN = [
      np.asarray(pictures.group_tokens(token_BNC, count, merges_a_round(num_tokens, count)))
      for count in counts
    ]
    colour_BN3 = reduce(
      self.examples.image_BHW3.astype(float), "b (r h) (q w) c -> b (r q) c", "mean",
      r=self.grid[0], q=self.grid[1],
    )  # fmt: skip
    cards = []
    for i in range(len(self.examples.label_B)):
      panels = [self._image(i)]
      for count, label_BN in zip(counts, label_CBN, strict=True):
        picture = self._svg(
          i, f"{self._class(i)} in {count} groups of patches", self._painted(label_BN[i], colour_BN3[i])
        )
        panels.append(figure(picture, f"{count} groups" if count > 1 else "one group"))
      cards.append(card(self._title(i, said=False), panels))
    return "\n".join(cards)

  def similarity(self) -> str:
    """Return cards of the cosine similarity of one token to all, unmorphed and by the first morpher."""
    row, column = self._query
    circle = f'cx="{column + 0.5}" cy="{row + 0.5}" r="0.42"'
    ring = f'<circle class="ring dark" {circle}/><circle class="ring" {circle}/>'
    cards = []
    for i in range(len(self.examples.label_B)):
      panels = [figure(self._svg(i, f"{self._class(i)}, the query patch ringed", ring), "query")]
      for place, way in enumerate(self.shown[:2]):
        cosine_RQ = self._cosine_BSN[i, place].reshape(self.grid)
        words = f"cosine to the query patch, {self.way(way)}: {cosine_RQ.min():.2f} to 1"
        picture = self._svg(i, words, heat((cosine_RQ - self.lowest) / (1 - self.lowest)) + ring)
        panels.append(figure(picture, f"{self.way(way)}<br>mean {cosine_RQ.mean():.2f}"))
      cards.append(card(self._title(i, said=False), panels))
    return "\n".join(cards)

  def query_words(self) -> str:
    """Return the place of the query patch in words."""
    (row, column), (rows, columns) = self._query, self.grid
    return f"row {row + 1} of {rows}, column {column + 1} of {columns}"

  def _painted(self, label_N: Int[np.ndarray, " N"], colour_N3: Float[np.ndarray, "N 3"]) -> str:
    parts = []
    for group in np.unique(label_N):
      colour = colour_N3[label_N == group].mean(axis=0)
      parts.append(
        f'<path fill="{hexadecimal(colour)}" d="{squares((label_N == group).reshape(self.grid))}"/>'
      )
    border = borders(label_N.reshape(self.grid))
    return "".join(parts) + f'<path class="halo" d="{border}"/><path class="border" d="{border}"/>'

  def _image(self, i: int) -> str:
    return figure(self._svg(i, f"test image {self.examples.index_B[i]}: {self._class(i)}"), "image")

  def _svg(self, i: int, words: str, content: str = "", style: str = "") -> str:
    rows, columns = self.grid
    return (
      f'<svg viewBox="0 0 {columns} {rows}" role="img" aria-label="{html.escape(words)}">'
      f'<use href="#photo{i}" class="{style}"/>{content}</svg>'
    )

  def _title(self, i: int, said: bool = True) -> str:
    label, predicted = self.examples.label_B[i], self.examples.predicted_B[i]
    title = f"{html.escape(self._class(i))} <small>test image {self.examples.index_B[i]}</small>"
    if said:
      sign, style = ("✓", "yes") if label == predicted else ("✗", "no")
      title += (
        f' <span class="{style}">{sign} image taken for: {html.escape(self.class_names[predicted])}</span>'
      )
    return title

  def _class(self, i: int) -> str:
    return self.class_names[self.examples.label_B[i]]

  def way(self, way: int) -> str:
    """Return what a way of morphing is called."""
    return "unmorphed" if self.names[way] == UNMORPHED else self.names[way]


def merges_a_round(num_tokens: int, num_groups: int) -> int:
  """Return 4, or fewer merges if the last round could not merge its share and the remainder.

  A round merges at most half of the live tokens.
  """
  merged = num_tokens - num_groups
  for merges in (4, 2, 1):
    rounds = -(-merged // merges)
    if merged - (rounds - 1) * (merged // rounds) <= num_groups:
      return merges
  return 1


def figure(picture: str, caption: str) -> str:
  """Return a picture with its caption."""
  return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def card(title: str, panels: list[str]) -> str:
  """Return a card with a title and figures."""
  return f'<article><h3>{title}</h3><div class="panels">{"".join(panels)}</div></article>'


def marks(right_RQ: Bool[np.ndarray, "R Q"]) -> str:
  """Return right patches with a tick and wrong ones with a cross, in two colours."""
  tick = lambda r, q: f"M{q + 0.3:g} {r + 0.52:g}l.15.17.26-.36"
  cross = lambda r, q: f"M{q + 0.36:g} {r + 0.36:g}l.28.28m0-.28l-.28.28"
  parts = []
  for name, mask, sign in (("right", right_RQ, tick), ("wrong", ~right_RQ, cross)):
    signs = "".join(sign(r, q) for r, q in np.argwhere(mask))
    parts.append(f'<path class="{name}" d="{squares(mask)}"/><path class="sign" d="{signs}"/>')
  return "".join(parts)


def squares(mask_RQ: Bool[np.ndarray, "R Q"]) -> str:
  """Return the path of all patches where the mask is True."""
  return "".join(f"M{q} {r}h1v1h-1z" for r, q in np.argwhere(mask_RQ))


def heat(share_RQ: Float[np.ndarray, "R Q"]) -> str:
  """Return a square for each patch, in the colour of its value from 0 to 1."""
  return "".join(
    f'<path fill="{hexadecimal(colour_of(share))}" d="M{q} {r}h1v1h-1z"/>'
    for (r, q), share in np.ndenumerate(share_RQ)
  )


def colour_of(share: float) -> Float[np.ndarray, "3"]:
  """Return the colour of a value from 0 to 1."""
  at = np.linspace(0, 1, len(SCALE))
  return np.array([np.interp(share, at, channel) for channel in SCALE.T])


def gradient() -> str:
  """Return the colours from left to right as a value of CSS."""
  return f"linear-gradient(90deg, {', '.join(map(hexadecimal, SCALE))})"


def hexadecimal(colour: Float[np.ndarray, "3"]) -> str:
  """Return a colour of three values up to 255 as "#rrggbb"."""
  return "#" + "".join(f"{round(value):02x}" for value in colour.tolist())


def data_uri(image: UInt8[np.ndarray, "H W 3"]) -> str:
  """Return an enlarged PNG of a small image or a WebP of a large one, as a data URI."""
  file, factor = io.BytesIO(), -(-SMALLEST // len(image))
  if factor > 1:
    Image.fromarray(image.repeat(factor, axis=0).repeat(factor, axis=1)).save(file, "PNG", optimize=True)
  else:
    Image.fromarray(image).save(file, "WEBP", quality=85)
  kind = "png" if factor > 1 else "webp"
  return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
