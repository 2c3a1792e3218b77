"""Test that transient errors are retried and touch nothing, and that only wrong bytes prove damage."""

import asyncio
import errno
import gc
import json
import os
import resource
import shutil
import subprocess
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world
from test_checkpoints import abstract, assert_same, corrupt_names, make_state, save_steps, sharded_state

from dtm_jax import loop
from dtm_jax.checkpoints import contents, evidence, retries, saving
from dtm_jax.checkpoints.contents import load_params
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.checkpoints.retries import CorruptCheckpointError
from dtm_jax.errors import UserError
from dtm_jax.storage import faults, paths
from dtm_jax.tasks import Task
from dtm_jax.training import mesh as meshes

XlaRuntimeError = jax.errors.JaxRuntimeError


def wrapped(error, around):
  around.__cause__ = error
  return around


TRANSIENT = {
  "EIO": OSError(errno.EIO, "Input/output error"),
  "ESTALE": OSError(errno.ESTALE, "Stale file handle"),
  "ENOENT of a stale listing": FileNotFoundError(errno.ENOENT, "No such file or directory"),
  "EACCES": PermissionError(errno.EACCES, "Permission denied"),
  "too many open files": OSError(errno.EMFILE, "Too many open files"),
  "out of memory of the system": OSError(errno.ENOMEM, "Cannot allocate memory"),
  "time-out": TimeoutError("timed out"),
  "reset connection": ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
  "UNAVAILABLE": ValueError("UNAVAILABLE: Error reading gs://bucket/7/state/manifest.ocdbt: HTTP 503"),
  "DEADLINE_EXCEEDED": ValueError("DEADLINE_EXCEEDED: Error reading local file"),
  "RESOURCE_EXHAUSTED": ValueError("RESOURCE_EXHAUSTED: Too many open files"),
  "TensorStore's NOT_FOUND": ValueError('NOT_FOUND: Error opening "zarr" driver'),
  "device's UNAVAILABLE": XlaRuntimeError("UNAVAILABLE: connection to the TPU worker lost"),
  "device's memory": XlaRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1073741824 bytes"),
  "out of memory": MemoryError(),
  "RuntimeError": RuntimeError("cannot schedule new futures after interpreter shutdown"),
  "wrapped": wrapped(ConnectionResetError(), Exception("Encountered error while reading array index: ()")),
  "a group": ExceptionGroup("unhandled errors in a TaskGroup", [TimeoutError("timed out")]),
  "DATA_LOSS that the bytes disprove": ValueError("DATA_LOSS: checksum verification failed"),
}


class Failing:
  """Raises `error` in the first `times` calls and then calls `function`."""

  def __init__(self, function, error, times=10**6):
    self.function, self.error, self.times, self.calls = function, error, times, 0

  def __call__(self, *args, **kwargs):
    self.calls += 1
    if self.calls <= self.times:
      raise self.error
    return self.function(*args, **kwargs)


def break_reading(monkeypatch, part, error, times=10**6):
  owner, name = {
    "meta": (contents, "_read_meta"),
    "arrays": (contents.ocp.StandardCheckpointHandler, "restore"),
    "checksums": (contents, "differing_checksums"),
    "listing": (saving.ocp.CheckpointManager, "reload"),
  }[part]
  failing = Failing(getattr(owner, name), error, times)
  monkeypatch.setattr(owner, name, lambda *args, **kwargs: failing(*args, **kwargs))
  return failing


def restore(folder, mesh, delays=(0.0, 0.0)):
  manager = Checkpoints(str(folder), retry_delays=delays)
  try:
    return manager.restore(abstract(mesh))
  finally:
    manager.close()


