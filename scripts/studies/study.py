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

Runs are in runs/study/<config>/<digest of the overrides>-<seed>[-<then>], so studies with a run in common
share it. All variants of a seed run before the next seed, --jobs of them at a time. The script skips finished
runs and resumes stopped ones. If a run fails, the table names it, and the other runs continue.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import shlex
import subprocess
import sys
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


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  argv = sys.argv[1:] if argv is None else argv
  options = _parser().parse_args(argv)
  runs = Path("runs/study") / Path(options.config).stem
  variants = [Variant.parse(text) for text in options.variant]
  lines: dict[str, dict[str, Lines | None]] = {variant.name: {} for variant in variants}
  with ThreadPoolExecutor(options.jobs) as pool:  # each thread waits for a process
    pending = [
      (variant.name, seed, pool.submit(run_all, variant, seed, runs, options))
      for seed, variant in itertools.product(options.seeds, variants)
    ]
    for name, seed, result in pending:
      lines[name][seed] = result.result()
  command = shlex.join(["python", "scripts/study.py", *argv])
  text = "\n".join([*table(lines, options.metrics), "", "Made by", "", f"    {command}", ""])
  with writing.local_folder_for(options.out) as out:
    (out / "metrics.json").write_text(json.dumps(lines, indent=0) + "\n")
    (out / "table.md").write_text(text)
    draw(lines, options.curves, out)
  print(text)


def _parser() -> argparse.ArgumentParser:
  """Return the parser of the command line. Commas separate the items of a list."""
  result = script_parser(__doc__)
  comma_list = lambda text: text.split(",")
  add = result.add_argument
  add("--config", required=True, help="the config of all variants")
  add("--out", required=True, help="the folder for table.md, metrics.json, and curves.svg and .png")
  add("--variant", required=True, action="append", help='"name" or "name: overrides"')
  add("--each", default="", help="overrides for all runs")
  add("--then", default=[], action="append", help='"name: flags of dtm_jax.main", with {workdir} of the run')
  add("--seeds", default=["0", "1", "2"], type=comma_list, help="seeds of each variant")
  add("--jobs", default=1, type=int, help="number of runs at a time")
  add("--metrics", required=True, type=comma_list, help="columns of the table: the last value in each run")
  add("--curves", default=["loss"], type=comma_list, help="metrics to draw over the steps")
  return result


def run_all(variant: Variant, seed: str, runs: Path, options: argparse.Namespace) -> Lines | None:
  """Run a variant and the commands of --then, and return their metrics. Return None if one of them fails."""
  each = [f"--config={options.config}", *shlex.split(options.each), *variant.overrides]
  workdir = runs / f"{hashlib.sha256(shlex.join(each).encode()).hexdigest()[:8]}-{seed}"
  lines = run(each, seed, workdir)
  for text in options.then:
    name, _, flags = text.partition(":")
    if lines is None:
      return None
    then = run(shlex.split(flags.format(workdir=workdir)), seed, Path(f"{workdir}-{name}"))
    prefixed = [{k if k == "step" else f"{name}/{k}": v for k, v in line.items()} for line in then or ()]
    lines = None if then is None else lines + prefixed
  return lines


def run(options: list[str], seed: str, workdir: Path) -> Lines | None:
  """Train a run unless it is finished, and return its metrics. Return None if it fails."""
  command = [
    sys.executable, "-m", "dtm_jax.main", f"--workdir={workdir}", *options, f"--config.seed={seed}"
  ]  # fmt: skip
  done = workdir / "done.txt"  # contains the options of the finished run
  if not (done.exists() and done.read_text() == shlex.join(command[1:])):
    workdir.mkdir(parents=True, exist_ok=True)
    logging.info("%s", shlex.join(command[1:]))
    with (workdir / "log.txt").open("a") as log:
      code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if code:
      logging.error("%s failed with code %d: see %s.", workdir.name, code, log.name)
      return None
    done.write_text(shlex.join(command[1:]))
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def last(lines: Lines | None, metric: str) -> float:
  """Return the last value of a metric, or NaN if there is none."""
  values = [line[metric] for line in lines or () if metric in line]
  return values[-1] if values else math.nan


def table(lines: dict[str, dict[str, Lines | None]], metrics: list[str]) -> list[str]:
  """Return the lines of a Markdown table: mean ± standard deviation, and the paired differences."""
  value = lambda name, metric: np.array([last(run, metric) for run in lines[name].values()])
  first = next(iter(lines))
  header = [f"| variant | seeds | {' | '.join(metrics)} |", f"|---|---|{'---|' * len(metrics)}"]
  rows = []
  for name in lines:
    cells = [f"{len(lines[name])}"]
    failed = [seed for seed, run in lines[name].items() if run is None]
    cells[0] += f" (failed: {', '.join(failed)})" if failed else ""
    for metric in metrics:
      values = value(name, metric)
      values = values[np.isfinite(values)]
      several = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
      cells.append(f"{values.mean():.4f}{several}" if len(values) else "none")
    rows.append(f"| {name} | {' | '.join(cells)} |")
  for name in list(lines)[1:]:
    differences = [interval(value(name, metric) - value(first, metric)) for metric in metrics]
    rows.append(f"| {name} - {first} | paired | {' | '.join(differences)} |")
  return header + rows


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
