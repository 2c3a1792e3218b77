"""Draw the numbers of runs over their steps, with one pair of axes for each scale."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dtm_jax.pictures.sheet import COLOURS, TEXT_POINTS, Axes, Figure, new_figure

DASHES = ("-", "--", ":", "-.")
MARKED = 40
"""Curves with at most this number of points show them."""
Lines = Iterable[Mapping[str, Any]]
"""The lines of the metrics.jsonl of a run: dicts with "step" and numbers by name."""


def draw_curves(
  runs: Lines | Mapping[str, Lines | Sequence[Lines]],
  panels: Mapping[str, Sequence[str]] | Sequence[str],
  *,
  x: str = "step",
  columns: int = 2,
  inches: float = 3.2,
) -> Figure:
  """Draw metrics of one run or several over the steps.

  The runs differ in colour, and the metrics of a panel differ in colour (one run) or in the dashes of their
  lines (several runs). A panel without any number stays empty and says so.

  Args:
    runs: the lines of metrics.jsonl, or a mapping from the name of a run to its lines. A name may have the
      lines of several runs, such as one for each seed.
    panels: a mapping from the title of a panel to its metrics, or the metrics with a panel for each. The
      metrics of a panel share a scale, so a loss and a learning rate need two panels.
    x: the key of the lines to draw over, such as "epoch".
    columns: number of panels in a row.
    inches: width of a panel.

  >>> lines = [{"step": 10, "loss": 0.5, "lr": 0.1}, {"step": 20, "loss": 0.4, "lr": 0.2}]
  >>> figure = draw_curves(lines, {"loss": ["loss"], "learning rate": ["lr"]})
  >>> figure = draw_curves({"A": lines, "B": [lines, lines]}, ["loss"])

  Raises:
    MissingMatplotlibError: matplotlib is not installed.
  """
  several = runs if isinstance(runs, Mapping) else {"": runs}
  named = {name: _as_runs(each) for name, each in several.items()}
  panels = panels if isinstance(panels, Mapping) else {metric: [metric] for metric in panels}
  columns = max(1, min(columns, len(panels)))
  rows = -(-len(panels) // columns)
  figure = new_figure(columns * inches, rows * inches * 0.66, layout="constrained")
  for place, (title, metrics) in enumerate(panels.items()):
    axes = figure.add_subplot(rows, columns, place + 1)
    _draw_panel(axes, named, metrics, x)
    _finish(axes, title, x)
  return figure


def _as_runs(each: Any) -> list[list[Mapping[str, Any]]]:
  """Return a list of runs from the lines of one run, or from several runs."""
  items = list(each)
  return [items] if not items or isinstance(items[0], Mapping) else [list(lines) for lines in items]


def _draw_panel(axes: Axes, named: Mapping[str, Any], metrics: Sequence[str], x: str) -> None:
  for index, (name, runs) in enumerate(named.items()):
    for number, metric in enumerate(metrics):
      colour = COLOURS[(index if len(named) > 1 else number) % len(COLOURS)]
      label = ", ".join(filter(None, (name, metric if len(metrics) > 1 else "")))
      for lines in runs:
        points = _points(lines, x, metric)
        if not len(points):
          continue
        few = np.isfinite(points[:, 1]).sum() <= MARKED
        axes.plot(
          points[:, 0], points[:, 1], DASHES[number % len(DASHES)], color=colour, label=label or None,
          linewidth=1.1, marker="o" if few else None, markersize=2.2,
        )  # fmt: skip
        label = ""  # the other runs of this name are not in the legend


def _points(lines: Lines, x: str, metric: str) -> np.ndarray:
  """Return the points (x, y) of a metric. A number that is not finite, None in the file, leaves a gap."""
  found = [(line[x], line[metric]) for line in lines if x in line and metric in line]
  return np.array([(at, np.nan if y is None else y) for at, y in found], float).reshape(-1, 2)


def _finish(axes: Axes, title: str, x: str) -> None:
  axes.set_title(title, fontsize=TEXT_POINTS + 1, loc="left")
  axes.set_xlabel(x, fontsize=TEXT_POINTS)
  axes.tick_params(labelsize=TEXT_POINTS, length=2.5)
  axes.grid(alpha=0.3, linewidth=0.5)
  axes.spines[["top", "right"]].set_visible(False)
  axes.margins(x=0.02)
  if not axes.lines:
    axes.text(
      0.5, 0.5, "no numbers", ha="center", va="center", transform=axes.transAxes, fontsize=TEXT_POINTS
    )
  elif axes.get_legend_handles_labels()[1]:
    axes.legend(fontsize=TEXT_POINTS, frameon=False, handlelength=2.2)