@pytest.fixture(scope="module")
def mesh():
  """Return a mesh of one device, because each device adds to the time of a restore."""
  return meshes.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Return a folder with the checkpoints of steps 1 and 2, saved on eight devices. Tests copy it."""
  folder = tmp_path_factory.mktemp("saved") / "checkpoints"
  save_steps(folder, meshes.make_mesh(8, 1), [1, 2])
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "checkpoints")


def files_of(folder):
  return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Transient errors.


# Every part judges the kinds alike. So all kinds stay with the quickest part, and three with the others.
def marks(kind, part):
  quick = part == "meta" or kind in ("EIO", "UNAVAILABLE", "DATA_LOSS that the bytes disprove")
  return () if quick else pytest.mark.long


@pytest.mark.parametrize(("kind", "part"), [
  pytest.param(kind, part, marks=marks(kind, part))
  for kind in TRANSIENT for part in ("meta", "arrays", "checksums", "listing")
])  # fmt: skip
def test_a_transient_error_stops_the_run_and_touches_nothing(folder, mesh, monkeypatch, caplog, kind, part):
  before = files_of(folder)
  with monkeypatch.context() as broken:
    failing = break_reading(broken, part, TRANSIENT[kind])
    with pytest.raises(UserError) as raised:
      restore(folder, mesh)
  assert failing.calls == 3
  assert caplog.text.count("next try in 0 s") == 2
  message = str(raised.value)
  assert str(folder) in message
  assert type(TRANSIENT[kind]).__name__ in message
  assert ("untouched" if part != "listing" else "No checkpoint was touched") in message
  if part != "listing":
    assert f"{folder}/2" in message
  assert files_of(folder) == before


@pytest.mark.parametrize("part", ["meta", "arrays", "checksums", "listing"])
def test_an_error_that_passes_does_not_stop_the_run(folder, mesh, monkeypatch, part):
  break_reading(monkeypatch, part, TRANSIENT["UNAVAILABLE"], times=2)
  state, _, step = restore(folder, mesh)
  assert step == 2
  assert_same(state, make_state(2))


def test_one_wrong_reading_of_sound_bytes_is_read_again(folder, mesh, monkeypatch):
  error = CorruptCheckpointError("the checksum differs for params/half")
  break_reading(monkeypatch, "checksums", error, times=1)
  assert restore(folder, mesh, delays=(0.0,))[2] == 2
  assert not (folder / "corrupt").exists()


def test_the_tries_wait_longer_each_time(folder, mesh, monkeypatch):
  waits = []
  monkeypatch.setattr(retries.time, "sleep", waits.append)
  break_reading(monkeypatch, "meta", TimeoutError())
  with pytest.raises(UserError, match="in 6 tries, last with TimeoutError"):
    restore(folder, mesh, delays=None)
  assert waits == [1, 2, 4, 8, 16]


def test_loading_parameters_is_tried_again_too(folder, monkeypatch):
  break_reading(monkeypatch, "meta", TimeoutError(), times=2)
  params = load_params(str(folder), retry_delays=(0.0, 0.0))
  assert_same(params, make_state(2)["params"])
  break_reading(monkeypatch, "meta", TimeoutError())
  with pytest.raises(UserError, match="stays untouched") as raised:
    load_params(str(folder), retry_delays=(0.0,))
  assert not isinstance(raised.value, CorruptCheckpointError)


# Damage.


def damage(path, how, generator):
  data = bytearray(path.read_bytes())
  if how == "remove":
    return path.unlink()
  if how.startswith("flip"):
    bit = int(generator.integers(len(data) * 8))
    data[bit // 8] ^= 1 << (bit % 8)
  else:
    data = data[: {"empty": 0, "cut": len(data) - 1, "half": len(data) // 2}[how]]
  path.write_bytes(data)


def check_falls_back_or_is_whole(folder, mesh):
  state, _, step = restore(folder, mesh)
  assert_same(state, make_state(step))
  assert corrupt_names(folder) == ["2"] if step == 1 else not (folder / "corrupt").exists()
  return step


@pytest.mark.parametrize("how", [
  "remove", "empty", "cut", "flip",
  # "cut" also leaves a part of the file, and the others flip other bits than "flip".
  *(pytest.param(how, marks=pytest.mark.long) for how in ("half", "flip again", "flip thrice")),
])  # fmt: skip
@pytest.mark.parametrize("age", ["new", "old"])
def test_damage_of_any_file_falls_back_unless_it_means_nothing(saved, tmp_path, mesh, how, age):
  """Checkpoints of the age "old" have no table of their files."""
  generator = np.random.default_rng(len(how))
  names = [path.relative_to(saved) for path in sorted((saved / "2").rglob("*")) if path.is_file()]
  steps = {}
  for number, name in enumerate(names):
    folder = shutil.copytree(saved, tmp_path / str(number))
    if age == "old":
      if name.name == evidence.TABLE:
        continue
      for table in folder.glob(f"*/{evidence.TABLE}"):
        table.unlink()
    if age == "old" and how.startswith("flip") and name.name in ("_METADATA", "process_0"):
      continue  # a flipped bit may leave JSON that Orbax cannot use; nothing in the bytes proves it
    damage(folder / name, how, generator)
    steps[name.as_posix().split("/", 1)[1]] = check_falls_back_or_is_whole(folder, mesh)
  assert steps["meta/metadata"] == 1
  assert steps["state/manifest.ocdbt"] == 1
  assert [step for name, step in steps.items() if name.startswith("state/d/")] == [1]


def test_a_difference_counts_only_if_it_is_found_twice(folder, monkeypatch):
  path = folder / "2"
  real = evidence._size_and_crc32
  calls = []

  def flaky(name):
    calls.append(name)
    return [0, 0] if len(calls) == 1 else real(name)

  monkeypatch.setattr(evidence, "_size_and_crc32", flaky)
  assert evidence.find_damage(paths.resolve(path)) is None
  data = path / "state" / "manifest.ocdbt"
  data.write_bytes(data.read_bytes() + b"x")
  assert "saved were" in evidence.find_damage(paths.resolve(path))


# Names.


def without_step(checkpoint):
  """Make the checkpoint as old versions did: no step in the metadata and no table of files."""
  path = checkpoint / "meta" / "metadata"
  table = json.loads(path.read_text())
  del table["crc32"], table["step"]
  path.write_text(json.dumps(table | {"crc32": evidence.crc32_of_json(table)}))
  (checkpoint / evidence.TABLE).unlink()


@pytest.mark.parametrize("age", ["new", "old"])
def test_a_folder_with_another_name_than_its_step_is_refused(folder, mesh, age):
  if age == "old":
    without_step(folder / "2")
    assert restore(folder, mesh)[2] == 2
  shutil.copytree(folder / "2", folder / "40")
  before = files_of(folder)
  for load in (lambda: restore(folder, mesh), lambda: load_params(str(folder))):
    with pytest.raises(UserError, match=r"/40 is named 40 but holds step 2\. Rename it to 2"):
      load()
  assert files_of(folder) == before
  assert_same(load_params(str(folder), step=1), make_state(1)["params"])


# Faults while saving.

NO_SPACE = {
  "disk full": OSError(errno.ENOSPC, "No space left on device", "/disk/x"),
  "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
  "read-only": OSError(errno.EROFS, "Read-only file system"),
  "TensorStore": ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device [ENOSPC]"),
  "wrapped": wrapped(OSError(errno.ENOSPC, "No space left on device"), RuntimeError("save failed")),
}


@pytest.mark.parametrize("kind", NO_SPACE)
@pytest.mark.parametrize("when", ["at once", "in the background"])
def test_no_room_to_save_is_one_message(folder, mesh, monkeypatch, kind, when):
  before = files_of(folder)
  manager = Checkpoints(str(folder), retry_delays=(0.0,))
  with monkeypatch.context() as broken:
    break_saving(broken, when, NO_SPACE[kind])
    with pytest.raises(UserError) as raised:
      save_and_close(manager, 3, sharded_state(mesh, 3))
  message = str(raised.value)
  assert ("/disk/x" if kind == "disk full" else str(folder / "3")) in message
  assert any(os.strerror(number) in message for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))
  assert files_of(folder) == before  # nothing half is left


def test_an_error_of_the_device_counts_only_for_the_files_of_the_run(tmp_path):
  """It may pass, so a save tries again; and a data set on another disk is not what the run cannot write."""
  own = OSError(errno.EIO, "Input/output error", str(tmp_path / "metrics.jsonl"))
  other = OSError(errno.EIO, "Input/output error", "/data/image.jpg")
  assert faults.explain(own, tmp_path) is None
  assert faults.explain(other, tmp_path, whole_run=True) is None
  message = str(faults.explain(own, tmp_path, whole_run=True))
  assert message.startswith(f"Cannot write {tmp_path / 'metrics.jsonl'}: Input/output error.")


def save_and_close(manager, step, state):
  manager.save(step, state, {})
  manager.close()


def break_saving(monkeypatch, when, error, times=10**6):
  owner, name = {
    "at once": (saving.ocp.CheckpointManager, "save"),
    "in the background": (evidence, "write_table"),
  }[when]
  failing = Failing(getattr(owner, name), error, times)
  monkeypatch.setattr(owner, name, lambda *args, **kwargs: failing(*args, **kwargs))
  return failing


@pytest.mark.parametrize("when", ["at once", "in the background"])
@pytest.mark.parametrize("then", ["close", "next save"])
def test_a_save_that_fails_once_is_tried_again(folder, mesh, monkeypatch, when, then):
  manager = Checkpoints(str(folder), keep=10, retry_delays=(0.0,))
  break_saving(monkeypatch, when, RuntimeError("UNAVAILABLE"), times=1)
  assert manager.save(3, sharded_state(mesh, 3), {})
  if then == "next save":
    assert manager.save(4, sharded_state(mesh, 4), {})
  manager.close()
  state, _, step = restore(folder, mesh)
  assert step == (4 if then == "next save" else 3)
  assert_same(state, make_state(step))


def test_two_failed_saves_in_a_row_stop_the_run(folder, mesh, monkeypatch):
  manager = Checkpoints(str(folder), retry_delays=(0.0,))
  break_saving(monkeypatch, "in the background", RuntimeError("UNAVAILABLE"))
  manager.save(3, sharded_state(mesh, 3), {})
  manager.save(4, sharded_state(mesh, 4), {})
  with pytest.raises(UserError, match=r"Checkpoint 4 could not be saved .* RuntimeError: UNAVAILABLE"):
    manager.close()
  assert restore(folder, mesh)[2] == 2


def test_a_failed_last_save_whose_state_is_gone_stops_the_run(folder, mesh, monkeypatch):
  manager = Checkpoints(str(folder), retry_delays=(0.0,))
  break_saving(monkeypatch, "in the background", RuntimeError("UNAVAILABLE"))
  state = sharded_state(mesh, 3)
  manager.save(3, state, {})
  jax.tree.map(lambda leaf: leaf.delete(), state)
  with pytest.raises(UserError, match="Checkpoint 3 could not be saved"):
    manager.close()


def test_the_limit_on_the_size_of_files_is_one_message(folder, mesh):
  """This fault is real: the system refuses to write more than 2 kB in a file."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  manager = Checkpoints(str(folder), retry_delays=(0.0,))
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    with pytest.raises(UserError, match="File too large"):
      save_and_close(manager, 3, sharded_state(mesh, 3))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert restore(folder, mesh)[2] == 2
  save_steps(folder, mesh, [3])
  assert restore(folder, mesh)[2] == 3


