"""Test that one run at a time uses a workdir."""

import errno
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from etils import epath

from dtm_jax.errors import UserError
from dtm_jax.records import lock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(lock, "BEAT", 0.1)
  monkeypatch.setattr(lock, "SETTLE", 0.05)


@pytest.fixture
def workdir(tmp_path):
  return epath.Path(tmp_path) / "run"


def content(workdir):
  return json.loads((workdir / "lock.json").read_text())


def write(workdir, **changes):
  """Write the lock of another run: this process's own lock with changes."""
  with lock.hold(workdir):
    held = content(workdir)
  workdir.mkdir(exist_ok=True)
  (workdir / "lock.json").write_text(json.dumps(held | {"token": "another"} | changes))


def test_a_second_run_is_refused_and_the_first_one_keeps_its_lock(workdir):
  with lock.hold(workdir) as first:
    before = content(workdir)["token"]
    with (
      pytest.raises(UserError, match=rf"process {os.getpid()} on host .*, since 20.*--workdir"),
      lock.hold(workdir),
    ):
      pass
    assert content(workdir)["token"] == before
    first.require()
  assert not workdir.exists()  # nothing was written, so nothing is left


def test_the_lock_is_released_after_an_error_and_written_files_stay(workdir):
  def stopped():
    with lock.hold(workdir):
      (workdir / "config.json").write_text("{}")
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    stopped()
  assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_the_heart_beats(workdir):
  with lock.hold(workdir):
    first = content(workdir)["beat"]
    time.sleep(0.5)
    assert content(workdir)["beat"] > first


@pytest.mark.parametrize("gone", [{"pid": 2**22 + 1}, {"started": 1}], ids=["no process", "another process"])
def test_a_lock_of_a_process_that_has_ended_is_taken_over(workdir, caplog, gone):
  """A pid alone proves nothing, because the system gives it to another process later."""
  write(workdir, **gone)
  with caplog.at_level("WARNING", logger="absl"), lock.hold(workdir):
    assert content(workdir)["token"] != "another"
  assert "Taking over" in caplog.text
  assert not (workdir / "lock.json").exists()


def test_a_lock_of_another_host_is_watched(workdir, caplog):
  write(workdir, host="elsewhere")
  with caplog.at_level("WARNING", logger="absl"), lock.hold(workdir):
    assert content(workdir)["host"] != "elsewhere"
  assert "Watching" in caplog.text


def test_a_run_on_another_host_whose_heart_beats_is_left_alone(workdir, monkeypatch):
  write(workdir, host="elsewhere")
  read, reads = lock.Lock._read, []

  def beating(self):
    reads.append(read(self))
    return reads[-1] | {"beat": len(reads)}

  monkeypatch.setattr(lock.Lock, "_read", beating)
  with pytest.raises(UserError, match="on host 'elsewhere'"), lock.hold(workdir):
    pass
  assert content(workdir)["token"] == "another"


def test_a_lock_that_is_not_json_is_watched_and_taken_over(workdir):
  workdir.mkdir(parents=True)
  (workdir / "lock.json").write_text('{"host": "h')
  with lock.hold(workdir):
    assert content(workdir)["pid"] == os.getpid()


def test_a_run_that_lost_its_lock_stops_and_leaves_the_other_lock(workdir):
  with lock.hold(workdir) as held:
    stolen = content(workdir) | {"token": "another", "host": "elsewhere"}
    (workdir / "lock.json").write_text(json.dumps(stolen))
    deadline = time.time() + 5
    while held._lost_to is None and time.time() < deadline:
      time.sleep(0.02)
    with pytest.raises(UserError, match=r"lost its workdir .* to another one .*'elsewhere'"):
      held.require()
  assert content(workdir)["token"] == "another"


@pytest.mark.parametrize("stale", [False, True])
def test_of_several_that_start_at_once_one_holds_the_lock(workdir, monkeypatch, stale):
  workdir.mkdir(parents=True)
  if stale:
    write(workdir, pid=2**22 + 1)
  monkeypatch.setattr(lock, "SETTLE", 0.3)
  together = threading.Barrier(4, timeout=300)

  def race(_):
    together.wait()
    try:
      with lock.hold(workdir):
        time.sleep(1.0)
        return "held"
    except UserError:
      return "refused"

  with ThreadPoolExecutor(4) as pool:
    assert sorted(pool.map(race, range(4))) == ["held", "refused", "refused", "refused"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_workdir_that_cannot_be_written_is_one_clear_message(workdir, monkeypatch, number):
  error = OSError(number, os.strerror(number))

  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(type(workdir), "write_text", fail)
  with pytest.raises(UserError, match=rf"--workdir={workdir}: .*{error.strerror}"), lock.hold(workdir):
    pass
