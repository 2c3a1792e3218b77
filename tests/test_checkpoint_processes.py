"""Test that two processes take the same decision about a checkpoint, whatever fails on one of them."""

import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from dtm_jax import processes

PROGRAM = """
import json, os, shutil, signal, sys, time
import jax, jax.numpy as jnp
from dtm_jax import errors, processes
from dtm_jax.training import startup
processes.TIME_LIMITS.update(json.loads(sys.argv.pop(1)))
startup.start_distributed()
from dtm_jax.checkpoints import contents, saving
from dtm_jax.checkpoints.manager import Checkpoints
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from unittest import mock

folder = sys.argv[1]
sharding = NamedSharding(Mesh(jax.devices(), "data"), P("data"))
state_of = lambda step: {"params": {"w": jnp.full((256, 8), step, jnp.float32)}}
make = jax.jit(state_of, out_shardings=sharding)
abstract = {"params": {"w": jax.ShapeDtypeStruct((256, 8), jnp.float32, sharding=sharding)}}
value = lambda state: float(state["params"]["w"].addressable_data(0)[0, 0])
handler = contents.ocp.StandardCheckpointHandler
restore, differing = handler.restore, contents.differing_checksums
list_steps = Checkpoints._list_steps
disk_full = OSError(28, "No space left on device")

def only_first_step(self):
  steps, moved = list_steps(self)
  return steps[:1], moved

def wrong_in_step_2(state, arrays):
  return differing(state, arrays) or ("the checksum differs" if value(state) == 2 else None)

patches = {
  "arrays": lambda: mock.patch.object(handler, "restore", side_effect=TimeoutError("timed out")),
  "meta": lambda: mock.patch.object(contents, "_read_meta", side_effect=OSError(116, "Stale file handle")),
  "hiccup": lambda: mock.patch.object(handler, "restore", hiccup()),
  "checksum": lambda: mock.patch.object(contents, "differing_checksums", wrong_in_step_2),
  "list": lambda: mock.patch.object(Checkpoints, "_list_steps", only_first_step),
  "unsaved": lambda: mock.patch.object(saving.ocp.CheckpointManager, "save", side_effect=disk_full),
}

def hiccup():
  calls = []
  def once(*args, **kwargs):
    calls.append(0)
    if len(calls) == 1:
      raise TimeoutError("timed out")
    return restore(*args, **kwargs)
  return once

def stop(copy, here):
  manager = Checkpoints(copy)
  if here:
    os.kill(os.getpid(), signal.SIGTERM)
  for step in range(3, 3000):
    if manager.reached_preemption(step):
      print("RESULT stop 0", step, flush=True)
      break
    time.sleep(0.01)
  manager.close()

def try_it(what, where):
  copy = f"{folder}_{what}_{where}"
  if jax.process_index() == 0:
    shutil.copytree(folder, copy)
  processes.gather(None)
  here = jax.process_index() == where
  if here and what == "killed":
    os.kill(os.getpid(), 9)
  if what == "stop":
    return stop(copy, here)
  with patches[what]() if here else mock.MagicMock():
    try:
      manager = Checkpoints(copy, retry_delays=(0.1, 0.1))
      if what == "unsaved":
        manager.save(3, make(3), {})
      state, _, step = manager.restore(abstract)
      manager.close()
      print("RESULT", what, where, step, value(state), flush=True)
    except errors.UserError as error:
      print("RESULT", what, where, type(error).__name__, error, flush=True)
      if what == "unsaved":
        sys.exit(1)

manager = Checkpoints(folder, keep=10)
for step in (1, 2):
  manager.save(step, make(step), {})
manager.close()
for argument in sys.argv[2:]:
  what, where = argument.split("_")
  try_it(what, int(where))
"""


def start_two(folder, *cases, **limits):
  """Start both processes of a run, which try the cases. `limits` are other TIME_LIMITS."""
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": "2",
  }
  return [
    subprocess.Popen(
      [sys.executable, "-c", PROGRAM, json.dumps(limits), str(folder), *cases],
      cwd=pathlib.Path(__file__).parents[1],
      env=env | {"JAX_PROCESS_ID": str(index)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]


def end_of(children):
  """Return the exit code and the lines of each process."""
  try:
    outputs = [child.communicate(timeout=180) for child in children]
  finally:
    for child in children:
      child.kill()
  lines = [
    [line.removeprefix("RESULT ") for line in out.splitlines() if "RESULT" in line] or [err[-3000:]]
    for out, err in outputs
  ]
  return [child.returncode for child in children], lines


@pytest.mark.slow
def test_two_processes_take_the_same_decision(tmp_path):
  folder = tmp_path / "run"
  cases = [
    "arrays_1",
    "arrays_0",
    "meta_0",
    "meta_1",
    "hiccup_1",
    "checksum_1",
    "checksum_0",
    "list_0",
    "list_1",
    "stop_0",
  ]
  codes, lines = end_of(start_two(folder, *cases))
  assert codes == [0, 0], lines
  assert lines[0] == lines[1]
  results = {"_".join(line.split()[:2]): line.split(maxsplit=2)[2] for line in lines[0]}
  for case in cases[:4]:
    assert "2 could not be read in 3 tries, last with process " + case[-1] in results[case]
    assert sorted(path.name for path in (tmp_path / f"run_{case}").iterdir()) == ["1", "2"]
  assert 3 <= int(results["stop_0"]) < 3000  # a SIGTERM to one stops both at one step
  assert {case: results[case] for case in cases[4:9]} == {
    "hiccup_1": "2 2.0",
    "checksum_1": "1 1.0",
    "checksum_0": "1 1.0",
    "list_0": "1 1.0",
    "list_1": "2 2.0",
  }
  for case in cases[4:9]:
    assert (tmp_path / f"run_{case}" / "corrupt").exists() == case.startswith("checksum")


@pytest.mark.slow
def test_the_others_stop_within_the_limits_when_one_ends(tmp_path):
  """Two runs at once, with limits shorter than a minute, because most of their time is this wait."""
  assert sum(processes.TIME_LIMITS.values()) < 60
  limits, start = {"heartbeat_timeout_seconds": 10, "shutdown_timeout_seconds": 5}, time.monotonic()
  pairs = {case: start_two(tmp_path / "run" / case, case, **limits) for case in ("killed_1", "unsaved_0")}
  try:
    found = {case: end_of(children) for case, children in pairs.items()}
  finally:
    for child in itertools.chain(*pairs.values()):
      child.kill()
  assert time.monotonic() - start < 15 + 75  # with the start, and sooner than by the limits of JAX
  for case, (codes, lines) in found.items():
    assert 0 not in codes, lines
    assert {"1", "2"} <= {path.name for path in (tmp_path / f"run/{case}_{case}").iterdir()}
  assert "No space left on device" in found["unsaved_0"][1][0][0]
