"""Draw curves as SVG: one scale an axis, the same colours on paper, on screens, and on dark screens.

The page of a report and files of their own use the same drawings. They need no library, so a run without
matplotlib ends with a report, too. CSS colours them, so one page serves a light and a dark screen.
"""

import dataclasses
import html
import json
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 380.0, 216.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 10.0, 36.0
DOTS = 24
"""A curve with at most this number of points also has a dot at each."""
MOST_POINTS = 600

STYLE = """
.plot{font:11px system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;--c0:#0b62a8;--c1:#c4510a;--c2:#1a7f5a;
--soft:#5b6570;--grid:#e3e7ec}
.plot text{fill:var(--soft)}.plot .grid{stroke:var(--grid);stroke-width:1}.plot .axis{stroke:var(--soft);
stroke-width:1}.plot polyline{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.plot .s0{stroke:var(--c0)}.plot .s1{stroke:var(--c1)}.plot .s2{stroke:var(--c2)}.plot circle{stroke:none}
.plot .f0{fill:var(--c0)}.plot .f1{fill:var(--c1)}.plot .f2{fill:var(--c2)}.plot .dashed{stroke-dasharray:5 4}
.plot .title{font-size:13px;font-weight:600;fill:#1c2127}
""".replace("\n", "")
"""The style of a drawing in a file of its own."""


@dataclasses.dataclass(frozen=True)
class Series:
  """One curve.

  Attributes:
    name: for the legend.
    points: (step, value), ascending.
    colour: 0, 1 or 2.
    dashed: whether the line is dashed, for a reference.
  """

  name: str
  points: Sequence[tuple[int, float]]
  colour: int = 0
  dashed: bool = False


def draw(title: str, series: Sequence[Series], *, own_file: bool = False) -> str:
  """Return an SVG drawing of the curves over the steps.

  Args:
    title: what the value is, for people who hear the page. A drawing of its own file also shows it.
    series: curves of one unit.
    own_file: whether the drawing carries its style and its title.

  Raises:
    ValueError: no curve has a point.
  """
  points = [point for each in series for point in each.points]
  if not points:
    raise ValueError(f"The curves of {title!r} have no points.")
  across = _Scale([step for step, _ in points], LEFT, WIDTH - RIGHT)
  down = _Scale([value for _, value in points], HEIGHT - BOTTOM, TOP, wide=True)
  parts = [*_grid(across, down)]
  parts += [_curve(each, across, down) for each in series if each.points]
  data = [{"n": each.name, "p": _thinned(each.points), "c": each.colour} for each in series]
  scales = json.dumps([across.low, across.high, down.low, down.high])
  words = html.escape(f"{title}: " + "; ".join(_spoken(each) for each in series if each.points))
  attributes = f'viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{words}" class="plot" '
  if not own_file:
    attributes += f'data-scales="{scales}" data-series="{html.escape(json.dumps(data))}"'
    return f"<svg {attributes}>{''.join(parts)}</svg>"
  return _file(title, series, "".join(parts), words)


def number(value: int | float) -> str:
  """Return a number with four significant digits, as people read it."""
  if value == 0:
    return "0"
  if abs(value) >= 1e6 or abs(value) < 1e-3:
    digits, _, exponent = f"{value:.3g}".partition("e")
    return f"{digits}e{int(exponent)}".replace("-", "−") if exponent else digits.replace("-", "−")
  text = f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
  return text.replace("-", "−")


def _file(title: str, series: Sequence[Series], content: str, words: str) -> str:
  """Return the drawing with title, legend, style and a white ground."""
  head, legend = 24.0, 18.0 * -(-len(series) // 2) if len(series) > 1 else 0.0
  entries = []
  for number, each in enumerate(series if legend else ()):
    x, y = LEFT + number % 2 * (WIDTH - LEFT) / 2, 32 + 18 * (number // 2)
    dash = " dashed" if each.dashed else ""
    entries.append(
      f'<line class="s{each.colour}{dash}" stroke-width="2" x1="{x:g}" x2="{x + 18:g}" y1="{y}" y2="{y}"/>'
      f'<text x="{x + 23:g}" y="{y + 4}">{html.escape(each.name)}</text>'
    )
  height = HEIGHT + head + legend
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:g}" width="{WIDTH * 1.5:g}" '
    f'height="{height * 1.5:g}" role="img" aria-label="{words}" class="plot"><style>{STYLE}</style>'
    f'<rect width="{WIDTH:g}" height="{height:g}" fill="#fff"/>'
    f'<text x="{LEFT:g}" y="16" class="title">{html.escape(title)}</text>'
    f'{"".join(entries)}<g transform="translate(0 {head + legend:g})">{content}</g></svg>\n'
  )


