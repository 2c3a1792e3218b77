"""Let reads of a sound checkpoint fail, for a moment or always, as on a broken file system."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.campaign import faulty_io, runs
from tests.campaign.trial import Trial

TITLE = "transient errors while a checkpoint is read"
ERRORS = ("EIO", "ETIMEDOUT", "ESTALE", "ECONNRESET", "EMFILE", "ENOMEM", "EINTR", "EACCES", "EAGAIN")
WHERE = ("checkpoints/9/meta", "checkpoints/9/state")


def trials(world: runs.World, reference: Path, seed: int, smoke: bool) -> Iterator[Trial]:
  """Yield nine errors in the metadata or the arrays, twice or always.

  An EINTR that never ends has no trial: Python (PEP 475) and the C++ libraries repeat an interrupted read
  themselves without end.
  """
  for error in ERRORS[:1] if smoke else ERRORS:
    for where in WHERE[1:] if smoke else WHERE:
      for count in (-1,) if smoke else (2,) if error == "EINTR" else (2, -1):
        often = "always" if count < 0 else f"{count} times"
        yield Trial(
          f"{error} in {where.split('/')[-1]}, {often}",
          lambda folder, e=error, w=where, c=count: _trial(world, reference, e, w, c, folder),
        )


def _trial(world: runs.World, reference: Path, error: str, where: str, count: int, folder: Path) -> str:
  """Check that the newest step, 9, is restored or the run stops. It is never moved aside or skipped."""
  workdir = folder / "run"
  shutil.copytree(reference, workdir)
  shutil.rmtree(workdir / "checkpoints" / "12")
  arguments = world.arguments(workdir)
  env = faulty_io.environment(f"{workdir}/{where}", "read", error, count=count)
  process = runs.Process(arguments, folder / "faulty.log", env=env, warm=False)
  code = process.wait()
  assert not (workdir / "checkpoints" / "corrupt").exists(), "a sound checkpoint was moved aside"
  assert 9 in runs.steps(workdir), f"step 9 is gone; {runs.steps(workdir)} are left"
  if code:
    assert count < 0, f"an error that passes ended the run:\n{process.text()[-1500:]}"
    assert "Traceback" not in process.text(), process.text()[-1500:]
    assert "9" in process.text()
    assert runs.steps(workdir)[-1] == 9, f"the run went on to {runs.steps(workdir)}"
  runs.finish(arguments, folder / "last.log")
  runs.assert_equal_runs(workdir, reference)
  return "stopped with a message" if code else "retried and went on"