@pytest.fixture
def small_disk(tmp_path):
  disk = tmp_path / "disk"
  disk.mkdir()
  try:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk], check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("no right to mount")
  yield disk
  subprocess.run(["umount", "-l", disk], check=True)


def test_a_real_disk_that_is_full_and_then_has_room(small_disk, mesh):
  folder = small_disk / "checkpoints"
  save_steps(folder, mesh, [1])
  ballast = small_disk / "ballast"
  free = shutil.disk_usage(small_disk).free
  ballast.write_bytes(b"x" * (free - 16_000))
  with pytest.raises(UserError, match=f"Cannot write .*{folder}.*: No space left on device"):
    save_steps(folder, mesh, [2])
  assert restore(folder, mesh)[2] == 1
  ballast.unlink()
  save_steps(folder, mesh, [2])
  state, _, step = restore(folder, mesh)
  assert step == 2
  assert_same(state, make_state(2))


def test_a_real_disk_that_is_read_only(small_disk, mesh):
  save_steps(small_disk / "checkpoints", mesh, [1])
  subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
  assert restore(small_disk / "checkpoints", mesh)[2] == 1
  for folder in ("checkpoints", "new"):
    with pytest.raises(UserError, match=f"Cannot write {small_disk}.*: Read-only file system"):
      save_steps(small_disk / folder, mesh, [2])


