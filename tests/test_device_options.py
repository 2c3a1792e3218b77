"""The options with the value "auto": what they become on each device, in the records, and in the numbers."""

import dataclasses
import importlib
import json
from functools import partial

import jax
import numpy as np
import optax
import pytest
from small_world import counting_step, debug_config, losses

from dtm_jax import device_options, loop, plugins
from dtm_jax.device_options import resolve
from dtm_jax.devices import ON_GPU, Device
from dtm_jax.errors import OptionError
from dtm_jax.models.vit import classifier, segmenter
from dtm_jax.models.vit import model as vit
from dtm_jax.options.sections import get
from dtm_jax.tasks import Run, pretrain

GIB = 2**30
H100 = Device("gpu", "NVIDIA H100", memory=60 * GIB)
AS_BEFORE = {
  "teacher.attention": "xla",
  "teacher.stream_dtype": "float32",
  "student.attention": "xla",
  "student.stream_dtype": "float32",
  "student.unroll": 1,
  "student.remat": "elementwise",
  "morphers.dtm.implementation": "plain",
}
ON_H100 = {
  "teacher.attention": "cudnn",
  "teacher.stream_dtype": "bfloat16",
  "student.attention": "cudnn",
  "student.stream_dtype": "bfloat16",
  "student.unroll": 12,
  "student.remat": "none",
  "morphers.dtm.implementation": ON_GPU["implementation"],
}


def vitb16(batch_size=256, **changes):
  config = importlib.import_module("configs.vitb16").get_config()
  config.batch_size = batch_size
  for key, value in changes.items():
    section, name = key.split("__")
    with config[section].ignore_type():
      config[section][name] = value
  return config.lock()


@pytest.mark.parametrize(
  ("device", "config", "expected"),
  [
    (Device("cpu"), vitb16(), AS_BEFORE),
    (Device("tpu", "TPU v4", memory=32 * GIB), vitb16(), AS_BEFORE),
    (Device("rocm", "AMD"), vitb16(), AS_BEFORE),
    (H100, vitb16(), ON_H100),
    (H100, vitb16(batch_size=1024), ON_H100 | {"student.remat": "elementwise"}),
    (dataclasses.replace(H100, count=8), vitb16(batch_size=2048), ON_H100),
    (dataclasses.replace(H100, memory=None), vitb16(), ON_H100 | {"student.remat": "elementwise"}),
    (
      dataclasses.replace(H100, capability=7.0),
      vitb16(),
      ON_H100 | {"teacher.attention": "xla", "student.attention": "xla"},
    ),
    (
      H100,
      vitb16(student__dtype="float32", batch_size=64),
      ON_H100 | {"student.attention": "xla", "student.stream_dtype": "float32"},
    ),
  ],
)
def test_auto_becomes_what_suits_the_device(device, config, expected):
  before = config.to_dict()
  resolved, chosen = resolve(config, device)
  assert chosen == expected
  assert {key: get(resolved, key) for key in expected} == expected
  assert config.to_dict() == before
  assert resolve(resolved, device) == (resolved, {})


@pytest.mark.parametrize("device", [Device("cpu"), H100], ids=str)
def test_builders_take_a_section_of_a_raw_config(device, monkeypatch):
  """They choose as for the whole config. Without a batch, the memory is taken to be too small."""
  monkeypatch.setattr(Device, "present", lambda: device)
  config = vitb16()
  expected, _ = resolve(config, device)
  with expected.student.ignore_type():
    expected.student.remat = "elementwise"
  assert vit.build(**config.student) == vit.build(**expected.student)
  section = {**config.student, "shared_rel_pos_bias": False}
  assert classifier.build(**section).attention == segmenter.build(**section).attention
  assert classifier.build(**section).attention == expected.student.attention
  morpher = {name: value for name, value in config.morphers.dtm.items() if name != "weight"}
  assert morpher["implementation"] == "auto"
  plugins.build("morphers", morpher)


def test_what_is_given_stays():
  config = vitb16(student__remat="block", student__unroll=3, teacher__attention="xla")
  resolved, chosen = resolve(config, H100)
  assert (resolved.student.remat, resolved.student.unroll, resolved.teacher.attention) == ("block", 3, "xla")
  assert chosen.keys() == ON_H100.keys() - {"student.remat", "student.unroll", "teacher.attention"}


@pytest.mark.parametrize(
  ("device", "changes", "message"),
  [
    (
      Device("cpu"),
      {"teacher__attention": "cudnn"},
      r"teacher.attention=cudnn needs an NVIDIA GPU.* not cpu",
    ),
    (H100, {"student__attention": "cudnn", "student__dtype": "float32"}, "cudnn needs half precision"),
    (dataclasses.replace(H100, count=8), {"student__attention": "pallas"}, "runs on one device, not 8"),
  ],
)
def test_an_implementation_that_cannot_run_is_refused(device, changes, message):
  with pytest.raises(OptionError, match=message):
    resolve(vitb16(**changes), device)


