"""The doctor on a good set-up, and on one for each kind of failure that it finds."""

import contextlib
import errno
import io
import os
import runpy
import sys
import threading
import types
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import safetensors.numpy
import small_world
from PIL import Image

from dtm_jax.doctor import FAILURE, OK, WARNING, Examination, examine, steps, workdirs
from dtm_jax.doctor.checks import make_checks
from dtm_jax.storage import paths
from dtm_jax.training.course import Course
from tests.campaign import runs

ROOT = Path(__file__).parents[1]


def diagnose(config, workdir: Path, *titles: str, **known):
  """Return the findings of all checks, or of these, and the examination. `known` is known already."""
  examination = Examination(config, paths.resolve(workdir), **known)
  checks = make_checks(compile_seconds=100.0)
  chosen = {title: checks[title] for title in titles or checks}
  return list(examine(examination, chosen)), examination


def statuses(findings) -> dict[str, set[str]]:
  found: dict[str, set[str]] = {}
  for finding in findings:
    found.setdefault(finding.title, set()).add(finding.status)
  return found


def text_of(findings, title: str, status: str) -> str:
  return "\n".join(each.text for each in findings if (each.title, each.status) == (title, status))


@pytest.mark.slow
def test_a_good_set_up_has_no_failure_and_leaves_no_file(world, tmp_path):
  findings, examination = diagnose(small_world.probe_config(world), tmp_path / "new" / "run")
  found = statuses(findings)
  assert set(found) == {
    "hosts", "devices", "workdir", "data", "teacher", "records", "step", "input", "disk", "estimate",
  }  # fmt: skip
  assert all(FAILURE not in each for each in found.values()), findings
  assert "72 images; 64 of them were decoded" in text_of(findings, "data", OK)
  assert "64 tokens of 16 numbers on 8 photos" in text_of(findings, "teacher", OK)
  assert "mesh data=8, fsdp=1; 2 images a device" in text_of(findings, "devices", OK)
  assert "6 steps of 16 images, 1.3 epochs" in text_of(findings, "estimate", OK)
  assert examination.step_seconds > 0
  assert examination.host_rate > 0
  heads = 9 * (16 * 10 + 10)
  assert examination.state_bytes > 4 * 2 * heads  # with their momentum
  assert not list(tmp_path.iterdir())


# Data and teacher ----------------------------------------------------------------------------------------


def test_missing_data_are_named_and_later_checks_say_that_they_need_them(world, tmp_path):
  config = small_world.debug_config(world)
  config.data.dataset = dict(name="folder", data_dir=str(tmp_path / "nowhere"))
  findings, _ = diagnose(config, tmp_path, "data", "teacher", "step", "estimate")
  assert "nowhere" in text_of(findings, "data", FAILURE)
  assert "--config.data.dataset.data_dir" in text_of(findings, "data", FAILURE)
  assert text_of(findings, "teacher", WARNING) == "not checked: it needs the data set"
  assert statuses(findings)["step"] == {WARNING}


@pytest.mark.parametrize(("corrupt", "status"), [(0, OK), (2, WARNING), (8, FAILURE)])
def test_corrupt_images_are_counted_and_named(world, tmp_path, corrupt, status):
  folder = tmp_path / "photos" / "train" / "cat"
  folder.mkdir(parents=True)
  for number in range(8):
    stream = io.BytesIO()
    Image.fromarray(np.full((40, 40, 3), 9 * number, np.uint8)).save(stream, "JPEG")
    content = b"no image" if number < corrupt else stream.getvalue()
    (folder / f"{number}.jpg").write_bytes(content)
  config = small_world.debug_config(world, total_steps=0)
  config.data.dataset = dict(name="folder", data_dir=str(tmp_path / "photos"))
  findings, _ = diagnose(config, tmp_path, "data")
  assert statuses(findings)["data"] == {status}
  if corrupt:
    assert f"{corrupt} of 8 cannot be read, such as" in text_of(findings, "data", status)


def poisoned(world: Path, folder: Path, value: float) -> str:
  """Write the teacher of the world with some, or with all, of its weights replaced. Return its folder."""
  folder.mkdir()
  for path in (world / "clip").iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  file = next(folder.glob("*.safetensors"))
  weights = {name: np.array(x) for name, x in safetensors.numpy.load_file(file).items()}
  names = [name for name in weights if np.isfinite(value) or "fc1.weight" in name]
  for name in names:
    weights[name].flat[:] = value
  safetensors.numpy.save_file(weights, file)
  return str(folder)


@pytest.mark.parametrize(("value", "message"), [(np.nan, "has bad values"), (0.0, "all tokens are the same")])
def test_weights_that_are_no_teacher_are_found(world, tmp_path, value, message):
  config = small_world.debug_config(world, teacher__path=poisoned(world, tmp_path / "clip", value))
  findings, examination = diagnose(config, tmp_path / "run", "data", "teacher")
  assert message in text_of(findings, "teacher", FAILURE)
  assert OK not in statuses(findings)["teacher"]
  assert (examination.task is None) == np.isnan(value)


def test_a_missing_teacher_is_named(world, tmp_path):
  config = small_world.debug_config(world, teacher__path=str(tmp_path / "no_clip"))
  findings, _ = diagnose(config, tmp_path / "run", "data", "teacher")
  assert "no_clip" in text_of(findings, "teacher", FAILURE)


# Workdir and disk ----------------------------------------------------------------------------------------