class StepCounter(Task):
  """A task that compiles at once. Its parameters take 256 kB, and no step changes them."""

  outputs: ClassVar = {}

  def init(self, key, params=None):
    params = {"kernel": jax.random.normal(key, (256, 256))}
    return {"params": params, "opt_state": {}, "step": jnp.int32(0)}

  def train_step(self, state, frozen, batch, key):
    return state | {"step": state["step"] + 1}, {"loss": jnp.float32(1.0)}


def test_a_run_on_a_full_disk_stops_with_one_message_and_resumes(small_disk, world, one_device, monkeypatch):
  monkeypatch.setattr(loop, "build_task", lambda *_: StepCounter())
  config = small_world.debug_config(world, total_steps=2, evals={})
  config.checkpoint.save_steps = 1
  ballast = small_disk / "ballast"
  for room in (8_000, 150_000):  # too little for the numbers, or for the checkpoint
    ballast.unlink(missing_ok=True)
    ballast.write_bytes(b"x" * max(0, shutil.disk_usage(small_disk).free - room))
    with pytest.raises(UserError, match=f"Cannot write {small_disk}/run.*No space left on device"):
      loop.train(config, str(small_disk / "run"))
  ballast.unlink()
  assert int(loop.train(config, str(small_disk / "run"))["step"]) == 2


def test_a_fault_of_storage_is_explained_anywhere(tmp_path):
  @faults.explained(tmp_path)
  def write(error):
    raise error

  for error in NO_SPACE.values():
    with pytest.raises(faults.StorageError, match="Cannot write"):
      write(error)
  for error in (ValueError("wrong"), OSError(errno.EIO, "Input/output error")):
    with pytest.raises(type(error)):
      write(error)


def test_errors_of_parallel_reads_leave_no_traceback(caplog):
  """Orbax raises the first error of its parallel tasks and never reads the others."""

  async def fail():
    raise OSError(errno.EIO, "Input/output error")

  async def read():
    tasks = [asyncio.create_task(fail()) for _ in range(3)]
    asyncio.gather(fail(), fail())  # the group is forgotten too
    await asyncio.gather(*tasks[:1])

  with pytest.raises(OSError, match="Input/output"):
    asyncio.run(read())
  gc.collect()
  assert "never retrieved" not in caplog.text
