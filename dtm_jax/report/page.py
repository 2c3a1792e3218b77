"""Write the HTML page of a report. It loads no other file and no network address."""

import datetime
import html
import string
from collections.abc import Sequence
from pathlib import Path

from dtm_jax.progress import duration
from dtm_jax.report import charts, curves, sections
from dtm_jax.report.run_files import RunFiles
from dtm_jax.report.sections import SHARES, shown

TEMPLATE = Path(__file__).with_suffix(".html")
SECTIONS = {
  "curves": "Curves",
  "images": "The same images over time",
  "tokens": "Tokens and features over time",
  "evaluations": "Evaluations",
  "config": "Configuration",
  "environment": "Environment",
}
"""The sections by id, in their order. A section without content says why it is empty."""
LEAD = {
  "data set": ("data.dataset.name",),
  "student": ("student.variant",),
  "model": ("model.variant",),
  "teacher": ("teacher.name", "teacher.path"),
}
"""The options that say what a run is."""


def make(runs: Sequence[RunFiles]) -> str:
  """Return the page of one run, or of several runs side by side."""
  contents = {
    "curves": sections.curves_section(runs),
    "images": sections.images_section(runs),
    "tokens": sections.tokens_section(runs),
    "evaluations": sections.evaluations_section(runs),
    "config": sections.differences(runs) + "".join(sections.config_section(run, len(runs)) for run in runs),
    "environment": sections.pair([sections.environment_section(run, len(runs)) for run in runs]),
  }
  notes = [f"{sections.whose(run, runs)}{html.escape(note)}" for run in runs for note in run.notes]
  return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
    title=html.escape(" and ".join(run.name for run in runs)),
    lead="<br>".join(f"{sections.whose(run, runs)}{html.escape(_lead(run))}" for run in runs),
    notes=f'<ul class="notes">{"".join(f"<li>{note}</li>" for note in notes)}</ul>' if notes else "",
    tiles="".join(_tiles(run, runs) for run in runs),
    nav="".join(f'<a href="#{key}">{title}</a>' for key, title in SECTIONS.items()),
    sections="\n".join(
      f'<section id="{key}"><h2>{title}</h2>{contents[key]}</section>' for key, title in SECTIONS.items()
    ),
    footer=f"Made {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC from "
    + ", ".join(f"<code>{html.escape(run.workdir)}</code>" for run in runs),
    left=charts.LEFT, right=charts.WIDTH - charts.RIGHT, top=charts.TOP, bottom=charts.HEIGHT - charts.BOTTOM,
  )  # fmt: skip


def figures(runs: Sequence[RunFiles]) -> dict[str, str]:
  """Return all charts as SVG files, by name."""
  found = [*curves.training(runs), *curves.snapshots(runs), *curves.evaluations(runs)]
  return {f"{chart.name}.svg": chart.file() for chart in found}


def _lead(run: RunFiles) -> str:
  """Return what the run is, in one line."""
  options = run.options
  parts = [f"task {options.get('task', 'unknown')}"]
  for title, keys in LEAD.items():
    found = [str(options[key]) for key in keys if key in options]
    if found:
      parts.append(f"{title} {found[0]}" + (f" ({found[1]})" if len(found) > 1 else ""))
  if run.starts:
    parts.append(f"started {str(run.starts[0].get('time', 'at an unknown time'))[:16].replace('T', ' ')}")
  return ", ".join(parts)


def _tiles(run: RunFiles, runs: Sequence[RunFiles]) -> str:
  """Return the numbers that people look for first."""
  tiles = [("Steps", *_progress(run))]
  losses = run.points("loss")
  if losses:
    tiles.append(
      ("Loss", charts.number(losses[-1][1]), f"{charts.number(losses[0][1])} at step {losses[0][0]:,}")
    )
  for name, (points,) in curves.evaluated([run]).items():
    if points and any(word in name for word in SHARES) and "teacher" not in name and len(tiles) < 4:
      note = f"{shown(name, points[0][1])} at step {points[0][0]:,}" if len(points) > 1 else "one evaluation"
      tiles.append((name, shown(name, points[-1][1]), note))
  if speeds := [value for _, value in run.points("images_per_sec")]:
    waits = [value for _, value in run.points("input_wait")]
    wait = f"{sum(waits) / len(waits):.1%} of it waiting for input" if waits else ""
    tiles.append(
      ("Images per second", charts.number(sorted(speeds)[len(speeds) // 2]), f"median; {wait}".rstrip("; "))
    )
  if seconds := _seconds(run):
    tiles.append(("Time in training steps", duration(seconds), "without evaluations and start-up"))
  if corrupt := [value for _, value in run.points("corrupt_images") if value]:
    tiles.append(("Corrupt images", f"{corrupt[-1]:,.0f}", "skipped"))
  whose = f'<p class="whose r{runs.index(run)}">{html.escape(run.name)}</p>' if len(runs) > 1 else ""
  cells = "".join(
    f"<div><dt>{html.escape(title)}</dt><dd>{html.escape(value)}<small>{html.escape(note)}</small></dd></div>"
    for title, value, note in tiles
  )
  return f'{whose}<dl class="tiles">{cells}</dl>'


def _progress(run: RunFiles) -> tuple[str, str]:
  """Return the number of steps, and of how many or how many epochs."""
  steps = max((line["step"] for line in run.lines), default=0)
  total, epochs = run.options.get("total_steps"), run.points("epoch")
  notes = [f"of {total:,}"] if isinstance(total, int) and total > steps else []
  if epochs:
    notes.append(f"{epochs[-1][1]:.4g} epochs")
  return f"{steps:,}", ", ".join(notes)


def _seconds(run: RunFiles) -> float:
  """Return the time that the steps took, from the speed of each window of the log."""
  batch_size, before, seconds = run.options.get("batch_size"), 0, 0.0
  if not isinstance(batch_size, int):
    return 0.0
  for step, speed in run.points("images_per_sec"):
    seconds += (step - before) * batch_size / speed if speed > 0 else 0.0
    before = step
  return seconds
