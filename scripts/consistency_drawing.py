"""The drawings of scripts/consistency_report.py: vectors over an image, in units of a patch."""

import base64
import html
import io
import math

import jax.numpy as jnp
import numpy as np
from einops import reduce
from PIL import Image
from report import draw_groups

from dtm_jax.arrays import Bool, Float, Int, UInt8
from dtm_jax.evaluators import _token_measures as consistency
from dtm_jax.evaluators.consistency import AS_THEY_ARE, Examples

SHARES = (3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the tokens: the numbers of groups that are mapped
SMALLEST = 128  # pixels of a side; smaller images are enlarged, pixel by pixel
# Viridis (CC0), which the colour-blind can read, at even distances.
SCALE = np.array(
  [(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
   (170, 220, 50), (253, 231, 37)], float,
)  # fmt: skip


class Pictures:
  """Cards of drawings of every example.

  Args:
    examples: what is shown.
    class_names: as they are said.
    names: the ways of morphing, the tokens as they are first.
    groups: how many groups each makes, in words.
    shown: the places in `names` of the ways that are shown.
  """

  def __init__(self, examples: Examples, class_names, names, groups: dict[str, str], shown: list[int]):
    self._examples, self._class_names = examples, class_names
    self._names, self._groups, self._shown = names, groups, shown
    self._grid = (math.isqrt(examples.group_BSN.shape[2]),) * 2
    self._query = tuple(side // 2 for side in self._grid)
    self._cosine_BSN = self._cosines()
    self.lowest = float(self._cosine_BSN.min())

  def _cosines(self) -> Float[np.ndarray, "B S N"]:
    unit_BSNC = consistency.unit(self._examples.token_BSNC[:, self._shown[:2]])
    place = self._query[0] * self._grid[1] + self._query[1]
    return np.einsum("bsnc,bsc->bsn", unit_BSNC, unit_BSNC[:, :, place])

  def definitions(self) -> str:
    """Every image once; the drawings refer to it."""
    rows, columns = self._grid
    return "\n".join(
      f'<image id="photo{i}" width="{columns}" height="{rows}" href="{data_uri(image)}"/>'
      for i, image in enumerate(self._examples.image_BHW3)
    )

  def right_wrong(self) -> str:
    """The image, and which of its tokens are right, for every way that is shown."""
    cards = []
    for i, label in enumerate(self._examples.label_B):
      panels = [self._image(i)]
      for way in self._shown:
        right_RQ = (self._examples.zeroshot_BSN[i, way] == label).reshape(self._grid)
        share = f"{right_RQ.sum()} of {right_RQ.size}"
        words = f"{share} tokens of the {self._class(i)} are right, {self._way(way)}"
        picture = self._svg(i, words, marks(right_RQ), "faded")
        count = f'<data class="count" value="{right_RQ.sum()}">{share}</data>'
        panels.append(figure(picture, f"{self._way(way)}<br>{count} right"))
      cards.append(card(self._title(i), panels))
    return "\n".join(cards)

  def group_maps(self) -> str:
    """The image, and its groups at several numbers of them, each in the mean colour of its pixels."""
    num_tokens = math.prod(self._grid)
    counts = sorted({max(1, round(share * num_tokens)) for share in SHARES}, reverse=True)
    token_BNC = jnp.asarray(self._examples.token_BSNC[:, 0])
    label_CBN = [
      np.asarray(draw_groups.match(token_BNC, count, merges_a_round(num_tokens, count))) for count in counts
    ]
    colour_BN3 = reduce(
      self._examples.image_BHW3.astype(float), "b (r h) (q w) c -> b (r q) c", "mean",
      r=self._grid[0], q=self._grid[1],
    )  # fmt: skip
    cards = []
    for i in range(len(self._examples.label_B)):
      panels = [self._image(i)]
      for count, label_BN in zip(counts, label_CBN, strict=True):
        picture = self._svg(
          i, f"{self._class(i)} in {count} groups of patches", self._painted(label_BN[i], colour_BN3[i])
        )
        panels.append(figure(picture, f"{count} groups" if count > 1 else "one group"))
      cards.append(card(self._title(i, said=False), panels))
    return "\n".join(cards)

  def similarity(self) -> str:
    """The cosine of one token to all, as they are and morphed."""
    row, column = self._query
    circle = f'cx="{column + 0.5}" cy="{row + 0.5}" r="0.42"'
    ring = f'<circle class="ring dark" {circle}/><circle class="ring" {circle}/>'
    cards = []
    for i in range(len(self._examples.label_B)):
      panels = [figure(self._svg(i, f"{self._class(i)}, the query patch ringed", ring), "query")]
      for place, way in enumerate(self._shown[:2]):
        cosine_RQ = self._cosine_BSN[i, place].reshape(self._grid)
        words = f"cosine to the query patch, {self._way(way)}: {cosine_RQ.min():.2f} to 1"
        picture = self._svg(i, words, heat((cosine_RQ - self.lowest) / (1 - self.lowest)) + ring)
        panels.append(figure(picture, f"{self._way(way)}<br>mean {cosine_RQ.mean():.2f}"))
      cards.append(card(self._title(i, said=False), panels))
    return "\n".join(cards)

  def query_words(self) -> str:
    """Which patch the query is."""
    (row, column), (rows, columns) = self._query, self._grid
    return f"row {row + 1} of {rows}, column {column + 1} of {columns}"

  def _painted(self, label_N: Int[np.ndarray, " N"], colour_N3: Float[np.ndarray, "N 3"]) -> str:
    parts = []
    for group in np.unique(label_N):
      colour = colour_N3[label_N == group].mean(axis=0)
      parts.append(
        f'<path fill="{hexadecimal(colour)}" d="{squares((label_N == group).reshape(self._grid))}"/>'
      )
    border = borders(label_N.reshape(self._grid))
    return "".join(parts) + f'<path class="halo" d="{border}"/><path class="border" d="{border}"/>'

  def _image(self, i: int) -> str:
    return figure(self._svg(i, f"test image {self._examples.index_B[i]}: {self._class(i)}"), "image")

  def _svg(self, i: int, words: str, content: str = "", style: str = "") -> str:
    rows, columns = self._grid
    return (
      f'<svg viewBox="0 0 {columns} {rows}" role="img" aria-label="{html.escape(words)}">'
      f'<use href="#photo{i}" class="{style}"/>{content}</svg>'
    )

  def _title(self, i: int, said: bool = True) -> str:
    label, predicted = self._examples.label_B[i], self._examples.predicted_B[i]
    title = f"{html.escape(self._class(i))} <small>test image {self._examples.index_B[i]}</small>"
    if said:
      sign, style = ("✓", "yes") if label == predicted else ("✗", "no")
      title += (
        f' <span class="{style}">{sign} image taken for: {html.escape(self._class_names[predicted])}</span>'
      )
    return title

  def _class(self, i: int) -> str:
    return self._class_names[self._examples.label_B[i]]

  def _way(self, way: int) -> str:
    return "as they are" if self._names[way] == AS_THEY_ARE else self._names[way]


def merges_a_round(num_tokens: int, num_groups: int) -> int:
  """4, or fewer where the last round, which takes the remainder too, could not merge as many."""
  merged = num_tokens - num_groups
  for merges in (4, 2, 1):
    rounds = -(-merged // merges)
    if merged - (rounds - 1) * (merged // rounds) <= num_groups:
      return merges
  return 1


def figure(picture: str, caption: str) -> str:
  return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def card(title: str, panels: list[str]) -> str:
  return f'<article><h3>{title}</h3><div class="panels">{"".join(panels)}</div></article>'


def marks(right_RQ: Bool[np.ndarray, "R Q"]) -> str:
  """Right patches with a tick, wrong ones with a cross: two colours, and not by them alone."""
  tick = lambda r, q: f"M{q + 0.3:g} {r + 0.52:g}l.15.17.26-.36"
  cross = lambda r, q: f"M{q + 0.36:g} {r + 0.36:g}l.28.28m0-.28l-.28.28"
  parts = []
  for name, mask, sign in (("right", right_RQ, tick), ("wrong", ~right_RQ, cross)):
    signs = "".join(sign(r, q) for r, q in np.argwhere(mask))
    parts.append(f'<path class="{name}" d="{squares(mask)}"/><path class="sign" d="{signs}"/>')
  return "".join(parts)


def squares(mask_RQ: Bool[np.ndarray, "R Q"]) -> str:
  return "".join(f"M{q} {r}h1v1h-1z" for r, q in np.argwhere(mask_RQ))


def borders(label_RQ: Int[np.ndarray, "R Q"]) -> str:
  """The sides where two groups meet."""
  across = np.argwhere(label_RQ[:, 1:] != label_RQ[:, :-1])
  down = np.argwhere(label_RQ[1:] != label_RQ[:-1])
  return "".join([f"M{q + 1} {r}v1" for r, q in across] + [f"M{q} {r + 1}h1" for r, q in down])


def heat(share_RQ: Float[np.ndarray, "R Q"]) -> str:
  """A square of the scale's colour for each patch."""
  return "".join(
    f'<path fill="{hexadecimal(colour_of(share))}" d="M{q} {r}h1v1h-1z"/>'
    for (r, q), share in np.ndenumerate(share_RQ)
  )


def colour_of(share: float) -> np.ndarray:
  """Of 0 to 1."""
  at = np.linspace(0, 1, len(SCALE))
  return np.array([np.interp(share, at, channel) for channel in SCALE.T])


def gradient() -> str:
  """The scale from left to right, for CSS."""
  return f"linear-gradient(90deg, {', '.join(map(hexadecimal, SCALE))})"


def hexadecimal(colour: np.ndarray) -> str:
  return "#" + "".join(f"{round(value):02x}" for value in colour.tolist())


def data_uri(image: UInt8[np.ndarray, "H W 3"]) -> str:
  """A PNG of a small image, enlarged; a WebP of a large one."""
  file, factor = io.BytesIO(), -(-SMALLEST // len(image))
  if factor > 1:
    Image.fromarray(image.repeat(factor, axis=0).repeat(factor, axis=1)).save(file, "PNG", optimize=True)
  else:
    Image.fromarray(image).save(file, "WEBP", quality=85)
  kind = "png" if factor > 1 else "webp"
  return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
