"""Test that a saved state is restored bit by bit or not at all, and that a broken one is moved aside."""

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dtm_jax.checkpoints.array_checksums import checksums
from dtm_jax.checkpoints.contents import load_params
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.checkpoints.retries import CorruptCheckpointError
from dtm_jax.errors import UserError
from dtm_jax.training import mesh as meshes

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
RULES = [(".*", "fsdp")]


def make_state(seed=0, width=32):
  params = {
    "blocks": {"kernel": jax.random.normal(jax.random.key(seed), (4, 16, width))},
    "half": jax.random.normal(jax.random.key(seed + 1), (24, 8), jnp.bfloat16),
    "flags": jnp.arange(7) % 3 == 0,
    "scalar": jnp.float32(seed + 0.5),
  }
  return {"params": params, "opt_state": OPTIMIZER.init(params), "step": jnp.int32(seed)}


@functools.cache
def shardings_of(mesh, make=make_state):
  return meshes.param_shardings(mesh, jax.eval_shape(make), RULES, min_size=1)


@functools.cache
def abstract(mesh, make=make_state):
  shape = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(shape, jax.eval_shape(make), shardings_of(mesh, make))


@pytest.fixture
def mesh():
  return meshes.make_mesh(8, 1)


def sharded_state(mesh, seed=0):
  return jax.device_put(make_state(seed), shardings_of(mesh))


def save_steps(folder, mesh, steps, **options):
  manager = Checkpoints(str(folder), **({"keep": 10} | options))
  for step in steps:
    manager.save(step, sharded_state(mesh, step), {"images_seen": 10 * step})
  manager.close()


