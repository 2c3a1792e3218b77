"""Choose the curves of a report: which numbers share a chart, and what each is called."""

import dataclasses
import html
from collections.abc import Callable, Sequence

from dtm_jax.report import charts
from dtm_jax.report.charts import Series
from dtm_jax.report.run_files import Points, RunFiles

TITLES = {
  "loss": "Loss",
  "grad_norm": "Gradient norm",
  "learning_rate": "Learning rate",
  "images_per_sec": "Images per second",
  "input_wait": "Waiting for input, share of time",
  "memory_peak_gib": "Peak memory of a device, GiB",
}
COUNTS = ("epoch", "compilations", "corrupt_images", "memory_gib", "steps_per_sec", "uptime")
"""Numbers that are no curves. Older versions also wrote the last two."""
MEASURES = {
  "cosine": ("Cosine of neighbouring tokens", "1: tokens that share a side are alike"),
  "rank": ("Effective rank of the features (RankMe)", "low: the features collapse"),
  "agreement": ("Agreement of the student’s groups with the teacher’s", "1: equal, 0: chance"),
}


@dataclasses.dataclass(frozen=True)
class Chart:
  """One chart: curves of the same unit.

  Attributes:
    name: for the file of a figure.
    title: what the values are.
    series: its curves.
    note: how to read the values.
  """

  name: str
  title: str
  series: Sequence[Series]
  note: str = ""

  def card(self) -> str:
    """Return the chart for the page, with its legend and the last values."""
    drawn = [each for each in self.series if each.points]
    last = " · ".join(
      f'<b class="r{each.colour}">{charts.number(each.points[-1][1])}</b>'
      for each in drawn
      if not each.dashed
    )
    legend = "".join(
      f'<span class="key k{each.colour}{" dashed" if each.dashed else ""}">{html.escape(each.name)}</span>'
      for each in drawn
    )
    legend = f'<p class="legend">{legend}</p>' if len(drawn) > 1 else ""
    note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
    return (
      f'<figure class="chart"><figcaption>{html.escape(self.title)} <span>{last}</span></figcaption>'
      f"{charts.draw(self.title, drawn)}{legend}{note}</figure>"
    )

  def file(self) -> str:
    """Return the chart as the content of an SVG file."""
    return charts.draw(self.title, [each for each in self.series if each.points], own_file=True)


def training(runs: Sequence[RunFiles]) -> list[Chart]:
  """Return the charts of the numbers that the training writes, the losses first."""
  names = _all_metrics(runs, lambda name: "/" not in name and name not in COUNTS)
  order = [
    *(name for name in names if name.startswith("loss")),
    *(n for n in names if n.startswith("groups")),
  ]
  names = [*dict.fromkeys([*order, *TITLES, *names])]
  found = []
  for name in names:
    if name != "loss" and name.startswith("loss_") and all(_is_the_loss(run, name) for run in runs):
      continue  # with one weighted morpher, its loss is the loss
    series = [Series(run.name, run.points(name), number) for number, run in enumerate(runs)]
    if any(each.points for each in series) and not (name.startswith("groups_") and _is_constant(series)):
      found.append(Chart(name, _title(name), series))
  return found


def snapshots(runs: Sequence[RunFiles]) -> list[Chart]:
  """Return the charts of what the evaluators of the kind "snapshots" have measured."""
  found = []
  for section in _sections(runs):
    for measure, (title, note) in MEASURES.items():
      series = []
      for number, run in enumerate(runs):
        for metric in run.metrics:
          if metric.startswith(f"{section}/") and metric.endswith(f"_{measure}"):
            series.append(_of_tokens(run, metric, measure, number, len(runs)))
      if any(each.points for each in series):
        found.append(Chart(f"{section}_{measure}", title, series, note))
  return found


def evaluations(runs: Sequence[RunFiles]) -> list[Chart]:
  """Return the charts of all other evaluations that have more than one value."""
  found, watched = [], tuple(f"{section}/" for section in _sections(runs))
  for name in _all_metrics(runs, lambda name: "/" in name and not name.startswith(watched)):
    series = [Series(run.name, run.points(name), number) for number, run in enumerate(runs)]
    if any(len(each.points) > 1 for each in series):
      found.append(Chart(name.replace("/", "_"), name, series))
  return found


def evaluated(runs: Sequence[RunFiles]) -> dict[str, list[Points]]:
  """Return the values of every evaluation, of each run. Those of the kind "snapshots" come last."""
  watched = tuple(f"{section}/" for section in _sections(runs))
  names = sorted(_all_metrics(runs, lambda name: "/" in name), key=lambda name: name.startswith(watched))
  return {name: [run.points(name) for run in runs] for name in names}


def _sections(runs: Sequence[RunFiles]) -> list[str]:
  """Return the names of the evaluators of the kind "snapshots"."""
  found = []
  for run in runs:
    for name, options in (run.config.get("evals") or {}).items():
      if options.get("name", name) == "snapshots":
        found.append(name)
  return list(dict.fromkeys(found))


def _of_tokens(run: RunFiles, metric: str, measure: str, number: int, num_runs: int) -> Series:
  """Return the curve of one kind of tokens. A teacher's is dashed, because it is a reference."""
  tokens = metric.partition("/")[2].removesuffix(f"_{measure}").partition("_")[0]
  reference = measure != "agreement" and tokens != "student"
  words = run.name if measure == "agreement" else f"{tokens}, {run.name}" if num_runs > 1 else tokens
  return Series(words, run.points(metric), number if num_runs > 1 else 2 * reference, reference)


def _title(name: str) -> str:
  kind, _, what = name.partition("_")
  if name in TITLES:
    return TITLES[name]
  if kind == "loss":
    return f"Loss of the morpher “{what}”"
  if kind == "groups":
    return f"Groups of an image by “{what}”, mean"
  return name


def _is_constant(series: Sequence[Series]) -> bool:
  """Return whether a morpher always makes the same number of groups, so that a chart would show nothing."""
  values = {value for each in series for _, value in each.points}
  return len(values) == 1 and any(len(each.points) > 1 for each in series)


def _is_the_loss(run: RunFiles, name: str) -> bool:
  return all(line.get(name) == line.get("loss") for line in run.lines if name in line)


def _all_metrics(runs: Sequence[RunFiles], wanted: Callable[[str], bool]) -> list[str]:
  return list(dict.fromkeys(name for run in runs for name in run.metrics if wanted(name)))
