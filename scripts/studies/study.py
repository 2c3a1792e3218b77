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

from dtm_jax.options.command_line import run_script, script_parser, start_above
from dtm_jax.storage import writing

if not __package__:
  start_above(__file__)

from . import paired_tables
from .paired_tables import FAILED, UNFINISHED, Lines, Result, Results

DONE = "done.txt"
"""The file in a workdir with the command that has finished there."""

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
  for setting, variant in itertools.product(settings, variants) if options.vmap_seeds else ():
    train_seeds(variant.inside(setting), options)
  with ThreadPoolExecutor(options.jobs) as pool:  # each thread waits for a process
    pending = [
      (setting.name, variant.name, seed, pool.submit(run_all, variant.inside(setting), seed, options))
      for seed, setting, variant in itertools.product(options.seeds, settings, variants)
    ]
    for place, name, seed, result in pending:
      results[place][name][seed] = result.result()
  command = shlex.join(["python", "scripts/study.py", *argv])
  text = "\n".join([*paired_tables.tables(results, options.metrics), "", "Made by", "", f"    {command}", ""])
  found = {
    setting: {
      name: {seed: result.lines or None for seed, result in runs.items()} for name, runs in part.items()
    }
    for setting, part in results.items()
  }
  with writing.local_folder_for(options.out) as out:
    content = found if options.setting else found[""]
    (out / "metrics.json").write_text(json.dumps(content, indent=0) + "\n")
    (out / "table.md").write_text(text)
    paired_tables.draw(*paired_tables.of_all_settings(found, options.curves), out)
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
  add("--vmap_seeds", action="store_true", help="train all seeds of a variant at once")
  add("--minutes", type=float, help="end the study after this time; the same command goes on")
  add("--metrics", required=True, type=comma_list, help="columns of the table: the last value in each run")
  add("--curves", default=["loss"], type=comma_list, help="metrics to draw over the steps")
  return result


def flags_of(variant: Variant, options: argparse.Namespace) -> list[str]:
  """Return the flags that all seeds of a variant share."""
  return [f"--config={options.config}", *shlex.split(options.each), *variant.overrides]


def workdir_of(variant: Variant, seed: str, options: argparse.Namespace) -> Path:
  """Return the workdir of a run."""
  digest = hashlib.sha256(shlex.join(flags_of(variant, options)).encode()).hexdigest()[:8]
  return Path("runs/study") / Path(options.config).stem / f"{digest}-{seed}"


def train_seeds(variant: Variant, options: argparse.Namespace) -> None:
  """Train all seeds of a variant that are not finished at once. A failure leaves them to `run_all`."""
  each, workdirs = flags_of(variant, options), {}
  for seed in options.seeds:
    workdir = workdir_of(variant, seed, options)
    if not is_done(workdir, command_of(each, seed, workdir)):
      workdirs[seed] = workdir
  if len(workdirs) < 2 or time.monotonic() >= options.deadline:
    return
  command = [
    sys.executable, "-m", "scripts.studies.train_seeds", f"--seeds={','.join(workdirs)}",
    f"--workdir={workdir_of(variant, '{seed}', options)}", *each,
  ]  # fmt: skip
  log = workdir_of(variant, "seeds.txt", options)
  log.parent.mkdir(parents=True, exist_ok=True)
  logging.info("%s", shlex.join(command[1:]))
  code = execute(command, log, options.deadline)
  if code in (0, STOPPED_CODE):
    for seed, workdir in workdirs.items() if code == 0 else ():
      (workdir / DONE).write_text(shlex.join(command_of(each, seed, workdir)[1:]))
    return
  logging.error("Seeds %s together failed with code %d: see %s. They run one by one.", *(
    ", ".join(workdirs), code, log,
  ))  # fmt: skip


def command_of(options: list[str], seed: str, workdir: Path) -> list[str]:
  """Return the command of one run."""
  return [
    sys.executable, "-m", "dtm_jax.main", f"--workdir={workdir}", *options, f"--config.seed={seed}"
  ]  # fmt: skip


def is_done(workdir: Path, command: list[str]) -> bool:
  """Return whether this command has finished in the workdir."""
  done = workdir / DONE
  return done.exists() and done.read_text() == shlex.join(command[1:])


def run_all(variant: Variant, seed: str, options: argparse.Namespace) -> Result:
  """Run a variant and the commands of --then, until one of them fails or the time is over."""
  workdir = workdir_of(variant, seed, options)
  found = run(flags_of(variant, options), seed, workdir, options.deadline)
  if isinstance(found, str):
    return Result([], found)
  lines = found
  for text in options.then:
    name, _, flags = text.partition(":")
    then = run(shlex.split(flags.format(workdir=workdir)), seed, Path(f"{workdir}-{name}"), options.deadline)
    if isinstance(then, str):
      return Result(lines, then)
    lines += [{k if k == "step" else f"{name}/{k}": v for k, v in line.items()} for line in then]
  return Result(lines)


def run(options: list[str], seed: str, workdir: Path, deadline: float = math.inf) -> Lines | str:
  """Train a run unless it is finished. Return its metrics, or FAILED or UNFINISHED."""
  command = command_of(options, seed, workdir)
  if not is_done(workdir, command):
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
    (workdir / DONE).write_text(shlex.join(command[1:]))
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


if __name__ == "__main__":
  run_script(main)
