"""Check the place of a run: every process can write there, the records fit, and the disk has space."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator

import jax
from etils import epath

from dtm_jax import processes
from dtm_jax.doctor import FAILURE, OK, WARNING, Examination, Finding, gigabytes
from dtm_jax.options import validation
from dtm_jax.records import lock
from dtm_jax.records.run_config import Records
from dtm_jax.storage import paths, writing


def check_workdir(examination: Examination) -> Iterator[Finding]:
  """Write a file from every process and read it from all others. Everything that is made is removed again."""
  folder = examination.workdir
  made: list[epath.Path] = []
  problem = processes.gather(_caught(lambda: made.extend(_make(folder))) if processes.is_first() else None)[0]
  probe = folder / f".doctor-{uuid.uuid4().hex}"
  if problem is None:
    problem = _caught(lambda: probe.write_text(probe.name))
  written = processes.gather([problem, probe.name])
  unseen = [
    place for place, (failed, name) in enumerate(written) if not failed and not _exists(folder / name)
  ]
  processes.gather(None)  # all have looked
  with contextlib.suppress(Exception):
    probe.unlink()
  processes.gather(None)  # all files are gone
  for each in reversed(made):
    with contextlib.suppress(OSError):
      os.rmdir(each)
  if problem:
    fix = "Make it writable for this user on every host, or give another --workdir."
    yield Finding(FAILURE, "workdir", f"{folder} cannot be written: {problem}", fix)
  elif unseen:
    text = (
      f"{folder} is not shared: files of process {unseen[0]} are not seen on process {jax.process_index()}"
    )
    yield Finding(FAILURE, "workdir", text, "Use a bucket (gs://, s3://) or a network file system.")
  else:
    yield Finding(OK, "workdir", f"{folder} can be written by {_count(len(written))}")
  held = _caught(lambda: (folder / lock.FILE).read_text(), default="")
  with contextlib.suppress(ValueError):
    holder = json.loads(held or "")
    text = f"a run holds it: process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
    yield Finding(WARNING, "workdir", text, "Stop that run first, or give another --workdir.")


def check_records(examination: Examination) -> Iterator[Finding]:
  """Compare config, data and weights with the records of the run, if it has been started before."""
  examination.require("dataset", "task")
  assert examination.dataset is not None
  assert examination.task is not None
  folder = examination.workdir
  records = Records(folder, examination.config, examination.dataset, auto=examination.auto)
  records.check()
  records.check_weights("frozen", examination.task.frozen)
  steps = sorted(int(each.name) for each in _children(folder / "checkpoints") if each.name.isdigit())
  if steps:
    yield Finding(OK, "records", f"the run goes on from step {steps[-1]} of {folder}")
  else:
    yield Finding(OK, "records", "a new run")


def check_disk(examination: Examination) -> Iterator[Finding]:
  """Compare the size of the checkpoints with the free space."""
  examination.require("state_bytes", "course")
  assert examination.state_bytes is not None
  assert examination.course is not None
  section, course = examination.config.checkpoint, examination.course
  kept = section.keep + 1  # one more while the next is written
  if keep_every := course.steps("keep", section, default=0):
    kept += course.total_steps(examination.config) // keep_every
  copies = kept + int(bool(examination.config.log.get("flight_recorder")))
  needed = copies * examination.state_bytes
  what = f"{copies} copies of the state need {gigabytes(needed)}"
  if paths.is_remote(examination.workdir):
    yield Finding(OK, "disk", f"{what} in the bucket")
    return
  free = shutil.disk_usage(_existing(examination.workdir)).free
  text = f"{what}; {gigabytes(free)} are free"
  fix = "Free some space, give another --workdir, or keep fewer with --config.checkpoint.keep."
  if free < needed:
    yield Finding(FAILURE, "disk", text, fix)
  else:
    yield Finding(WARNING if free < 1.5 * needed else OK, "disk", text, fix if free < 1.5 * needed else "")


def _make(folder: epath.Path) -> list[epath.Path]:
  """Make a local folder and return the folders that were missing, the outermost first."""
  validation.check_workdir(os.fspath(folder))
  if paths.is_remote(folder):
    writing.make_writable_folder(folder, "--workdir")
    return []
  missing: list[epath.Path] = []
  place = folder
  while not place.exists():
    missing.insert(0, place)
    place = place.parent
  folder.mkdir(parents=True, exist_ok=True)
  return missing


def _caught(function, default: str | None = None) -> str | None:
  """Call a function and return its error in words, or None. With a default, return its text or that."""
  try:
    result = function()
  except Exception as error:  # each client of a bucket has its own errors
    return default if default is not None else f"{type(error).__name__}: {error}"
  return result if default is not None else None


def _exists(path: epath.Path) -> bool:
  try:
    return path.exists()
  except Exception:
    return False


def _children(folder: epath.Path) -> list[epath.Path]:
  return list(folder.iterdir()) if _exists(folder) else []


def _existing(folder: epath.Path) -> epath.Path:
  """Return the folder, or the nearest one above it that exists."""
  while not folder.exists():
    folder = folder.parent
  return folder


def _count(number: int) -> str:
  return f"all {number} processes" if number > 1 else "this process"
