"""Write the sections of a report as HTML. Each says why it is empty if a run has nothing to show."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dtm_jax.report import charts, curves, strips
from dtm_jax.report.curves import Chart
from dtm_jax.report.run_files import Points, RunFiles

SHARES = ("accuracy", "top1", "top5", "miou", "zeroshot", "linear")
"""Words in the names of numbers that are shown in percent."""
MOST_STARTS = 12


def curves_section(runs: Sequence[RunFiles]) -> str:
  """Return the charts of the numbers of the training."""
  found = curves.training(runs)
  if not found:
    return "<p>This run has no training steps.</p>"
  return chart_grid(found)


def images_section(runs: Sequence[RunFiles]) -> str:
  """Return the strips of the recorded images and their groups."""
  found = strips.cards(runs)
  if not found:
    return "<p>This run has recorded no groups. The evaluator <code>snapshots</code> records them.</p>"
  words = (
    "<p>Similar patch tokens form a group, and each group has its mean colour. In the middle are the groups "
    "of the student’s tokens after the number of steps above them. On the right are those of the teacher, "
    "which stay the same.</p>"
  )
  return f'{words}<div class="cards">{"".join(found)}</div>'


def tokens_section(runs: Sequence[RunFiles]) -> str:
  """Return the charts of the measures of tokens and features."""
  found = curves.snapshots(runs)
  if not found:
    return "<p>This run has not measured its tokens over time. The evaluator <code>snapshots</code> does.</p>"
  return chart_grid(found)


def evaluations_section(runs: Sequence[RunFiles]) -> str:
  """Return a table of the first, last and highest value of every evaluation, and curves of several values."""
  found = {name: each for name, each in curves.evaluated(runs).items() if any(each)}
  if not found:
    return "<p>This run has no evaluations.</p>"
  labels = [
    f"{run.name}: {title}" if len(runs) > 1 else title
    for run in runs
    for title in ("first", "last", "highest")
  ]
  rows = [
    (name, [text for points in each for text in _first_last_highest(name, points)])
    for name, each in found.items()
  ]
  drawn = curves.evaluations(runs)
  return table("number", labels, rows) + (chart_grid(drawn) if drawn else "")


def _first_last_highest(name: str, points: Points) -> tuple[str, str, str]:
  if not points:
    return "", "", ""
  say = lambda point: f"{shown(name, point[1])} <small>step {point[0]:,}</small>"
  several = len(points) > 1
  highest = max(points, key=lambda point: point[1])
  return say(points[0]) if several else "", say(points[-1]), say(highest) if several else ""


def differences(runs: Sequence[RunFiles]) -> str:
  """Return a table of the options that differ between the runs; nothing for one run."""
  if len(runs) < 2:
    return ""
  options = [run.options for run in runs]
  keys = [key for key in dict.fromkeys(key for each in options for key in each) if _differs(key, options)]
  if not keys:
    return "<p>The configurations are the same.</p>"
  rows = [(key, [html.escape(_said(each.get(key))) for each in options]) for key in keys]
  return f"<p>{len(keys)} options differ.</p>{table('option', [run.name for run in runs], rows)}"


def _differs(key: str, options: Sequence[Mapping[str, Any]]) -> bool:
  return any(each.get(key) != options[0].get(key) for each in options)


def config_section(run: RunFiles, num_runs: int) -> str:
  """Return all options of a run, by section."""
  sections: dict[str, list[tuple[str, Any]]] = {"": []}  # options outside of sections come first
  for key, value in run.options.items():
    section, dot, option = key.partition(".")
    sections.setdefault(section if dot else "", []).append((option if dot else key, value))
  if not run.options:
    return "<p>The configuration is not known.</p>"
  boxes = []
  for section, options in sections.items():
    if not options:
      continue
    rows = "".join(
      f"<dt>{html.escape(key)}</dt><dd>{html.escape(_said(value))}</dd>" for key, value in options
    )
    boxes.append(f'<div class="section"><h3>{html.escape(section or "run")}</h3><dl>{rows}</dl></div>')
  title = f"<h3>{html.escape(run.name)}</h3>" if num_runs > 1 else ""
  return f'{title}<div class="options">{"".join(boxes)}</div>'


def environment_section(run: RunFiles, num_runs: int) -> str:
  """Return the machine, the code and the history of starts of a run."""
  title = f"<h3>{html.escape(run.name)}</h3>" if num_runs > 1 else ""
  if not run.starts:
    return f"<div>{title}<p>The environment is not known.</p></div>"
  last = run.starts[-1]
  facts = {
    "devices": last.get("devices"),
    "processes": last.get("processes"),
    "host": last.get("host"),
    "versions": ", ".join(
      f"{name} {version}" for name, version in (last.get("versions") or {}).items() if version
    ),
    "commit": last.get("commit"),
    "command": last.get("command"),
    "classes": f"{len(run.class_names):,}" if run.class_names else None,
  }
  rows = "".join(
    f"<dt>{name}</dt><dd>{_code(fact) if name in ('commit', 'command') else html.escape(str(fact))}</dd>"
    for name, fact in facts.items()
    if fact is not None
  )
  return f'<div>{title}<dl class="facts">{rows}</dl>{_starts(run)}</div>'


def _starts(run: RunFiles) -> str:
  """Return the history of starts. Of many starts, the first and the last ones."""
  starts = list(enumerate(run.starts, start=1))
  if len(starts) == 1:
    return ""
  words = f"<p>The run was started {len(starts)} times.</p>"
  if len(starts) > MOST_STARTS:
    starts = [starts[0], *starts[1 - MOST_STARTS :]]
    words = f"<p>The run was started {len(run.starts)} times. The first and the last starts:</p>"
  labels = ("time", "from step", "devices", "commit", "changed options")
  rows = []
  for number, start in starts:
    cells = (
      str(start.get("time", ""))[:16].replace("T", " "),
      f"{start.get('step', 0):,}",
      str(start.get("devices", "")),
      str(start.get("commit") or "")[:10],
      ", ".join((start.get("changes") or {}).keys()),
    )
    rows.append((f"start {number}", [html.escape(cell) for cell in cells]))
  return words + table("", labels, rows)


# Parts --------------------------------------------------------------------------------------------------


def table(corner: str, labels: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
  """Return a table. On a narrow screen each row becomes a block in which every cell has its label.

  Args:
    corner: what the first column holds.
    labels: the titles of the other columns.
    rows: the title of each row, and its cells as HTML.
  """
  head = "".join(f'<th scope="col">{html.escape(label)}</th>' for label in (corner, *labels))
  body = []
  for title, cells in rows:
    data = "".join(
      f'<td data-label="{html.escape(label)}">{cell}</td>' for label, cell in zip(labels, cells, strict=True)
    )
    body.append(f'<tr><th scope="row">{html.escape(title)}</th>{data}</tr>')
  return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _code(text: object) -> str:
  return f"<code>{html.escape(str(text))}</code>"


def shown(name: str, value: float) -> str:
  """Return a number of an evaluation: in percent if it is a share."""
  return f"{100 * value:.1f} %" if any(word in name for word in SHARES) else charts.number(value)


def _said(value: Any) -> str:
  """Return an option as people type it."""
  return value if isinstance(value, str) else "not set" if value is None else json.dumps(value)


def whose(run: RunFiles, runs: Sequence[RunFiles]) -> str:
  """Return the name of the run before a sentence, if there are several runs."""
  return f'<b class="r{runs.index(run)}">{html.escape(run.name)}</b>: ' if len(runs) > 1 else ""


def chart_grid(found: Sequence[Chart]) -> str:
  """Return charts beside and below one another."""
  return f'<div class="charts">{"".join(chart.card() for chart in found)}</div>'


def pair(parts: Sequence[str]) -> str:
  """Return parts side by side where the screen is wide."""
  return parts[0] if len(parts) == 1 else f'<div class="pair">{"".join(parts)}</div>'
