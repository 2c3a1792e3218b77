"""Send SIGKILL, SIGTERM and SIGINT during start, compilation, steps, save, evaluation and end."""

import dataclasses
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign import runs
from tests.campaign.trial import Trial

TITLE = "interruptions: kill -9, SIGTERM, SIGINT at 50 moments"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
FULL = 50


@dataclasses.dataclass(frozen=True)
class Moment:
  """A moment for a signal.

  Attributes:
    name: in words.
    has_come: returns whether the moment has come.
    spread: the largest delay of the signal, in seconds.
    cold: whether the run starts in a new Python.
  """

  name: str
  has_come: Callable[[runs.Process, Path], bool]
  spread: float = 0.05
  cold: bool = False


def _at_once(process: runs.Process, workdir: Path) -> bool:
  return True


def _says(words: str) -> Callable[[runs.Process, Path], bool]:
  return lambda process, workdir: words in process.text()


def _exists(pattern: str) -> Callable[[runs.Process, Path], bool]:
  return lambda process, workdir: any(workdir.glob(pattern))


def _wrote_step(step: int) -> Callable[[runs.Process, Path], bool]:
  def has_come(process: runs.Process, workdir: Path) -> bool:
    path = workdir / "metrics.jsonl"
    return path.exists() and f'{{"step": {step},' in path.read_text()

  return has_come


MOMENTS = (
  Moment("start of Python", _at_once, spread=5.0, cold=True),
  Moment("start of a warm process", _at_once, spread=2.0),
  Moment("workdir made", _exists("*"), spread=0.5),
  Moment("config.json written", _exists("config.json"), spread=0.2),
  Moment("compilation", _says("Compiling the train step"), spread=4.0),
  Moment("step 1", _wrote_step(1)),
  Moment("step 2", _wrote_step(2)),
  Moment("save of step 3 begins", _exists("checkpoints/3*tmp*"), spread=0.02),
  Moment("step 3 saved", _exists("checkpoints/3"), spread=0.02),
  Moment("evaluation of step 4", _wrote_step(4), spread=0.3),
  Moment("step 5", _wrote_step(5)),
  Moment("save of step 6 begins", _exists("checkpoints/6*tmp*"), spread=0.02),
  Moment("step 6 saved", _exists("checkpoints/6"), spread=0.02),
  Moment("evaluation of step 8", _wrote_step(8), spread=0.3),
  Moment("save of step 9 begins", _exists("checkpoints/9*tmp*"), spread=0.05),
  Moment("step 11", _wrote_step(11)),
  Moment("save of the last step begins", _exists("checkpoints/12*tmp*"), spread=0.05),
  Moment("last step saved", _exists("checkpoints/12"), spread=0.5),
)


def trials(world: runs.World, reference: Path, seed: int, smoke: bool) -> Iterator[Trial]:
  """Yield trials that interrupt a run once or twice, resume it, and compare it with the reference."""
  rng = random.Random(seed)
  if smoke:
    plan = [(MOMENTS[12], signal.SIGKILL)]  # test_schedulers.py sends SIGTERM
  else:
    every = [(moment, number) for moment in MOMENTS for number in SIGNALS]
    plan = rng.sample(every, FULL)
  for place, (moment, number) in enumerate(plan):
    trial_rng = random.Random(f"{seed}/{place}")
    name = f"{number.name} at {moment.name}"
    yield Trial(
      name, lambda folder, m=moment, n=number, r=trial_rng: _trial(world, reference, m, n, r, folder)
    )


def _trial(
  world: runs.World, reference: Path, moment: Moment, number: signal.Signals, rng: random.Random, folder: Path
) -> str:
  workdir = folder / "run"
  arguments = world.arguments(workdir)
  codes = [_interrupt(arguments, workdir, moment, number, rng, folder / "first.log")]
  if rng.random() < 0.3:
    other = rng.choice([each for each in MOMENTS if not each.cold])
    codes.append(_interrupt(arguments, workdir, other, rng.choice(SIGNALS), rng, folder / "second.log"))
  runs.finish(arguments, folder / "last.log")
  runs.assert_equal_runs(workdir, reference)
  return f"exit codes {', '.join(map(str, codes))}"


def _interrupt(
  arguments: list[str], workdir: Path, moment: Moment, number: signal.Signals, rng: random.Random, log: Path
) -> int:
  process = runs.Process(arguments, log, warm=not moment.cold)
  if process.wait_for(lambda process: moment.has_come(process, workdir)):
    runs.pause(rng, moment.spread)
  process.send(number)
  code = process.wait(timeout=120)
  text = process.text()
  if number == signal.SIGTERM and runs.lines(workdir):
    assert code in (0, -signal.SIGTERM), f"SIGTERM ended with {code}:\n{text[-1500:]}"
  for step in runs.steps(workdir):  # every saved step is whole
    assert runs.checksums(workdir, step)
  return code
