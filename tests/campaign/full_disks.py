"""Let a run write to a disk that is full, over quota, read-only or broken."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.campaign import faulty_io, runs
from tests.campaign.trial import Skipped, Trial

TITLE = "disk full, quota, read-only"
ERRORS = ("ENOSPC", "EDQUOT", "EROFS", "EIO")
WHERE = {
  "the first save": ("/checkpoints/", None),
  "a later save": ("/checkpoints/", "checkpoints/6"),
  "metrics.jsonl": ("/metrics.jsonl", None),
  "config.json": ("/config.json", None),
}


def trials(world: runs.World, reference: Path, seed: int, smoke: bool) -> Iterator[Trial]:
  """Yield four errors at four places, and real file systems of a few kilobytes."""
  for error in ERRORS[:1] if smoke else ERRORS:
    for place in list(WHERE)[1:2] if smoke else WHERE:
      yield Trial(
        f"{error} at {place}",
        lambda folder, e=error, p=place: _failing_calls(world, reference, e, p, folder),
      )
  if not smoke:
    for kibibytes in (64, 600, 1400):
      yield Trial(
        f"a file system of {kibibytes} KiB",
        lambda folder, size=kibibytes: _small_file_system(world, reference, size, folder),
      )


def _failing_calls(world: runs.World, reference: Path, error: str, place: str, folder: Path) -> str:
  workdir = folder / "run"
  arguments = world.arguments(workdir)
  part, after = WHERE[place]
  env = faulty_io.environment(f"{workdir}{part}", "write", error, after=workdir / after if after else None)
  process = runs.Process(arguments, folder / "full.log", env=env, warm=False)
  _check_stop(process, workdir)
  runs.finish(arguments, folder / "last.log")
  runs.assert_equal_runs(workdir, reference)
  return f"stopped with {process.returncode}"


def _small_file_system(world: runs.World, reference: Path, kibibytes: int, folder: Path) -> str:
  with _mounted(folder / "disk", kibibytes) as (disk, enlarge):
    workdir = disk / "run"
    arguments = world.arguments(workdir)
    process = runs.Process(arguments, folder / "full.log")
    _check_stop(process, workdir)
    saved = runs.steps(workdir)
    enlarge()
    runs.finish(arguments, folder / "last.log")
    runs.assert_equal_runs(workdir, reference)
  return f"saved {saved} before it was full"


def _check_stop(process: runs.Process, workdir: Path) -> None:
  """Check that the run ended with one message, and that every saved step is whole."""
  code, text = process.wait(), process.text()
  assert code not in (0, None), "the run did not notice"
  assert "Traceback" not in text, text[-2500:]
  for step in runs.steps(workdir):
    assert runs.checksums(workdir, step)


@contextlib.contextmanager
def _mounted(folder: Path, kibibytes: int):
  """Yield a file system in memory of the given size, and a function that enlarges it."""
  if os.getuid() != 0 or shutil.which("mount") is None:
    raise Skipped("mounting needs root")
  folder.mkdir()
  mount = lambda *options: subprocess.run(["mount", *options], capture_output=True, text=True)
  done = mount("-t", "tmpfs", "-o", f"size={kibibytes}k", "none", str(folder))
  if done.returncode:
    raise Skipped(f"cannot mount: {done.stderr.strip()}")
  try:
    yield folder, lambda: mount("-o", "remount,size=256m", str(folder))
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)
