"""Write the tables and the curves of a study: paired differences over seeds, with their intervals."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scipy.stats

from dtm_jax import pictures

Lines = list[dict]
"""The lines of the metrics.jsonl of a run."""

FAILED, UNFINISHED = "failed", "not finished"


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run and the commands after it have given.

  Attributes:
    lines: those of the commands that have finished.
    state: FAILED or UNFINISHED if one of the commands has not finished, or else "".
  """

  lines: Lines
  state: str = ""


Results = dict[str, dict[str, Result]]
"""Variant -> seed -> result."""


def last(lines: Lines | None, metric: str) -> float:
  """Return the last value of a metric, or NaN if there is none."""
  values = [line[metric] for line in lines or () if metric in line]
  return values[-1] if values else math.nan


def values_of(runs: Mapping[str, Result], metric: str) -> np.ndarray:
  """Return the last value of a metric in the run of each seed, NaN if there is none."""
  return np.array([last(result.lines, metric) for result in runs.values()])


def tables(results: dict[str, Results], metrics: list[str]) -> list[str]:
  """Return the lines of the Markdown tables of all settings, and of the comparison between settings."""
  if len(results) == 1:
    return table(next(iter(results.values())), metrics)
  text = []
  for setting, lines in results.items():
    text += [f"## {setting}", "", *table(lines, metrics), ""]
  (base, reference), *others = results.items()
  text += [f"## Differences that differ from those with: {base}", ""]
  text += [
    f"| difference of differences | seeds | {' | '.join(metrics)} |",
    f"|---|---|{'---|' * len(metrics)}",
  ]
  first, *names = reference
  gain = lambda lines, name, metric: values_of(lines[name], metric) - values_of(lines[first], metric)
  for setting, lines in others:
    for name in names:
      cells = [interval(gain(lines, name, each) - gain(reference, name, each)) for each in metrics]
      text.append(f"| {name} - {first}: {setting} minus {base} | paired | {' | '.join(cells)} |")
  count = sum(line.count("[") for line in text)
  caveat = f"These tables have {count} intervals. About one in twenty does not contain the true value."
  return [*text, "", caveat] if count else text


def table(lines: Results, metrics: list[str]) -> list[str]:
  """Return the lines of a Markdown table: mean ± standard deviation, and the paired differences."""
  first = next(iter(lines))
  header = [f"| variant | seeds | {' | '.join(metrics)} |", f"|---|---|{'---|' * len(metrics)}"]
  rows = []
  for name, runs in lines.items():
    cells = [_seeds(runs)]
    for metric in metrics:
      values = values_of(runs, metric)
      values = values[np.isfinite(values)]
      several = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
      cells.append(f"{values.mean():.4f}{several}" if len(values) else "none")
    rows.append(f"| {name} | {' | '.join(cells)} |")
  for name in list(lines)[1:]:
    differences = [
      interval(values_of(lines[name], metric) - values_of(lines[first], metric)) for metric in metrics
    ]
    rows.append(f"| {name} - {first} | paired | {' | '.join(differences)} |")
  return header + rows


def _seeds(runs: Mapping[str, Result]) -> str:
  """Return the number of seeds, and those that are not complete: "5 (failed: 2; not finished: 3, 4)"."""
  without = {
    state: [seed for seed, result in runs.items() if result.state == state] for state in (FAILED, UNFINISHED)
  }
  parts = [f"{state}: {', '.join(seeds)}" for state, seeds in without.items() if seeds]
  return f"{len(runs)}" + (f" ({'; '.join(parts)})" if parts else "")


def of_all_settings(
  found: dict[str, dict[str, dict[str, Lines | None]]], curves: list[str]
) -> tuple[dict[str, dict[str, Lines | None]], list[str]]:
  """Return one set of runs by variant, and the curves of each setting under a name of their own."""
  if len(found) == 1:
    return next(iter(found.values())), curves
  joined: dict[str, dict[str, Lines | None]] = {}
  for setting, part in found.items():
    for name, runs in part.items():
      for seed, lines in runs.items():
        renamed = [
          {"step": line["step"]} | {f"{curve}, {setting}": line[curve] for curve in curves if curve in line}
          for line in lines or ()
        ]
        joined.setdefault(name, {})[f"{seed}, {setting}"] = renamed or None
  return joined, [f"{curve}, {setting}" for curve in curves for setting in found]


def interval(differences: np.ndarray) -> str:
  """Return the mean of paired differences with its 95 % confidence interval by Student's t-distribution.

  One pair has a difference and no interval.
  """
  differences = differences[np.isfinite(differences)]
  if len(differences) < 2:
    return f"{differences[0]:+.4f}, one pair" if len(differences) else "none"
  mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences))
  half = scipy.stats.t.ppf(0.975, len(differences) - 1) * error
  return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


def draw(lines: dict[str, dict[str, Lines | None]], curves: list[str], out: Path) -> None:
  """Draw curves.svg and curves.png: a colour for each variant, a line for each seed.

  A panel shows one metric. Variants whose values are of another scale, such as an image-level loss beside
  token-wise ones, get a panel of their own.
  """
  named = {name: [each for each in runs.values() if each] for name, runs in lines.items()}
  panels: dict[str, list[str]] = {}
  for metric in curves:
    for number, names in enumerate(of_one_scale(named, metric)):
      title = metric if len(names) == len(named) else f"{metric} ({', '.join(names)})"
      key = f"{metric}, scale {number}"
      panels[title if len(title) < 60 else f"{metric}, {len(names)} variants"] = [key]
      for name in names:
        named[name] = [
          [line | {key: line[metric]} if metric in line else line for line in run] for run in named[name]
        ]
  if not panels:
    return  # no run has a number
  figure = pictures.draw_curves(named, panels, columns=2, inches=4.2)
  (out / "curves.svg").write_text(pictures.to_svg(figure) + "\n")
  figure.savefig(out / "curves.png", dpi=200)


def of_one_scale(named: dict[str, list[Lines]], metric: str, factor: float = 2.0) -> list[list[str]]:
  """Return the variants in parts. The last values of two parts differ by more than `factor`."""
  found = {name: np.array([last(run, metric) for run in runs]) for name, runs in named.items()}
  means = {name: float(x[np.isfinite(x)].mean()) for name, x in found.items() if np.isfinite(x).any()}
  parts: list[list[str]] = []
  for name in sorted(means, key=means.__getitem__, reverse=True):
    if not parts or 0 < means[name] < means[parts[-1][-1]] / factor:
      parts.append([])
    parts[-1].append(name)
  return [[name for name in named if name in part] for part in parts]