def restore(folder, mesh):
  manager = Checkpoints(str(folder))
  try:
    return manager.restore(abstract(mesh))
  finally:
    manager.close()


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def data_file(step_folder):
  """Return the largest file of the merged store, which a restore reads."""
  return max((step_folder / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)


def corrupt_names(folder):
  return sorted(p.name.split("-")[0] for p in (folder / "corrupt").iterdir())


# Saving and restoring.


def test_round_trip_is_bit_equal(tmp_path, mesh):
  save_steps(tmp_path, mesh, [3])
  state, meta, step = restore(tmp_path, mesh)
  assert (meta, step) == ({"images_seen": 30}, 3)
  assert_same(state, make_state(3))


def test_replicas_share_the_writing_of_large_arrays_only(tmp_path, mesh):
  state = {"small": np.ones((8, 100), np.float32), "large": np.ones((8, 2**18), np.float32)}
  state = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
  manager = Checkpoints(str(tmp_path))
  manager.save(1, state, {})
  manager.close()
  written = json.loads((tmp_path / "1" / "state" / "array_metadatas" / "process_0").read_text())
  arrays = [entry["array_metadata"] for entry in written["array_metadatas"]]
  shapes = {array["param_name"]: array["write_shape"] for array in arrays}
  assert shapes == {"small": [8, 100], "large": [1, 2**18]}


def test_a_new_folder_has_nothing_to_restore(tmp_path, mesh):
  assert restore(tmp_path / "new", mesh) is None


def test_the_saved_state_may_be_donated_at_once(tmp_path, mesh):
  manager = Checkpoints(str(tmp_path))
  state = sharded_state(mesh, 1)
  manager.save(1, state, {})
  ruin = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
  for _ in range(3):
    state = ruin(state)
  manager.close()
  assert_same(restore(tmp_path, mesh)[0], make_state(1))


@pytest.mark.parametrize(
  ("sizes", "spec"), [((4, 2), P(None, None, "fsdp")), ((1, 8), P(None, None, "fsdp"))]
)
def test_restores_onto_another_mesh(tmp_path, mesh, sizes, spec):
  save_steps(tmp_path, mesh, [2])
  other = meshes.make_mesh(*sizes)
  state, _, _ = restore(tmp_path, other)
  assert_same(state, make_state(2))
  assert state["params"]["blocks"]["kernel"].sharding.spec == spec
  assert state["opt_state"][1][0].mu["blocks"]["kernel"].sharding.mesh == other
  save_steps(tmp_path / "back", other, [2])
  assert_same(restore(tmp_path / "back", mesh)[0], make_state(2))


def test_a_step_that_is_there_is_left_as_it_is(tmp_path, mesh):
  save_steps(tmp_path, mesh, [5])
  manager = Checkpoints(str(tmp_path))
  assert manager.save(5, sharded_state(mesh, 9), {}) is False
  assert manager.save(6, sharded_state(mesh, 6), {}) is True
  manager.close()
  assert_same(load_params(str(tmp_path), step=5), make_state(5)["params"])


def test_keeps_the_newest_and_the_milestones(tmp_path, mesh):
  save_steps(tmp_path, mesh, range(1, 9), keep=2, keep_every_steps=3)
  assert sorted(int(p.name) for p in tmp_path.iterdir()) == [3, 6, 7, 8]


def test_parameters_are_loaded_alone(tmp_path, mesh):
  save_steps(tmp_path, mesh, [1, 2])
  for step, wanted in ((None, 2), (1, 1)):
    params = load_params(str(tmp_path), step=step)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
    assert_same(params, make_state(wanted)["params"])
  with pytest.raises(FileNotFoundError, match=r"No checkpoint 7 in .* Steps: \[1, 2\]"):
    load_params(str(tmp_path), step=7)
  with pytest.raises(FileNotFoundError, match=r"Steps: \[\]"):
    load_params(str(tmp_path / "nowhere"))


# Damage.


def flip_bit(path, bit):
  data = bytearray(path.read_bytes())
  data[bit // 8] ^= 1 << (bit % 8)
  path.write_bytes(data)


def test_one_flipped_bit_falls_back_to_the_step_before(tmp_path, mesh):
  """The bit may be in an array, which Orbax would not notice, or in the tables of the store."""
  save_steps(tmp_path, mesh, [1, 2])
  generator = np.random.default_rng(0)
  names = [path.relative_to(tmp_path) for path in (tmp_path / "2" / "state").rglob("d/*")]
  for name in names * 3:
    original = (tmp_path / name).read_bytes()
    flip_bit(tmp_path / name, int(generator.integers(len(original) * 8)))
    state, meta, step = restore(tmp_path, mesh)
    if step == 2:  # the bit means nothing
      assert_same(state, make_state(2))
    else:
      assert (meta, step) == ({"images_seen": 10}, 1)
      assert_same(state, make_state(1))
      assert corrupt_names(tmp_path) == ["2"]
      next((tmp_path / "corrupt").iterdir()).rename(tmp_path / "2")
    (tmp_path / name).write_bytes(original)


def test_arrays_that_are_readable_but_wrong_are_found_by_their_checksums(tmp_path, mesh, caplog):
  """Orbax protects only small arrays itself, so our checksums have to protect the others."""
  save_steps(tmp_path, mesh, [1, 2, 3])
  shutil.rmtree(tmp_path / "3" / "state")
  shutil.copytree(tmp_path / "2" / "state", tmp_path / "3" / "state")
  state, _, step = restore(tmp_path, mesh)
  assert step == 2
  assert_same(state, make_state(2))
  assert "the checksum differs for" in caplog.text
  assert corrupt_names(tmp_path) == ["3"]


@pytest.mark.parametrize("damage", ["truncate", "delete", "empty", "meta", "meta_shape"])
def test_damaged_step_falls_back(tmp_path, mesh, damage, caplog):
  save_steps(tmp_path, mesh, [1, 2])
  newest = tmp_path / "2"
  meta = newest / "meta" / "metadata"
  if damage == "truncate":
    path = data_file(newest)
    path.write_bytes(path.read_bytes()[:-100])
  elif damage == "delete":
    data_file(newest).unlink()
  elif damage == "empty":
    (tmp_path / "3").mkdir()
  elif damage == "meta":
    meta.write_text(meta.read_text()[:-5])
  elif damage == "meta_shape":  # must not be taken for a config of another shape
    contents = json.loads(meta.read_text())
    contents["arrays"]["params/half"]["shape"] = [24, 9]
    meta.write_text(json.dumps(contents))
  manager = Checkpoints(str(tmp_path))
  state, _, step = manager.restore(abstract(mesh))
  bad, good = ("3", 2) if damage == "empty" else ("2", 1)
  assert step == good
  assert_same(state, make_state(good))
  assert corrupt_names(tmp_path) == [bad]
  assert f"/{bad} is corrupt and moves to" in caplog.text
  assert manager.save(int(bad), sharded_state(mesh, 5), {})  # the run reaches the same step again
  manager.close()
  assert_same(restore(tmp_path, mesh)[0], make_state(5))


def test_a_run_that_had_checkpoints_never_starts_over_by_itself(tmp_path, mesh):
  for step in (1, 2):
    (tmp_path / str(step)).mkdir(parents=True)
  for _ in range(2):  # the second time, only corrupt/ has checkpoints
    with pytest.raises(
      UserError, match=rf"No checkpoint of .* another --workdir or remove the folder {tmp_path}\."
    ):
      restore(tmp_path, mesh)
    assert corrupt_names(tmp_path) == ["1", "2"]


def test_load_params_refuses_a_flipped_bit(tmp_path, mesh):
  save_steps(tmp_path, mesh, [1])
  meta = tmp_path / "1" / "meta" / "metadata"
  meta.write_text(meta.read_text().replace('"images_seen": 10', '"images_seen": 11'))
  assert "11" in meta.read_text()
  with pytest.raises(CorruptCheckpointError, match="meta differs"):
    load_params(str(tmp_path))


def test_another_state_is_an_error_and_not_corruption(tmp_path, mesh):
  save_steps(tmp_path, mesh, [1])
  wider = abstract(mesh, lambda: make_state(width=48))
  wider["params"]["new"] = wider["params"].pop("scalar")
  manager = Checkpoints(str(tmp_path))
  with pytest.raises(ValueError, match="holds another state") as error:
    manager.restore(wider)
  manager.close()
  message = str(error.value)
  assert (
    "params/blocks/kernel: saved ((4, 16, 32), 'float32'), the config wants ((4, 16, 48), 'float32')"
    in message
  )
  assert "opt_state/1/0/mu/blocks/kernel" in message
  assert "params/new: saved nothing" in message
  assert "params/half" not in message
  assert manager.all_steps == [1]
  assert not (tmp_path / "corrupt").exists()


# Checksums.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksum_sees_every_bit(dtype):
  array = np.asarray(jnp.arange(15).reshape(3, 5) % 2, dtype=jnp.dtype(dtype))
  raw = array.view(np.uint8)
  bits = range(raw.size * 8) if dtype != "bool" else range(0, raw.size * 8, 8)
  whole = int(checksums([array])[0])
  for bit in bits:
    flipped = raw.copy().reshape(-1)
    flipped[bit // 8] ^= 1 << (bit % 8)
    assert checksums([flipped.view(array.dtype).reshape(3, 5)])[0] != whole


def test_checksum_is_the_same_on_every_mesh_and_in_numpy(mesh):
  array = jax.random.normal(jax.random.key(0), (8, 16, 4))
  weight = 2 * np.arange(array.size, dtype=np.uint32) + 1
  expected = np.sum(np.asarray(array).view(np.uint32).reshape(-1) * weight, dtype=np.uint32)
  for spec in (P(), P("data"), P(None, "data")):
    placed = jax.device_put(array, jax.NamedSharding(mesh, spec))
    assert checksums([placed])[0] == expected
  key = jax.random.key(3)
  assert checksums([key])[0] == checksums([jax.random.key_data(key)])[0]


# Processes that are killed.

CHILD = """
import sys, jax, jax.numpy as jnp
from dtm_jax.checkpoints.manager import Checkpoints
manager = Checkpoints(sys.argv[1])
state = lambda step: {"params": {"w": jnp.full((2**22,), step, jnp.float32)}}
manager.save(1, state(1), {})
manager.wait()
"""
KILLED = CHILD + 'manager.save(2, state(2), {}); print("saving", flush=True); manager.wait()'
STOPPED = (
  CHILD
  + """
import time
print("running", flush=True)
for step in range(100):
  time.sleep(0.05)
  if manager.reached_preemption(step):
    manager.save(1000, state(7), {})
    manager.close()
    print("saved", flush=True)
    sys.exit(0)
"""
)


def start(program, folder):
  root = pathlib.Path(__file__).parents[1]
  env = os.environ | {"XLA_FLAGS": ""}
  command = [sys.executable, "-c", textwrap.dedent(program), str(folder)]
  return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, env=env)


def newest(folder):
  manager = Checkpoints(str(folder))
  result = manager.restore({"params": {"w": jax.ShapeDtypeStruct((2**22,), jnp.float32)}})
  manager.close()
  assert not list(folder.glob("*tmp*"))
  return result


def test_a_kill_during_a_save_leaves_whole_checkpoints(tmp_path):
  with start(KILLED, tmp_path) as child:
    assert child.stdout.readline() == "saving\n"
    child.kill()
  state, _, step = newest(tmp_path)
  assert step in (1, 2)  # 2 if the disk was quicker than the signal; whole in either case
  np.testing.assert_array_equal(state["params"]["w"], step)


def test_a_run_notices_sigterm_and_can_save(tmp_path):
  with start(STOPPED, tmp_path) as child:
    assert child.stdout.readline() == "running\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "saved\n"
    assert child.wait(timeout=300) == 0
  state, _, step = newest(tmp_path)
  assert step == 1000
  np.testing.assert_array_equal(state["params"]["w"], 7)
