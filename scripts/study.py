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

import dataclasses
import hashlib
import itertools
import json
import math
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from absl import app, flags, logging

_CONFIG = flags.DEFINE_string("config", None, "The config that all variants start from.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder for table.md, curves.png and metrics.json.", required=True)
_VARIANTS = flags.DEFINE_multi_string("variant", None, '"name" or "name: overrides".', required=True)
_EACH = flags.DEFINE_string("each", "", "Overrides of all runs.")
_THEN = flags.DEFINE_multi_string(
  "then", [], '"name: flags of dtm_jax.main", with {workdir} of the run before.'
)
_JOBS = flags.DEFINE_integer("jobs", 1, "How many runs go on at a time.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "One run of every variant for each.")
_METRICS = flags.DEFINE_list("metrics", None, "Columns: the last value that each run wrote.", required=True)
_CURVES = flags.DEFINE_list("curves", ["loss"], "What is drawn over the steps.")


@dataclasses.dataclass(frozen=True)
class Variant:
  name: str
  overrides: tuple[str, ...]

  @classmethod
  def parse(cls, text: str) -> "Variant":
    name, _, overrides = text.partition(":")
    return cls(name.strip(), tuple(shlex.split(overrides)))


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  out = Path(_OUT.value)
  variants = [Variant.parse(text) for text in _VARIANTS.value]
  runs = Path("runs/study") / Path(_CONFIG.value).stem
  lines = {variant.name: {} for variant in variants}
  with ThreadPoolExecutor(_JOBS.value) as pool:  # of threads that wait for processes
    pending = [
      (variant.name, seed, pool.submit(run_all, variant, seed, runs))
      for seed, variant in itertools.product(_SEEDS.value, variants)
    ]
    for name, seed, result in pending:
      lines[name][seed] = result.result()
  out.mkdir(parents=True, exist_ok=True)
  (out / "metrics.json").write_text(json.dumps(lines, indent=0) + "\n")
  command = shlex.join(["python", "scripts/study.py", *sys.argv[1:]])
  text = "\n".join([*table(lines, _METRICS.value), "", "Made by", "", f"    {command}", ""])
  (out / "table.md").write_text(text)
  draw(lines, _CURVES.value, out / "curves.png")
  print(text)


def run_all(variant: Variant, seed: str, runs: Path) -> list[dict] | None:
  """The metrics of a variant's run and of what comes then; None if one of them failed."""
  each = [f"--config={_CONFIG.value}", *shlex.split(_EACH.value), *variant.overrides]
  workdir = runs / f"{hashlib.sha256(shlex.join(each).encode()).hexdigest()[:8]}-{seed}"
  lines = run(each, seed, workdir)
  for text in _THEN.value:
    name, _, options = text.partition(":")
    if lines is None:
      return None
    then = run(shlex.split(options.format(workdir=workdir)), seed, Path(f"{workdir}-{name}"))
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
      cells.append(f"{np.nanmean(values):.4f} ± {spread(values):.4f}")
    rows.append(f"| {name} | {' | '.join(cells)} |")
  for name in list(lines)[1:]:
    differences = [interval(value(name, metric) - value(first, metric)) for metric in metrics]
    rows.append(f"| {name} - {first} | paired | {' | '.join(differences)} |")
  return header + rows


def spread(values: np.ndarray) -> float:
  values = values[np.isfinite(values)]
  return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def interval(differences: np.ndarray) -> str:
  """Mean and 95 % confidence interval of paired differences."""
  differences = differences[np.isfinite(differences)]
  if len(differences) < 2:
    return "too few"
  half = scipy.stats.t.ppf(0.975, len(differences) - 1) * spread(differences) / math.sqrt(len(differences))
  mean = differences.mean()
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
  app.run(main)
