"""Break runs in every way that users report, and print a table of the outcomes.

    bash scripts/campaign.sh                                  everything; about an hour on two CPU cores
    bash scripts/campaign.sh --parts=damage,soak              some parts
    bash scripts/campaign.sh --only="SIGTERM at step 6"       trials whose names contain this
    bash scripts/campaign.sh --out=results/reliability.md     also writes the table

Every trial starts the real command: 12 steps of `configs/debug.py` with a random teacher and random images. A
failed trial keeps its folder, and the table names it.
"""

import argparse
import dataclasses
import datetime
import importlib
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.campaign import runs, trial

PARTS = (
  "interruptions", "damage", "transient_errors", "full_disks", "processes", "bad_inputs", "soak"
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
  """Run the chosen parts and print the table; returns 1 if a trial went wrong."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, comma-separated")
  parser.add_argument("--only", default="", help="run only trials whose name contains this")
  parser.add_argument("--seed", type=int, default=0, help="of the random moments and places")
  parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
  parser.add_argument("--smoke", action="store_true", help="a trial or two of each part")
  parser.add_argument("--out", type=Path, help="a Markdown file for the table")
  args = parser.parse_args(argv)
  folder = Path(tempfile.mkdtemp(prefix="dtm_jax_campaign_"))
  options = dict(only=args.only, seed=args.seed, jobs=args.jobs, smoke=args.smoke)
  outcomes = run(make_reference(folder), folder, args.parts.split(","), **options)
  table = report(outcomes)
  print(table)
  if args.out:
    args.out.write_text(table)
  wrong = any(each.verdict == "wrong" for part in outcomes.values() for each in part)
  if not wrong:
    shutil.rmtree(folder, ignore_errors=True)
  return int(wrong)


@dataclasses.dataclass(frozen=True)
class Reference:
  """A run without interruption, and its world."""

  world: runs.World
  workdir: Path


def make_reference(folder: Path) -> Reference:
  """Make a world and train a run without interruption in it."""
  world, workdir = runs.World.make(folder / "world"), folder / "reference" / "run"
  runs.finish(world.arguments(workdir), folder / "reference" / "log")
  return Reference(world, workdir)


def run(
  reference: Reference,
  folder: Path,
  parts: list[str],
  *,
  only: str = "",
  seed: int = 0,
  jobs: int = 1,
  smoke: bool = False,
) -> dict[str, list[trial.Outcome]]:
  """Run the trials of the parts and return their outcomes by the title of the part."""
  if unknown := [part for part in parts if part not in PARTS]:
    raise SystemExit(f"Unknown parts: {', '.join(unknown)}. Available: {', '.join(PARTS)}.")
  outcomes = {}
  for part in parts:
    module = importlib.import_module(f"tests.campaign.{part}")
    trials = [
      each for each in module.trials(reference.world, reference.workdir, seed, smoke) if only in each.name
    ]
    places = [folder / part / str(place) for place in range(len(trials))]
    with ThreadPoolExecutor(jobs) as pool:
      outcomes[module.TITLE] = []
      for place, outcome in zip(places, pool.map(trial.attempt, trials, places), strict=True):
        outcomes[module.TITLE].append(outcome)
        print(f"{outcome.verdict:8}{outcome.seconds:6.1f} s  {part}: {outcome.name}  {outcome.remark[:300]}")
        sys.stdout.flush()
        if outcome.verdict != "wrong":
          shutil.rmtree(place, ignore_errors=True)
  return outcomes


def report(outcomes: dict[str, list[trial.Outcome]]) -> str:
  """Return the Markdown page: the table of parts, then every trial that was not right."""
  commit = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"], cwd=runs.ROOT, capture_output=True, text=True
  ).stdout.strip()
  rows = [trial.summary_row(title, part) for title, part in outcomes.items()]
  everything = [each for part in outcomes.values() for each in part]
  lines = [
    "# Reliability: trials and outcomes",
    "",
    f"`python -m tests.campaign` at commit {commit or 'unknown'} on {datetime.date.today()}, Python "
    f"{platform.python_version()}, {platform.machine()}, seed and machine as in the log.",
    "",
    trial.HEADER,
    *rows,
    trial.summary_row("all", everything),
    "",
  ]
  for verdict in ("wrong", "skipped"):
    found = [each for each in everything if each.verdict == verdict]
    lines += [
      f"## {verdict.capitalize()}",
      "",
      *(f"- {each.name}: {each.remark}" for each in found),
      "",
    ] * bool(found)
  return "\n".join(lines)


if __name__ == "__main__":
  sys.exit(main())
