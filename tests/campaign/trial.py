"""Define a trial, which is one way to break a run, and the table of outcomes."""

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path


class Skipped(Exception):
  """The machine cannot run this trial; the message says why."""


@dataclasses.dataclass(frozen=True)
class Trial:
  """A named check. `run` gets an empty folder. It raises if the run went wrong, and may return a remark."""

  name: str
  run: Callable[[Path], str | None]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The outcome of a trial. `verdict` is "right", "wrong" or "skipped"."""

  name: str
  verdict: str
  remark: str
  seconds: float


def attempt(trial: Trial, folder: Path) -> Outcome:
  """Run a trial in `folder` and return its outcome. An interrupt by the user is passed on."""
  start = time.perf_counter()
  folder.mkdir(parents=True)
  try:
    verdict, remark = "right", trial.run(folder) or ""
  except Skipped as reason:
    verdict, remark = "skipped", str(reason)
  except Exception as error:
    place = traceback.extract_tb(error.__traceback__)[-1]
    verdict, remark = "wrong", f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
  return Outcome(trial.name, verdict, remark, time.perf_counter() - start)


def summary_row(title: str, outcomes: Iterable[Outcome]) -> str:
  """Return one line of the Markdown table: part, tried, right, wrong, skipped, seconds."""
  outcomes = list(outcomes)
  count = {verdict: sum(each.verdict == verdict for each in outcomes) for verdict in VERDICTS}
  seconds = sum(each.seconds for each in outcomes)
  tried = len(outcomes) - count["skipped"]
  return f"| {title} | {tried} | {count['right']} | {count['wrong']} | {count['skipped']} | {seconds:.0f} |"


VERDICTS = ("right", "wrong", "skipped")
HEADER = "| part | tried | right | wrong | skipped | seconds |\n|---|---|---|---|---|---|"
