"""Train variants of one config with several seeds, and write a table of paired differences and curves.

    python scripts/study.py --config=configs/quickstart.py --out=results/quickstart --seeds=0,1,2 \\
      --metrics=knn/student_accuracy,finetune/test/logits_top1 --curves=loss_dtm,loss_tokens \\
      --variant="DTM" \\
      --variant="token-wise: --config.morphers.dtm.weight=0 --config.morphers.tokens.weight=1" \\
      --each="--config.evals.knn.at_start=False" \\
      --then="finetune: --config=configs/finetune_cifar10.py --config.init_from.path={workdir}"

A variant is "name: overrides". The table compares each variant with the first one, seed by seed. The command
of --then runs after each run of a variant. {workdir} stands for the folder of that run, and the metrics of
the command are named "finetune/...".

With --setting, which looks like --variant, every variant runs in every setting. The table has a part for each
setting. Its last part compares the differences in the other settings with those in the first one:

      --setting="clean teacher" --setting="noisy teacher: --config.teacher.noise=1"

Runs are in runs/study/<config>/<digest of the overrides>-<seed>[-<then>], so studies with a run in common
share it. All variants of a seed run before the next seed, --jobs of them at a time. The script skips finished
runs and resumes stopped ones. If a run fails, the table names it, and the other runs continue.

--minutes=60 ends the study after this time. The runs that are not finished save their state, the table names
them, and the same command goes on from there.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.stats

from dtm_jax import pictures
from dtm_jax.options.command_line import run_script, script_parser
from dtm_jax.storage import writing

Lines = list[dict]
"""The lines of the metrics.jsonl of a run."""

Results = dict[str, dict[str, "Lines | str"]]
"""Variant -> seed -> the lines of a run, or why there are none: FAILED or UNFINISHED."""

FAILED, UNFINISHED = "failed", "not finished"
STOPPED_CODE = 75
"""Exit code of a run that has saved its state after a SIGTERM; see `dtm_jax.main`."""


@dataclasses.dataclass(frozen=True)
class Variant:
  """A name for the table, and overrides of the config."""

  name: str
  overrides: tuple[str, ...]

  @classmethod
  def parse(cls, text: str) -> "Variant":
    """Return the variant of the text "name" or "name: overrides"."""
    name, _, overrides = text.partition(":")
    return cls(name.strip(), tuple(shlex.split(overrides)))

  def inside(self, setting: "Variant") -> "Variant":
    """Return this variant with the overrides of a setting before its own."""
    return Variant(self.name, (*setting.overrides, *self.overrides))


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  argv = sys.argv[1:] if argv is None else argv
  options = _parser().parse_args(argv)
  options.deadline = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
  settings = [Variant.parse(text) for text in options.setting or ("",)]
  variants = [Variant.parse(text) for text in options.variant]
  names = [variant.name for variant in variants]
  results: dict[str, Results] = {setting.name: {name: {} for name in names} for setting in settings}
  with ThreadPoolExecutor(options.jobs) as pool:  # each thread waits for a process
    pending = [
      (setting.name, variant.name, seed, pool.submit(run_all, variant.inside(setting), seed, options))
      for seed, setting, variant in itertools.product(options.seeds, settings, variants)
    ]
    for setting, name, seed, result in pending:
      results[setting][name][seed] = result.result()
  command = shlex.join(["python", "scripts/study.py", *argv])
  text = "\n".join([*tables(results, options.metrics), "", "Made by", "", f"    {command}", ""])
  found = {setting: {name: _found(runs) for name, runs in part.items()} for setting, part in results.items()}
  with writing.local_folder_for(options.out) as out:
    content = found if options.setting else found[""]
    (out / "metrics.json").write_text(json.dumps(content, indent=0) + "\n")
    (out / "table.md").write_text(text)
    draw(*of_all_settings(found, options.curves), out)
  print(text)


def _parser() -> argparse.ArgumentParser:
  """Return the parser of the command line. Commas separate the items of a list."""
  result = script_parser(__doc__)
  comma_list = lambda text: text.split(",")
  add = result.add_argument
  add("--config", required=True, help="the config of all variants")
  add("--out", required=True, help="the folder for table.md, metrics.json, and curves.svg and .png")
  add("--variant", required=True, action="append", help='"name" or "name: overrides"')
  add("--setting", default=[], action="append", help='"name: overrides"; every variant runs in every setting')
  add("--each", default="", help="overrides for all runs")
  add("--then", default=[], action="append", help='"name: flags of dtm_jax.main", with {workdir} of the run')
  add("--seeds", default=["0", "1", "2"], type=comma_list, help="seeds of each variant")
  add("--jobs", default=1, type=int, help="number of runs at a time")
  add("--minutes", type=float, help="end the study after this time; the same command goes on")
  add("--metrics", required=True, type=comma_list, help="columns of the table: the last value in each run")
  add("--curves", default=["loss"], type=comma_list, help="metrics to draw over the steps")
  return result


def run_all(variant: Variant, seed: str, options: argparse.Namespace) -> Lines | str:
  """Run a variant and the commands of --then. Return their metrics, or FAILED or UNFINISHED."""
  each = [f"--config={options.config}", *shlex.split(options.each), *variant.overrides]
  digest = hashlib.sha256(shlex.join(each).encode()).hexdigest()[:8]
  workdir = Path("runs/study") / Path(options.config).stem / f"{digest}-{seed}"
  lines = run(each, seed, workdir, options.deadline)
  for text in options.then:
    name, _, flags = text.partition(":")
    if isinstance(lines, str):
      return lines
    then = run(shlex.split(flags.format(workdir=workdir)), seed, Path(f"{workdir}-{name}"), options.deadline)
    if isinstance(then, str):
      return then
    lines += [{k if k == "step" else f"{name}/{k}": v for k, v in line.items()} for line in then]
  return lines


def run(options: list[str], seed: str, workdir: Path, deadline: float = math.inf) -> Lines | str:
  """Train a run unless it is finished. Return its metrics, or FAILED or UNFINISHED."""
  command = [
    sys.executable, "-m", "dtm_jax.main", f"--workdir={workdir}", *options, f"--config.seed={seed}"
  ]  # fmt: skip
  done = workdir / "done.txt"  # contains the options of the finished run
  if not (done.exists() and done.read_text() == shlex.join(command[1:])):
    if time.monotonic() >= deadline:
      return UNFINISHED
    workdir.mkdir(parents=True, exist_ok=True)
    logging.info("%s", shlex.join(command[1:]))
    code = execute(command, workdir / "log.txt", deadline)
    if code == STOPPED_CODE:
      return UNFINISHED
    if code:
      logging.error("%s failed with code %d: see %s.", workdir.name, code, workdir / "log.txt")
      return FAILED
    done.write_text(shlex.join(command[1:]))
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def execute(command: list[str], log: Path, deadline: float) -> int:
  """Run a command and return its exit code. It appends to `log`, and gets a SIGTERM at the deadline."""
  with log.open("a") as output:
    environment = os.environ | {"DTM_JAX_STOPPED_CODE": str(STOPPED_CODE)}
    process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
      return process.wait(None if deadline == math.inf else max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
      process.terminate()  # the run saves its state
      code = process.wait()
      return STOPPED_CODE if code == -signal.SIGTERM else code  # it was not yet able to save


def _found(runs: dict[str, Lines | str]) -> dict[str, Lines | None]:
  """Return the lines of each run, or None where there are none."""
  return {seed: None if isinstance(run, str) else run for seed, run in runs.items()}


def last(lines: Lines | str | None, metric: str) -> float:
  """Return the last value of a metric, or NaN if there is none."""
  values = [line[metric] for line in lines or () if isinstance(line, dict) and metric in line]
  return values[-1] if values else math.nan


def values_of(runs: dict[str, Lines | str], metric: str) -> np.ndarray:
  """Return the last value of a metric in the run of each seed, NaN if there is none."""
  return np.array([last(run, metric) for run in runs.values()])


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
  return [*text, "", caveat]


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


def _seeds(runs: dict[str, Lines | str]) -> str:
  """Return the number of seeds, and those without a result: "5 (failed: 2; not finished: 3, 4)"."""
  without = {state: [seed for seed, run in runs.items() if run == state] for state in (FAILED, UNFINISHED)}
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


if __name__ == "__main__":
  run_script(main)
