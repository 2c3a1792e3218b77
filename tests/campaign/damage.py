"""Damage every file of a checkpoint: flip a bit, cut it in half, empty it, or remove it."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.campaign import runs
from tests.campaign.trial import Trial

TITLE = "damage: every file of the newest checkpoint"
KINDS = ("bit flip", "truncation", "emptied", "removal")


def trials(world: runs.World, reference: Path, seed: int, smoke: bool) -> Iterator[Trial]:
  """Yield trials that damage one file of the last checkpoint of a finished run and start the run again."""
  newest = reference / "checkpoints" / str(runs.LAST_STEP)
  files = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
  plan = [(name, kind) for name in files for kind in KINDS]
  if smoke:
    plan = random.Random(seed).sample(plan, 1)
  for place, (name, kind) in enumerate(plan):
    rng = random.Random(f"{seed}/{place}")
    yield Trial(
      f"{kind} of {_short(name)}",
      lambda folder, name=name, kind=kind, rng=rng: _trial(world, reference, name, kind, rng, folder),
    )


def _short(name: str) -> str:
  """Return the name with a short hash. The names of data files are hashes."""
  path = Path(name)
  return str(path.parent / path.name[:6]) if len(path.name) == 32 else name


def _trial(world: runs.World, reference: Path, name: str, kind: str, rng: random.Random, folder: Path) -> str:
  workdir = folder / "run"
  shutil.copytree(reference, workdir)
  _damage(workdir / "checkpoints" / str(runs.LAST_STEP) / name, kind, rng)
  runs.finish(world.arguments(workdir), folder / "log")
  runs.assert_equal_runs(workdir, reference)
  aside = workdir / "checkpoints" / "corrupt"
  return "fell back to the step before" if aside.exists() else "no value changed"


def _damage(path: Path, kind: str, rng: random.Random) -> None:
  contents = bytearray(path.read_bytes())
  if kind == "removal":
    path.unlink()
  elif kind == "emptied":
    path.write_bytes(b"")
  elif kind == "truncation":
    path.write_bytes(contents[: len(contents) // 2])
  else:
    bit = rng.randrange(8 * len(contents)) if contents else None
    if bit is not None:
      contents[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(contents)