def test_a_workdir_that_cannot_be_written(world, tmp_path, monkeypatch):
  config = small_world.debug_config(world)
  (tmp_path / "file").write_text("")
  findings, _ = diagnose(config, tmp_path / "file" / "run", "workdir")
  assert "is a file; name a folder" in text_of(findings, "workdir", FAILURE)

  def read_only(*args, **kwargs):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setattr(workdirs, "_make", read_only)
  findings, _ = diagnose(config, tmp_path / "run", "workdir")
  assert "Read-only file system" in text_of(findings, "workdir", FAILURE)
  assert not (tmp_path / "run").exists()


def test_a_workdir_that_the_others_do_not_see(world, tmp_path, monkeypatch):
  monkeypatch.setattr(workdirs, "_exists", lambda path: False)
  findings, _ = diagnose(small_world.debug_config(world), tmp_path / "run", "workdir")
  assert "is not shared" in text_of(findings, "workdir", FAILURE)
  assert not (tmp_path / "run").exists()


def test_a_workdir_that_another_run_holds(world, tmp_path):
  (tmp_path / "lock.json").write_text('{"pid": 7, "host": "other", "since": "today"}')
  findings, _ = diagnose(small_world.debug_config(world), tmp_path, "workdir")
  assert "process 7 on other" in text_of(findings, "workdir", WARNING)
  assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]


@pytest.mark.parametrize(("free", "status"), [(3.9e9, FAILURE), (5e9, WARNING), (9e9, OK)])
def test_the_disk_must_hold_the_checkpoints(world, tmp_path, monkeypatch, free, status):
  """Two are kept while a third is written, and the flight recorder keeps one state."""
  monkeypatch.setattr(workdirs.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
  known = {"state_bytes": 10**9, "course": Course.fresh(16, 80)}
  findings, _ = diagnose(small_world.debug_config(world), tmp_path / "run", "disk", **known)
  assert statuses(findings) == {"disk": {status}}
  assert "4 copies of the state need 4.0 GB" in findings[0].text


# Devices, memory, speed ----------------------------------------------------------------------------------


def test_a_batch_or_mesh_that_does_not_fit_the_devices(world, tmp_path):
  findings, _ = diagnose(small_world.debug_config(world, batch_size=12), tmp_path, "devices")
  assert "the 8 devices must share it evenly" in text_of(findings, "devices", FAILURE)


def test_too_little_memory_is_a_failure_with_the_ways_out():
  finding = steps._compare(9e9, "it plans 9.0 GB a device")
  assert finding.status in (OK, WARNING, FAILURE)
  for needed, status in ((0.5, OK), (0.95, WARNING), (1.2, FAILURE)):
    finding = steps._compare(needed * steps._memory(), "it plans much")
    assert finding.status == status
    assert ("--config.batch_size" in finding.fix) == (status != OK)


def test_a_compilation_over_the_limit_is_given_up():
  ended = threading.Event()
  lowered = mock.Mock(spec=jax.stages.Lowered)
  lowered.compile = lambda: ended.wait(60)
  assert steps._compile(lowered, 0.05)[0] is None
  ended.set()
  lowered.compile = lambda: 1 / 0
  with pytest.raises(ZeroDivisionError):
    steps._compile(lowered, 60)


@pytest.mark.parametrize(("rate", "status"), [(100.0, WARNING), (1000.0, OK)])
def test_a_host_that_reads_too_slowly(world, tmp_path, rate, status):
  """16 images in 0.1 s are 160 images/s."""
  examination = Examination(
    small_world.debug_config(world), paths.resolve(tmp_path), step_seconds=0.1, host_rate=rate
  )
  finding = list(steps._judge_input(examination))[-1]
  assert (finding.title, finding.status) == ("input", status)
  assert f"reads {rate:,.0f} images/s, and the step needs 160" in finding.text


def test_an_unexpected_error_of_a_check_does_not_stop_the_others(world, tmp_path):
  def broken(examination):
    yield from ()
    raise ZeroDivisionError("division by zero")

  examination = Examination(small_world.debug_config(world), paths.resolve(tmp_path))
  findings = list(examine(examination, {"broken": broken, "hosts": make_checks(1.0)["hosts"]}))
  assert statuses(findings) == {"broken": {FAILURE}, "hosts": {OK}}
  assert "ZeroDivisionError: division by zero" in findings[0].text


def run_doctor(arguments: list[str]) -> None:
  """Do what `python -m dtm_jax.doctor` does. The first argument is the file that receives its output."""
  sys.argv = ["dtm_jax.doctor", *arguments[1:]]
  with open(arguments[0], "w") as file, contextlib.redirect_stdout(file):
    runpy.run_module("dtm_jax.doctor", run_name="__main__", alter_sys=True)


@pytest.mark.slow
def test_two_processes_with_different_configs_are_told_so(world, tmp_path):
  """The command ends with code 1 on both, and process 0 prints the report.

  Both are forked from a process that has the imports.
  """
  output = [tmp_path / f"{place}.txt" for place in range(2)]
  processes = [
    runs.Process(
      [str(output[place]), *small_world.arguments(world, tmp_path / "new" / "run"), f"--config.seed={place}"],
      tmp_path / f"{place}.log", env=env, run=run_doctor,
    )
    for place, env in enumerate(small_world.cluster(1))
  ]  # fmt: skip
  codes = [process.wait(timeout=280) for process in processes]
  assert codes == [1, 1], "\n".join(process.text() for process in processes)
  report = output[0].read_text()
  assert "failure  hosts        the processes differ in config: " in report
  assert "on processes 1" in report
  assert "ok       workdir" in report
  assert "not checked: it needs the agreement of the processes" in report
  assert output[1].read_text() == ""
  assert not (tmp_path / "new").exists()