def test_memory_grows_with_the_batch_and_with_kept_logits():
  section = dict(vitb16().student, attention="cudnn", stream_dtype="bfloat16", unroll=1, remat="none")
  needed = partial(device_options.memory_without_remat, image_size=224)
  with_cudnn, parameters = needed(section, batch_size=256), 16 * 86e6
  assert needed(section, batch_size=512) - parameters == pytest.approx(
    2 * (with_cudnn - parameters), rel=0.02
  )
  assert needed(section | {"stream_dtype": "float32"}, batch_size=256) > with_cudnn
  # 12 blocks keep the probabilities of 256 images and 12 heads in bfloat16, at least.
  logits = 12 * 256 * 12 * 197**2 * 2
  assert needed(section | {"attention": "xla"}, batch_size=256) - with_cudnn > 0.9 * logits


@pytest.mark.slow
def test_a_run_moves_from_one_device_to_another(world, one_device, tmp_path, monkeypatch, caplog):
  """What was and is auto may change. The change is named, and the state of the run is the same.

  The steps of the first device only count, because other tests make them. Those of the second are real.
  """

  def run(steps, device):
    monkeypatch.setattr(Device, "present", lambda: device)
    config = debug_config(world, total_steps=steps, total_examples=None, evals={})
    del config.morphers["tokens"]
    config.student.update(attention="auto", stream_dtype="auto", remat="auto")
    with config.student.ignore_type():
      config.student.unroll = "auto"
    loop.train(config, str(tmp_path))
    assert config.student.remat == "auto"
    return json.loads((tmp_path / "config.json").read_text())

  with monkeypatch.context() as patch:
    patch.setattr(pretrain.Pretraining, "train_step", counting_step())
    on_cpu = run(2, Device("cpu"))
  depth = on_cpu["student"].get("depth", 12)
  assert (on_cpu["student"]["remat"], on_cpu["student"]["unroll"]) == ("elementwise", 1)
  assert on_cpu["starts"][-1]["auto"] == sorted(AS_BEFORE)
  caplog.clear()
  on_gpu = run(4, Device("gpu", "old", memory=GIB, capability=7.0))
  assert (on_gpu["student"]["remat"], on_gpu["student"]["unroll"]) == ("none", depth)
  changed = {"student.remat", "student.unroll", "morphers.dtm.implementation", "total_steps"}
  assert set(on_gpu["starts"][-1]["changes"]) == changed
  assert "--config.student.remat: 'elementwise' -> 'none' (auto; devices: " in caplog.text
  assert losses(tmp_path)[2] == 0 < losses(tmp_path)[4]


@pytest.mark.slow
@pytest.mark.long  # the test below compares outputs and gradients of such a tower
def test_bfloat16_streams_stay_near_float32(world):
  """The loss and the gradient norm of ten steps: everything in float32, and as on a GPU."""

  def ten_steps(dtype, initial=None):
    config = debug_config(world)
    del config.morphers["tokens"]
    config.student.update(dtype=dtype, stream_dtype=dtype)
    config.teacher.update(dtype=dtype, stream_dtype=dtype)
    task = pretrain.build(config, Run(10, 5.0, 8))
    step, state = jax.jit(task.train_step), initial or jax.jit(task.init)(jax.random.key(0))
    image = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    initial, measured = state, []
    for _ in range(10):
      state, measurements = step(state, task.frozen, {"image": image}, jax.random.key(1))
      measured.append([measurements["loss"], measurements["grad_norm"]])
    assert all(leaf.dtype != jax.numpy.bfloat16 for leaf in jax.tree.leaves(state))
    return np.array(measured), initial

  exact, initial = ten_steps("float32")
  rough, _ = ten_steps("bfloat16", initial)
  error = np.abs(rough / exact - 1).max(axis=0)
  assert 1e-7 < error[0] < 0.01, error
  assert error[1] < 0.05, error


def test_layer_norm_statistics_and_outputs_are_float32():
  """A stream with a large mean: statistics in bfloat16 would be wrong by far more than its rounding."""
  sizes = {"patch_size": 4, "width": 64, "depth": 1, "num_heads": 1}
  model = vit.VisionTransformer(**sizes, dtype="bfloat16", stream_dtype="bfloat16")
  image = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
  params = jax.jit(model.init)(jax.random.key(0), image)["params"]
  params["cls_token"] += 100.0
  outputs = jax.jit(model.apply)({"params": params}, image)
  assert all(each.dtype == np.float32 for each in outputs.values())
  float32 = vit.VisionTransformer(**sizes)
  exact = jax.jit(float32.apply)({"params": params}, image)
  np.testing.assert_allclose(outputs["patches"], exact["patches"], atol=0.1)

  weight = jax.random.normal(jax.random.key(2), exact["patches"].shape)
  loss = lambda params, each: (weight * each.apply({"params": params}, image)["patches"]).sum()
  norm = jax.jit(lambda params, each: optax.global_norm(jax.grad(loss)(params, each)), static_argnums=1)
  np.testing.assert_allclose(norm(params, model), norm(params, float32), rtol=0.05)
