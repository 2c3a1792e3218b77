"""Examine a run before it starts: devices, memory, hosts, workdir, data, weights, disk, time and size.

    python -m dtm_jax.doctor --config=configs/vitb16.py --workdir=gs://BUCKET/vitb16

Each check yields findings. A check that fails, even with an unexpected error, does not stop the others. What
a check finds out, such as the seconds of a step, is kept in the `Examination` for the later ones.
"""

import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from etils import epath
from jax.sharding import Mesh

from dtm_jax import data, processes
from dtm_jax.errors import UserError
from dtm_jax.tasks import Task
from dtm_jax.training.course import Course

OK, WARNING, FAILURE = "ok", "warning", "failure"

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Finding:
  """One line of the report.

  Attributes:
    status: OK, WARNING or FAILURE.
    title: what was checked, in a word.
    text: what was found.
    fix: what to do about it; empty if nothing has to be done.
  """

  status: str
  title: str
  text: str
  fix: str = ""


class MissingPartError(Exception):
  """A check cannot run, because an earlier check failed to make what it needs."""


@dataclasses.dataclass
class Examination:
  """The run that is examined, and what the checks have found out so far. None means: not known.

  Attributes:
    config, workdir: of the run. The config is replaced by one with the options that data set and device fill.
    auto: the options that were left to the device, with the chosen values.
    mesh, dataset, course, task: as the run makes them.
    state_bytes: the size of the state, which a checkpoint holds.
    step_seconds: measured time of one step.
    host_rate: images per second that this host reads.
    unfinished: whether a thread still compiles, so the process must not wait for it.
    same_hosts: whether all processes have the same code and config, so that collectives are safe.
  """

  config: Any
  workdir: epath.Path
  auto: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  mesh: Mesh | None = None
  dataset: data.Dataset | None = None
  course: Course | None = None
  task: Task | None = None
  state_bytes: int | None = None
  step_seconds: float | None = None
  host_rate: float | None = None
  unfinished: bool = False
  same_hosts: bool = True

  def require(self, *names: str) -> None:
    """Raise a MissingPartError unless all processes have these parts and the same config.

    A check that exchanges messages calls this first, so that no process waits for one that has no part in it.
    """
    if not self.same_hosts:
      raise MissingPartError("agreement of the processes")
    missing = [name for name in names if getattr(self, name) is None]
    everywhere = sorted({name for each in processes.gather(missing) for name in each})
    if everywhere:
      words = {"dataset": "data set", "course": "data set", "state_bytes": "size of the state"}
      raise MissingPartError(", ".join(dict.fromkeys(words.get(name, name) for name in everywhere)))

  def together(self, function: Callable[[], Result]) -> Result:
    """Return the result of a function that all processes call. If it fails on one, it raises on all."""
    try:
      result, error = function(), None
    except Exception as caught:
      error = caught
    failed = [place for place, each in enumerate(processes.gather(error is not None)) if each]
    if error is not None:
      raise error
    if failed:
      raise MissingPartError(f"part of process {failed[0]}")
    return result


Check = Callable[[Examination], Iterator[Finding]]


def examine(examination: Examination, checks: dict[str, Check]) -> Iterator[Finding]:
  """Run the checks in their order, and yield the findings of all processes. Every process must call this.

  Process 0 speaks for all. Another process adds only what is not ok and what process 0 has not found.
  """
  for title, check in checks.items():
    findings = [dataclasses.astuple(finding) for finding in _findings(examination, title, check)]
    every = processes.gather({"host": platform.node(), "findings": findings})
    first = [Finding(*each) for each in every[0]["findings"]]
    yield from first
    known = {(finding.status, finding.text) for finding in first}
    for place, other in enumerate(every[1:], 1):
      for finding in (Finding(*each) for each in other["findings"]):
        if finding.status != OK and (finding.status, finding.text) not in known:
          known.add((finding.status, finding.text))
          text = f"process {place} on {other['host']}: {finding.text}"
          yield dataclasses.replace(finding, text=text)


def _findings(examination: Examination, title: str, check: Check) -> Iterator[Finding]:
  """Yield the findings of one check. Its errors become findings."""
  try:
    yield from check(examination)
  except MissingPartError as error:
    yield Finding(WARNING, title, f"not checked: it needs the {error}")
  except UserError as error:
    text = "\n".join([str(error), *getattr(error, "__notes__", [])])
    yield Finding(FAILURE, title, text)
  except Exception as error:
    yield Finding(
      FAILURE, title, f"the check ended with {type(error).__name__}: {error}",
      "The run may end in the same way. If not, this check has a bug.",
    )  # fmt: skip


def gigabytes(size: int | float) -> str:
  """Return a size for people: "3.2 GB", "12 MB"."""
  return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
