"""Training is the same on any number of devices: losses, draws and parameters, on data and fsdp meshes."""

import functools

import jax
import numpy as np
import pytest
import small_world

from dtm_jax import plugins
from dtm_jax.tasks import Run
from dtm_jax.training import mesh as meshes
from dtm_jax.training import sharded_step

STEPS, BATCH = 4, 16


@pytest.fixture(scope="module")
def run(world):
  """Return a function (data, fsdp) -> measurements of every step, and the last parameters."""
  config = small_world.debug_config(
    world, augment__color_jitter=0.0, loss__schedules=1, student__drop_path=0.1, morphers__dtm__max_rounds=3
  )
  for name in [name for name in config.morphers if name != "dtm"]:
    del config.morphers[name]
  task = plugins.load("tasks", config.task).build(config, Run(STEPS, 10.0, BATCH, None))
  image = np.random.default_rng(0).integers(0, 256, (STEPS, BATCH, 32, 32, 3), np.uint8)

  @functools.cache
  def train(data: int, fsdp: int):
    mesh = meshes.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    shardings = lambda tree: meshes.param_shardings(mesh, tree, config.mesh.rules)
    state = jax.jit(task.init)(jax.random.key(0))
    state = jax.device_put(state, shardings(state))
    frozen = sharded_step.place_frozen(task, mesh, config.mesh.rules)
    step = sharded_step.jit_train_step(task, state, frozen, mesh)
    history = []
    for rows in image:
      batch = meshes.to_device({"image": rows}, mesh)
      state, measurements = step(state, frozen, batch, jax.random.key(0))
      history.append(jax.device_get(measurements))
    split = [x for x in jax.tree.leaves(state["params"]) if "fsdp" in str(x.sharding.spec)]
    assert bool(split) == (fsdp > 1)  # and so it is after the step as before it
    return history, jax.device_get(state["params"])

  return train


@pytest.mark.slow
@pytest.mark.parametrize(
  "shape",
  [
    pytest.param((1, 8), id="fsdp 8"),
    pytest.param((8, 1), id="data 8", marks=pytest.mark.long),  # fsdp=8 splits the batch too
    pytest.param((2, 1), id="data 2", marks=pytest.mark.long),
  ],
)
def test_devices_change_no_draw_no_loss_and_no_parameter(run, shape):
  one, many = run(1, 1), run(*shape)
  for alone, together in zip(one[0], many[0], strict=True):
    assert alone["groups_dtm"] == together["groups_dtm"]  # the draws, and what they lead to, exactly
    np.testing.assert_allclose(together["loss"], alone["loss"], rtol=1e-6)
    np.testing.assert_allclose(together["grad_norm"], alone["grad_norm"], rtol=1e-5)
  assert len({float(step["groups_dtm"]) for step in one[0]}) > 1
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=0), many[1], one[1])
