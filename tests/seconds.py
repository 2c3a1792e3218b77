"""Measure the CPU seconds of every test, run the slow files first, and select quick tests for `--fast`.

seconds.json has what was measured. `scripts/test.sh --save-seconds` renews it for the tests that it runs.
"""

import contextlib
import json
import os
import resource
from collections.abc import Generator
from multiprocessing import forkserver
from pathlib import Path

import pytest

FILE = Path(__file__).with_suffix(".json")
SLOW_FILE = 10.0
"""A file that takes more seconds is slow."""
FAST_PART = 0.5
"""The seconds of the tests of one file that `--fast` runs."""
LEAST = 0.2
"""Tests that take fewer seconds are not written to seconds.json."""
UNLISTED = 0.1
"""The assumed seconds of a test that seconds.json lacks, if it has other tests of the file."""
UNKNOWN, UNKNOWN_SLOW = 0.5, 10.0
"""The assumed seconds of other unknown tests, without and with the marker `slow`."""

_known: dict[str, dict[str, float]] = json.loads(FILE.read_text()) if FILE.exists() else {}
_measured: dict[str, dict[str, float]] = {}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  files: dict[str, list[pytest.Item]] = {}
  for item in items:
    files.setdefault(_place(item.nodeid)[0], []).append(item)
  if config.getoption("--fast"):
    files = {name: _quickest(tests) for name, tests in files.items()}
    chosen = {item for tests in files.values() for item in tests}
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
  workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
  items[:] = _slow_files_first(list(files.values()), workers)


def _place(nodeid: str) -> tuple[str, str]:
  """Return the name of the file and of the test."""
  path, _, test = nodeid.partition("::")
  return Path(path).name, test


def _seconds(item: pytest.Item) -> float:
  file, test = _place(item.nodeid)
  unknown = UNLISTED if file in _known else UNKNOWN
  return _known.get(file, {}).get(test, UNKNOWN_SLOW if item.get_closest_marker("slow") else unknown)


def _quickest(tests: list[pytest.Item]) -> list[pytest.Item]:
  """Return the quickest tests of a file, in its order, that take FAST_PART together."""
  chosen, total = set(), 0.0
  for item in sorted(tests, key=_seconds):
    total += _seconds(item)
    if total > FAST_PART:
      break
    chosen.add(item)
  return [item for item in tests if item in chosen]


def _slow_files_first(files: list[list[pytest.Item]], workers: int) -> list[pytest.Item]:
  """Return the tests in an order that leaves no worker with a slow file at the end.

  With `--dist worksteal` each worker gets an equal part of the list, and in the end takes tests from the tail
  of another one's part. So the slow files are dealt out to the beginnings of these parts. A file stays
  in one piece, because its fixtures are costly.
  """
  cost = lambda file: sum(map(_seconds, file))
  slow = sorted((file for file in files if cost(file) > SLOW_FILE), key=cost, reverse=True)
  quick = [item for file in files if cost(file) <= SLOW_FILE for item in file]
  count = sum(map(len, files))
  ordered: list[pytest.Item] = []
  for worker in range(workers):
    ordered += [item for file in slow[worker::workers] for item in file]
    missing = max(0, count * (worker + 1) // workers - len(ordered))
    ordered, quick = ordered + quick[:missing], quick[missing:]
  return ordered + quick


def _cpu_seconds() -> float:
  """Return the CPU seconds of this process, of its children, and of runs that are forked for a test."""
  usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  total = sum(usage.ru_utime + usage.ru_stime for usage in usages)
  server = forkserver._forkserver._forkserver_pid  # the parent of forked runs
  with contextlib.suppress(OSError):  # there is none, or the system has no /proc
    fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
  return total


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
  item.user_properties.append(("cpu_seconds", -_cpu_seconds()))
  return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
  item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
  report = yield
  if call.when == "teardown":
    began = dict(item.user_properties)["cpu_seconds"]
    report.user_properties = [("cpu_seconds", round(_cpu_seconds() + began, 2))]
  return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
  if report.when == "teardown":
    file, test = _place(report.nodeid)
    _measured.setdefault(file, {})[test] = dict(report.user_properties)["cpu_seconds"]


def pytest_sessionfinish(session: pytest.Session) -> None:
  """Write the measured seconds, if asked, in the process that has the reports of all workers."""
  config = session.config
  if config.getoption("--save-seconds") and "PYTEST_XDIST_WORKER" not in os.environ:
    known = {} if _runs_the_whole_suite(config) else _known  # forgets tests that are gone
    known = known | {file: known.get(file, {}) | tests for file, tests in _measured.items()}
    known = {file: {test: s for test, s in each.items() if s >= LEAST} for file, each in known.items()}
    FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def _runs_the_whole_suite(config: pytest.Config) -> bool:
  without_paths = config.args_source is pytest.Config.ArgsSource.TESTPATHS
  chosen = config.option.keyword or config.getoption("--fast") or config.option.markexpr != "not long"
  return without_paths and not chosen
