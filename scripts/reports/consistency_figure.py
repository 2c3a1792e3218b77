"""The figure of a consistency study for a text: right and wrong tokens of some images, and the shares of all.

It is an SVG file that needs no other file, in sizes that can be read in print.
"""

import html
from collections.abc import Mapping

from dtm_jax.evaluators.consistency import UNMORPHED

from .consistency_drawing import Pictures, data_uri, marks

IMAGES = 4
SIDE, GAP = 92, 8
"""Side of a picture, and the distance of two."""
BAR = 20
STYLE = """
text{font:12px system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:#1c2127}
.soft{fill:#5b6570}.head{font-weight:600}.faded{filter:grayscale(1)}
.right{fill:#0072b2;fill-opacity:.62}.wrong{fill:#d55e00;fill-opacity:.62}
.sign{fill:none;stroke:#fff;stroke-width:.085;stroke-linecap:round;stroke-linejoin:round}
.grey{fill:#9aa5b1}.blue{fill:#0072b2}
""".replace("\n", "")


def make(pictures: Pictures, numbers: Mapping[str, float]) -> str:
  """Return the figure.

  Args:
    pictures: the drawings of the page.
    numbers: "<way>_zeroshot" of every way of morphing.
  """
  top, left = 52, 4
  columns = ["image", *(pictures.way(way) for way in pictures.shown)]
  parts = [f'<text class="head" x="{left}" y="16">Which patch tokens know the class of their image</text>']
  for place, title in enumerate(columns):
    parts.append(f'<text class="soft" x="{left + place * (SIDE + GAP)}" y="42">{html.escape(title)}</text>')
  for i in range(min(IMAGES, len(pictures.examples.label_B))):
    for place in range(len(columns)):
      at = (left + place * (SIDE + GAP), top + i * (SIDE + GAP))
      parts.append(_panel(pictures, i, pictures.shown[place - 1] if place else None, *at))
  height = top + IMAGES * (SIDE + GAP)
  start = left + len(columns) * (SIDE + GAP) + 28
  parts.append(_bars(pictures, numbers, start, top))
  parts.append(_legend(start, height - 52))
  width = start + 330
  size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
  )


def _panel(pictures: Pictures, i: int, way: int | None, x: float, y: float) -> str:
  """Return the image, or its right and wrong tokens in one way of morphing."""
  (rows, columns), content, style = pictures.grid, "", ""
  if way is not None:
    right_N = pictures.examples.zeroshot_BSN[i, way] == pictures.examples.label_B[i]
    content, style = marks(right_N.reshape(pictures.grid)), "faded"
  photo = data_uri(pictures.examples.image_BHW3[i])
  image = f'<image class="{style}" width="{columns}" height="{rows}" href="{photo}"/>'
  place = f'x="{x}" y="{y}" width="{SIDE}" height="{SIDE}"'
  return f'<svg {place} viewBox="0 0 {columns} {rows}">{image}{content}</svg>'


def _bars(pictures: Pictures, numbers: Mapping[str, float], x: float, y: float) -> str:
  """Return a bar for the share of right tokens in each way of morphing."""
  shares = {name: numbers[f"{name}_zeroshot"] for name in pictures.names}
  scale = 170 / max(shares.values())
  parts = [f'<text class="soft" x="{x}" y="{y - 10}">share of all tokens that are right, zero-shot</text>']
  for place, (name, share) in enumerate(shares.items()):
    top, unmorphed = y + place * (BAR + 12), name == UNMORPHED
    title, colour = ("unmorphed", "grey") if unmorphed else (name, "blue")
    parts.append(f'<text x="{x}" y="{top + 15}">{html.escape(title)}</text>')
    parts.append(
      f'<rect class="{colour}" x="{x + 86}" y="{top}" width="{share * scale:.1f}" height="{BAR}" rx="2"/>'
    )
    parts.append(f'<text x="{x + 92 + share * scale:.1f}" y="{top + 15}">{100 * share:.1f} %</text>')
  return "".join(parts)


def _legend(x: float, y: float) -> str:
  words = {"right": "the class of the token is that of the image", "wrong": "it is another"}
  return "".join(
    f'<rect class="{name}" x="{x}" y="{y + 22 * place}" width="14" height="14" rx="2"/>'
    f'<text x="{x + 22}" y="{y + 12 + 22 * place}">{text}</text>'
    for place, (name, text) in enumerate(words.items())
  )
