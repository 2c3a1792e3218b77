"""Run 10,000 steps: memory, threads, open files and compilations must not grow."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from tests.campaign import runs
from tests.campaign.trial import Trial

TITLE = "soak: 10,000 steps"
STEPS, SMOKE_STEPS = 10_000, 60
MOST_GROWTH_MIB = 32.0


def trials(world: runs.World, reference: Path, seed: int, smoke: bool) -> Iterator[Trial]:
  """Yield one long run with saves, log lines and evaluations at different periods."""
  count = SMOKE_STEPS if smoke else STEPS
  yield Trial(f"{count} steps", lambda folder: _trial(world, count, folder))


def _trial(world: runs.World, count: int, folder: Path) -> str:
  workdir = folder / "run"
  arguments = world.arguments(
    workdir, f"--config.total_steps={count}", f"--config.checkpoint.save_steps={count // 20}",
    f"--config.log.log_steps={max(count // 100, 1)}", f"--config.evals.knn.every_steps={count // 4}",
  )  # fmt: skip
  process = runs.Process(arguments, folder / "log")
  samples = []
  while process.returncode is None:
    found = runs.lines(workdir) if (workdir / "metrics.jsonl").exists() else []
    if found and (usage := _usage(process.pid)):
      samples.append((found[-1]["step"], *usage))
    time.sleep(0.5 if count > 1000 else 0.05)
  assert process.returncode == 0, process.text()[-2000:]
  compilations = {line["compilations"] for line in runs.lines(workdir) if "compilations" in line}
  assert compilations == {1}, f"compilations {compilations}"
  early = [each for each in samples if count * 0.3 <= each[0] < count * 0.45]
  late = [each for each in samples if each[0] >= count * 0.8]
  assert early, "the run was too quick to be watched"
  assert late, "the run was too quick to be watched"
  growth = [max(each[i] for each in late) - max(each[i] for each in early) for i in (1, 2, 3)]
  remark = f"growth: {growth[0]:.1f} MiB, {growth[1]} threads, {growth[2]} files"
  assert growth[0] < MOST_GROWTH_MIB, remark
  assert growth[1] <= 2, remark
  assert growth[2] <= 4, remark
  return remark


def _usage(pid: int) -> tuple[float, int, int] | None:
  """Return resident memory in MiB, threads and open files; None if the process has just ended."""
  try:
    status = dict(
      line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))
  except (OSError, KeyError):
    return None
