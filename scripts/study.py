"""Variants of one config over several seeds: a table with paired differences, and curves.

    python scripts/study.py --config=configs/quickstart.py --out=results/quickstart --seeds=0,1,2 \\
      --metrics=knn/student_accuracy,finetune/test/logits_top1 --curves=loss_dtm,loss_tokens \\
      --variant="DTM" \\
      --variant="token-wise: --config.morphers.dtm.weight=0 --config.morphers.tokens.weight=1" \\
      --each="--config.evals.knn.at_start=False" \\
      --then="finetune: --config=configs/finetune_cifar10.py --config.init_from.path={workdir}"

A variant is "name: overrides"; the first one is what the others are compared with, seed by seed. What comes
--then is run after every variant's run, with {workdir} for its folder; its metrics are named "finetune/...".
Runs lie in runs/study/<config>/<digest of the overrides>-<seed>[-<then>]: studies that have a run in common
share it. One seed of all variants comes before the next seed, --jobs of them at a time. What is finished is
not run again, what was stopped resumes, and a run that fails is named in the table while the others go on.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from dtm_jax.storage import writing


@dataclasses.dataclass(frozen=True)
class Variant:
  name: str
  overrides: tuple[str, ...]

  @classmethod
  def parse(cls, text: str) -> "Variant":
    name, _, overrides = text.partition(":")
    return cls(name.strip(), tuple(shlex.split(overrides)))


def main(argv: list[str]) -> None:
  options = parser().parse_args(argv)
  runs = Path("runs/study") / Path(options.config).stem
  variants = [Variant.parse(text) for text in options.variant]
  lines = {variant.name: {} for variant in variants}
  with ThreadPoolExecutor(options.jobs) as pool:  # of threads that wait for processes
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
    draw(lines, options.curves, out / "curves.png")
  print(text)


def parser() -> argparse.ArgumentParser:
  """The flags; lists are written with commas."""
  result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  comma_list = lambda text: text.split(",")
  add = result.add_argument
  add("--config", required=True, help="the config that all variants start from")
  add("--out", required=True, help="folder for table.md, curves.png and metrics.json")
  add("--variant", required=True, action="append", help='"name" or "name: overrides"')
  add("--each", default="", help="overrides of all runs")
  add("--then", default=[], action="append", help='"name: flags of dtm_jax.main", with {workdir} of the run')
  add("--seeds", default=["0", "1", "2"], type=comma_list, help="one run of every variant for each")
  add("--jobs", default=1, type=int, help="how many runs go on at a time")
  add("--metrics", required=True, type=comma_list, help="columns: the last value that each run wrote")
  add("--curves", default=["loss"], type=comma_list, help="what is drawn over the steps")
  return result


def run_all(variant: Variant, seed: str, runs: Path, options: argparse.Namespace) -> list[dict] | None:
  """The metrics of a variant's run and of what comes then; None if one of them failed."""
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


def run(options: list[str], seed: str, workdir: Path) -> list[dict] | None:
  """The lines of metrics.jsonl of a finished run; None if it failed."""
  command = [
    sys.executable, "-m", "dtm_jax.main", f"--workdir={workdir}", *options, f"--config.seed={seed}"
  ]  # fmt: skip
  done = workdir / "done.txt"  # holds the options: with other ones it is another run
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


def last(lines: list[dict] | None, metric: str) -> float:
  values = [line[metric] for line in lines or () if metric in line]
  return values[-1] if values else math.nan


def table(lines: dict[str, dict[str, list[dict] | None]], metrics: list[str]) -> list[str]:
  """Markdown: mean ± standard deviation, and the mean paired difference with its 95 % interval by Student."""
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
  """Mean and 95 % confidence interval of paired differences; one pair has no interval."""
  differences = differences[np.isfinite(differences)]
  if len(differences) < 2:
    return f"{differences[0]:+.4f}, one pair" if len(differences) else "none"
  mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences))
  half = scipy.stats.t.ppf(0.975, len(differences) - 1) * error
  return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


def draw(lines: dict[str, dict[str, list[dict] | None]], curves: list[str], path: Path) -> None:
  """One panel for each curve, one colour for each variant, one thin line for each seed."""
  figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 3.5), squeeze=False)
  for axis, metric in zip(axes[0], curves, strict=True):
    for index, (name, runs) in enumerate(lines.items()):
      for number, run_lines in enumerate(filter(None, runs.values())):
        points = [(line["step"], line[metric]) for line in run_lines if metric in line]
        label = None if number else name
        axis.plot(*zip(*points, strict=True), color=f"C{index}", alpha=0.7, label=label) if points else None
    axis.set(xlabel="step", title=metric)
    axis.grid(alpha=0.3)
  axes[0][0].legend()
  figure.tight_layout()
  figure.savefig(path, dpi=100)


if __name__ == "__main__":
  logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
  main(sys.argv[1:])
