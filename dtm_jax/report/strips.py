"""Draw the recorded images and their groups over time: for each image a strip of small pictures."""

import base64
import html
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dtm_jax.arrays import Int, UInt8
from dtm_jax.pictures.sheet import border_segments, mean_colours
from dtm_jax.report.run_files import RunFiles

MOST_STEPS = 6
"""The number of steps that a strip shows, from the first to the last."""
LARGEST = 192
"""Larger photos are made smaller, to keep the page small."""


def shown_steps(steps: Sequence[int], most: int = MOST_STEPS) -> list[int]:
  """Return at most `most` of the steps at even distances, with the first and the last."""
  if len(steps) <= most:
    return list(steps)
  places = np.linspace(0, len(steps) - 1, most).round().astype(int)
  return [steps[place] for place in places]


def cards(runs: Sequence[RunFiles]) -> list[str]:
  """Return one card for each recorded image of the runs. Runs with the same images share the cards."""
  recorded = [run for run in runs if run.evaluated_steps]
  found = []
  while recorded:
    first = recorded[0]
    together = [run for run in recorded if _same_images(run, first)]
    recorded = [run for run in recorded if run not in together]
    strips = {run.name: _strips(run) for run in together}
    assert first.snapshots is not None
    for place, title in enumerate(_titles(first)):
      rows = []
      for run in together:
        if len(runs) > 1:
          rows.append(f'<p class="whose r{runs.index(run)}">{html.escape(run.name)}</p>')
        rows.append(strips[run.name][place])
      found.append(f"<article><h3>{title}</h3>{''.join(rows)}</article>")
  return found


def _same_images(run: RunFiles, other: RunFiles) -> bool:
  assert run.snapshots is not None
  assert other.snapshots is not None
  return np.array_equal(run.snapshots.image, other.snapshots.image)


def _titles(run: RunFiles) -> list[str]:
  """Return the class and the number of each recorded image."""
  assert run.snapshots is not None
  names, titles = run.class_names or (), []
  for index, label in zip(run.snapshots.index_B.tolist(), run.snapshots.label_B.tolist(), strict=True):
    name = html.escape(names[label]) if 0 <= label < len(names) else "image"
    titles.append(f"{name} <small>no. {index}</small>")
  return titles


def _strips(run: RunFiles) -> list[str]:
  """Return the strip of each image: the photo, the student's groups at each step, the teacher's groups."""
  found = run.snapshots
  assert found is not None
  steps = shown_steps(run.evaluated_steps)
  kinds = list(found.groups[steps[-1]])
  strips = []
  for place, image in enumerate(found.image):
    panels = [_panel(f'<img alt="" src="{photo(image)}">', "image")]
    for kind in kinds[:1]:
      panels += [_groups(image, found.groups[step][kind][place], f"{step:,}") for step in steps]
    for kind in kinds[1:]:  # a teacher does not change, so its last groups are enough
      panels.append(_groups(image, found.groups[steps[-1]][kind][place], kind.partition("_")[0]))
    style = f"grid-template-columns:repeat({len(panels)},1fr)"
    strips.append(f'<div class="strip" style="{style}">{"".join(panels)}</div>')
  return strips


def _panel(picture: str, caption: str) -> str:
  return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _groups(image: UInt8[np.ndarray, "H W 3"], label_N: Int[np.ndarray, " N"], caption: str) -> str:
  """Return a picture in which each group has its mean colour, with a line between two groups."""
  side = math.isqrt(len(label_N))
  colour_N3 = 255 * mean_colours(image, (side, side)).reshape(-1, 3)
  for group in np.unique(label_N):
    colour_N3[label_N == group] = colour_N3[label_N == group].mean(axis=0)
  painted = _data_uri(colour_N3.round().astype(np.uint8).reshape(side, side, 3), "PNG")
  border = borders(label_N.reshape(side, side))
  count = len(np.unique(label_N))
  return _panel(
    f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="{count} groups, {html.escape(caption)}">'
    f'<image width="{side}" height="{side}" href="{painted}"/>'
    f'<path class="halo" d="{border}"/><path class="border" d="{border}"/></svg>',
    caption,
  )


def borders(label_RQ: Int[np.ndarray, "R Q"]) -> str:
  """Return the SVG path of all sides where two groups meet, in units of a patch."""
  return "".join(
    f"M{x:g} {y:g}{'v' if x == end else 'h'}1" for (x, y), (end, _) in border_segments(label_RQ).tolist()
  )


def photo(image: UInt8[np.ndarray, "H W 3"]) -> str:
  """Return a photo as a data URI: a PNG if it is small, or else a WebP of at most LARGEST pixels a side."""
  if max(image.shape[:2]) <= 64:
    return _data_uri(image, "PNG")
  picture = Image.fromarray(image)
  picture.thumbnail((LARGEST, LARGEST))
  return _data_uri(np.asarray(picture), "WEBP")


def _data_uri(image: UInt8[np.ndarray, "H W 3"], kind: str) -> str:
  file = io.BytesIO()
  Image.fromarray(image).save(file, kind, **({"optimize": True} if kind == "PNG" else {"quality": 82}))
  return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
