"""The mesh, the rules that give names their shardings, and the batch on the devices."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dtm_jax.training import mesh as meshes

PARAMS = {
  "blocks": {
    "mlp": {"kernel": jnp.zeros((8, 64, 256)), "bias": jnp.zeros((8, 256))},
    "odd": jnp.zeros((4096, 3, 5)),  # only the layers can be split
  },
  "head": {"kernel": jnp.zeros((64, 512)), "bias": jnp.zeros((512,))},
  "table": jnp.zeros((732, 12)),
  "prime": jnp.zeros((101, 101)),
}


@pytest.mark.parametrize(
  ("sizes", "shape"), [((-1, 1), (8, 1)), ((2, -1), (2, 4)), ((-1, 4), (2, 4)), ((4, 2), (4, 2))]
)
def test_mesh_shape(sizes, shape):
  mesh = meshes.make_mesh(*sizes)
  assert mesh.axis_names == ("data", "fsdp")
  assert mesh.devices.shape == shape
  assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
  assert [d.id for d in mesh.devices.flat] == list(range(8))


@pytest.mark.parametrize("sizes", [(3, 2), (-1, 3), (-1, -1), (0, 8), (4, 1), (16, 1), (-1, 0), (-2, 4)])
def test_mesh_that_does_not_fit(sizes):
  with pytest.raises(ValueError, match=rf"data={sizes[0]} by fsdp={sizes[1]} .* 8 devices"):
    meshes.make_mesh(*sizes)


def two_slices(platform: str = "tpu", devices: int = 8) -> list[jax.Device]:
  """Return the devices of two slices in another order. A process has four devices, as on a TPU host."""

  def device(number: int) -> jax.Device:
    fake = mock.Mock(spec=jax.Device)
    fake.id, fake.process_index, fake.slice_index = number, number // 4, number // devices
    fake.platform = platform
    return fake

  numbers = range(2 * devices)
  return [device(number) for number in (*numbers[1::2], *numbers[::2])]


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_an_fsdp_group_stays_inside_a_slice(fsdp):
  mesh = meshes.make_mesh(-1, fsdp, devices=two_slices())
  assert mesh.devices.shape == (16 // fsdp, fsdp)
  for group in mesh.devices:
    assert len({device.slice_index for device in group}) == 1
  assert [device.id for device in mesh.devices.flat] == list(range(16))  # a process still has its own rows


@pytest.mark.parametrize("sizes", [(-1, 16), (1, -1)])
def test_an_fsdp_group_that_crosses_slices_is_refused(sizes):
  with pytest.raises(ValueError, match=r"fsdp=16 .* 2 TPU slices of 8 devices.*divisors of 8"):
    meshes.make_mesh(*sizes, devices=two_slices())
  with pytest.raises(ValueError, match=r"mesh.fsdp=4 .* 2 TPU slices of 6 devices"):
    meshes.make_mesh(-1, 4, devices=two_slices(devices=6))


def test_gpus_of_several_hosts_may_share_an_fsdp_group():
  """JAX gives the GPUs of each host another slice_index."""
  assert meshes.make_mesh(1, -1, devices=two_slices("gpu")).devices.shape == (1, 16)


def test_fsdp_splits_the_largest_fitting_axis_but_not_the_layers():
  shardings = meshes.param_shardings(meshes.make_mesh(-1, 4), PARAMS, [(".*", "fsdp")])
  specs = jax.tree.map(lambda s: s.spec, shardings)
  assert specs["blocks"]["mlp"]["kernel"] == P(None, None, "fsdp")
  assert specs["blocks"]["mlp"]["bias"] == P()  # 2048 elements: small
  assert specs["blocks"]["odd"] == P("fsdp")
  assert specs["head"] == {"kernel": P(None, "fsdp"), "bias": P()}
  assert specs["table"] == P("fsdp")
  assert specs["prime"] == P()


def test_first_matching_rule_decides():
  rules = [("head/.*", "replicated"), (".*kernel", "fsdp"), (".*", "replicated")]
  shardings = meshes.param_shardings(meshes.make_mesh(-1, 2), PARAMS, rules)
  assert shardings["head"]["kernel"].spec == P()
  assert shardings["blocks"]["mlp"]["kernel"].spec == P(None, None, "fsdp")


def test_uncovered_parameter_and_unknown_tactic_are_errors():
  mesh = meshes.make_mesh()
  with pytest.raises(ValueError, match="head/bias, head/kernel"):
    meshes.param_shardings(mesh, PARAMS, [("blocks/.*|table|prime", "fsdp")])
  with pytest.raises(ValueError, match=r"Unknown tactic 'tensor' for '\.\*'\. Available: replicated, fsdp"):
    meshes.param_shardings(mesh, PARAMS, [(".*", "tensor")])


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-3), optax.MultiSteps(optax.adam(1e-3), 4)])
def test_moments_follow_their_parameters_through_init_and_update(optimizer):
  mesh = meshes.make_mesh(2, 4)

  def init():
    return {"params": PARAMS, "opt_state": optimizer.init(PARAMS), "step": jnp.int32(0)}

  def update(state):
    updates, opt_state = optimizer.update(state["params"], state["opt_state"], state["params"])
    return state | {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

  shardings = meshes.param_shardings(mesh, jax.eval_shape(init), [(".*", "fsdp")])
  state = jax.jit(update, out_shardings=shardings)(jax.jit(init, out_shardings=shardings)())
  kernels = [
    x
    for path, x in jax.tree_util.tree_leaves_with_path(state)
    if jax.tree_util.keystr(path, simple=True, separator="/").endswith("blocks/mlp/kernel")
  ]
  assert len(kernels) in (3, 4)  # parameter, two moments, and the accumulated gradient
  for kernel in kernels:
    assert kernel.sharding.spec == P(None, None, "fsdp")
    assert kernel.addressable_shards[0].data.shape == (8, 64, 64)
  assert state["step"].sharding.is_fully_replicated


def test_batch_is_split_in_order_over_both_axes():
  mesh = meshes.make_mesh(4, 2)
  image = np.arange(16 * 3, dtype=np.uint8).reshape(16, 3)
  batch = meshes.to_device({"image": image, "label": np.arange(16)}, mesh)
  assert batch["image"].sharding == meshes.batch_sharding(mesh)
  np.testing.assert_array_equal(batch["image"], image)
  for shard in batch["label"].addressable_shards:
    np.testing.assert_array_equal(shard.data, [2 * shard.device.id, 2 * shard.device.id + 1])


def test_uneven_batch_is_an_error_with_its_shape():
  with pytest.raises(ValueError, match=r"8 local devices.*'label': \(12,\)"):
    meshes.to_device({"label": np.arange(12)}, meshes.make_mesh())