class _Scale:
  """Maps values to places of the drawing, and chooses round values to mark.

  Args:
    values: at least one.
    start, end: the places of the lowest and the highest value.
    wide: whether the range is widened to round values.
  """

  def __init__(self, values: Sequence[int | float], start: float, end: float, *, wide: bool = False):
    low, high = float(min(values)), float(max(values))
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a constant
      half = abs(low) / 2 or 0.5
      low, high = (low - half, high + half) if wide else (low - 0.5, high + 0.5)
    if 0 < low < 0.35 * high:
      low = 0.0
    self.step = _round_step((high - low) / 4)
    if wide:
      low, high = math.floor(low / self.step) * self.step, math.ceil(high / self.step - 1e-9) * self.step
    self.low, self.high, self._start, self._end = low, high, start, end

  def place(self, value: int | float) -> float:
    return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)

  def ticks(self) -> list[float]:
    first = math.ceil(self.low / self.step - 1e-9)
    count = math.floor((self.high - first * self.step) / self.step + 1e-9) + 1
    return [(first + i) * self.step for i in range(count)]


def _round_step(least: float) -> float:
  """Return the smallest of 1, 2, 2.5, 5 times a power of ten that is not below `least`."""
  power = 10.0 ** math.floor(math.log10(least))
  return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def _grid(across: _Scale, down: _Scale) -> list[str]:
  bottom, parts = HEIGHT - BOTTOM, []
  for value in down.ticks():
    y = down.place(value)
    parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
    label = _in_steps_of(down.step, value)
    parts.append(f'<text x="{LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
  parts.append(f'<line class="axis" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{bottom:g}" y2="{bottom:g}"/>')
  parts.append(f'<text x="{WIDTH - RIGHT:g}" y="{HEIGHT - 1:g}" text-anchor="end">steps</text>')
  for value in across.ticks():
    if abs(value - round(value)) > 1e-6:  # there is no half step
      continue
    x = across.place(value)
    anchor = "end" if x > WIDTH - RIGHT - 14 else "middle"
    parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:g}" y2="{bottom + 4:g}"/>')
    parts.append(f'<text x="{x:.1f}" y="{bottom + 16:g}" text-anchor="{anchor}">{_step(value)}</text>')
  return parts


def _in_steps_of(step: float, value: int | float) -> str:
  """Return the value of a mark with as many digits as its neighbours have."""
  if not 1e-4 < step < 1e6:
    significant = math.ceil(math.log10(max(abs(value) / step, 1.0)) + 1e-9) + 2
    return f"{round(value / step) * step:.{significant}g}".replace("e+", "e").replace("-", "−")
  digits = max(0, -math.floor(math.log10(step) + 1e-9)) + (
    round(step / 10 ** math.floor(math.log10(step)), 3) == 2.5
  )
  return f"{value:,.{digits}f}".replace("-", "−")


def _step(value: int | float) -> str:
  for size, letter in ((1e6, "M"), (1e3, "k")):
    if abs(value) >= 10 * size or (abs(value) >= size and value % (size / 10) == 0):
      return f"{value / size:.4g}{letter}"
  return f"{round(value)}"


def _curve(series: Series, across: _Scale, down: _Scale) -> str:
  places = [(across.place(step), down.place(value)) for step, value in _thinned(series.points)]
  dash = " dashed" if series.dashed else ""
  path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
  line = f'<polyline class="s{series.colour}{dash}" points="{path}"/>'
  if len(places) > DOTS or (series.dashed and len(places) > 1):
    return line
  return line + "".join(
    f'<circle class="f{series.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places
  )


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
  """Return the points, or of many points the lowest and highest of every stretch, so that no peak is lost."""
  if len(points) <= MOST_POINTS:
    return [(step, float(f"{value:.5g}")) for step, value in points]
  kept, parts = {0, len(points) - 1}, MOST_POINTS // 2
  for part in range(parts):
    stretch = range(part * len(points) // parts, (part + 1) * len(points) // parts)
    kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
  return [(points[i][0], float(f"{points[i][1]:.5g}")) for i in sorted(kept)]


def _spoken(series: Series) -> str:
  (first, before), (last, after) = series.points[0], series.points[-1]
  return f"{series.name} {number(before)} at step {first}, {number(after)} at step {last}"
