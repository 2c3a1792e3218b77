"""Write one HTML page about a run, or about two runs side by side.

    from dtm_jax import report

    report.write("runs/quickstart")                      # runs/quickstart/report.html
    page = report.make_page(["runs/a", "runs/b"])        # the text of a page

A run writes its page at its end, and `scripts/report.py` writes it by hand. The page needs neither a network
nor another file. It reads what the run has left in its workdir, so it also shows runs that were stopped and
runs of older versions.
"""

import dataclasses
import os
from collections.abc import Sequence

from absl import logging
from etils import epath

from dtm_jax.report import page
from dtm_jax.report.run_files import RunFiles
from dtm_jax.storage import paths, writing

__all__ = ["FILE", "RunFiles", "make_page", "read_runs", "write", "write_or_warn"]

FILE = "report.html"


def write(workdir: str | os.PathLike) -> epath.Path:
  """Write the page of the run in `workdir` there, and return its path.

  Raises:
    NotThereError: `workdir` is not the workdir of a run.
  """
  path = paths.resolve(workdir) / FILE
  writing.write_whole(path, make_page([workdir]))
  return path


def write_or_warn(workdir: str | os.PathLike) -> None:
  """Write the page, or log one warning: a run that has ended well must not fail because of its report."""
  try:
    logging.info("The report of the run: %s", write(workdir))
  except Exception as error:
    logging.warning(
      "The report of the run could not be written: %s: %s. Try again: python scripts/report.py %s",
      type(error).__name__, error, os.fspath(workdir),
    )  # fmt: skip


def make_page(workdirs: Sequence[str | os.PathLike]) -> str:
  """Return the page of the runs in these workdirs. The first two have colours of their own.

  Raises:
    NotThereError: one of them is not the workdir of a run.
  """
  return page.make(read_runs(workdirs))


def read_runs(workdirs: Sequence[str | os.PathLike]) -> list[RunFiles]:
  """Return the records of runs, with names that differ.

  Raises:
    NotThereError: one of the folders is not the workdir of a run.
  """
  runs = [RunFiles.read(workdir) for workdir in workdirs]
  names = [run.name for run in runs]
  if len(set(names)) == len(names):
    return runs
  long = [os.path.normpath(run.workdir) if "://" not in run.workdir else run.workdir for run in runs]
  if len(set(long)) < len(long):
    long = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
  return [dataclasses.replace(run, name=name) for run, name in zip(runs, long, strict=True)]
