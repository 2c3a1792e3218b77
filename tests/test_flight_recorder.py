"""Test what happens if a loss, gradient or state is not finite: the message, the recording, the replay."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world
from etils import epath
from ml_collections import ConfigDict
from shared_programs import SharedPrograms

from dtm_jax import loop
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.errors import NotThereError, UserError
from dtm_jax.models.vit import model as vit
from dtm_jax.records.flight_recorder import FlightRecorder, NonFiniteError
from dtm_jax.records.recording import read_recording
from dtm_jax.tasks import linear_probe, pretrain
from dtm_jax.training import finiteness

CONFIG = ConfigDict({"seed": 3, "log": {"flight_recorder": True}, "replay": None})
META = {"batch_size": 2, "examples": 0, "first_batch_size": 2}


def toy_step(state, batch, loss):
  return state | {"w": state["w"] * 2, "step": state["step"] + 1}, {"loss": loss, "grad_norm": jnp.float32(1)}


def toy_run(workdir, values, config=CONFIG, may_diverge=None):
  """Run steps with a recorder in windows of two. Each value is a loss, or an array to put into the state."""
  step_fn = jax.jit(toy_step, donate_argnums=0)
  state = {"w": jnp.ones(3), "step": jnp.int32(0)}
  recorder = FlightRecorder(epath.Path(workdir), config, may_diverge=may_diverge)
  recorder.keep(state, META)
  for step, value in enumerate(values, start=1):
    if isinstance(value, np.ndarray):
      state["w"], value = jnp.asarray(value), 0.5
    state, measured = step_fn(state, {}, jnp.float32(value))
    recorder.add([step], {"index": jnp.array([step, step + 1])}, measured)
    if step % 2 == 0:
      recorder.close_window(state, META)
  return state


def test_the_first_bad_step_and_the_steps_before_it_are_kept(tmp_path):
  """The window has later bad steps too. The kept state is the last good one, although the run donated it."""
  with pytest.raises(NonFiniteError, match=r"loss became nan at step 5, within steps \[5, 6\]") as error:
    toy_run(tmp_path, [1, 1, 2, 3, np.nan, np.inf])
  folder = tmp_path / "flight" / "5"
  assert f"--config.replay={folder}" in str(error.value)
  assert isinstance(error.value, UserError)
  assert isinstance(error.value, FloatingPointError)
  recording = read_recording(epath.Path(folder))
  assert (recording.start, recording.seed) == (4, 3)
  assert [step["step"] for step in recording.steps] == [5, 6]
  assert [step["index"] for step in recording.steps] == [[5, 6], [6, 7]]
  assert [step["measurements"]["loss"] for step in recording.steps] == ["nan", "inf"]
  json.loads((folder / "window.json").read_text(), parse_constant=lambda name: pytest.fail(name))  # strict
  checkpoints = Checkpoints(str(folder / "state"))
  abstract = {"w": jax.ShapeDtypeStruct((3,), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
  state, meta, step = checkpoints.restore(abstract)
  checkpoints.close()
  np.testing.assert_array_equal(state["w"], np.full(3, 16.0))
  assert (step, meta["batch_size"]) == (4, 2)


def test_a_second_recording_of_the_same_step_replaces_nothing(tmp_path):
  for _ in range(2):
    with pytest.raises(NonFiniteError):
      toy_run(tmp_path, [np.nan, 1])
  assert sorted(path.name for path in (tmp_path / "flight").iterdir()) == ["1", "1-2"]


def test_a_state_that_is_not_finite_is_named_although_the_losses_are_finite(tmp_path):
  bad = np.array([1, np.inf, 1], np.float32)
  with pytest.raises(NonFiniteError, match=r"After step 4 the state is not finite.*\[3, 4\]: w\."):
    toy_run(tmp_path, [1, 1, 1, bad])
  toy_run(tmp_path / "allowed", [1, 1, 1, bad], may_diverge="w")


def test_without_the_recorder_the_run_stops_too(tmp_path):
  config = CONFIG.copy_and_resolve_references()
  config.log.flight_recorder = False
  with pytest.raises(NonFiniteError, match=r"step 2.*flight_recorder=True"):
    toy_run(tmp_path, [1, np.nan], config)
  assert not (tmp_path / "flight").exists()


def test_a_folder_without_a_recording_names_recordings_nearby(tmp_path):
  with pytest.raises(NonFiniteError):
    toy_run(tmp_path, [np.nan, 1])
  with pytest.raises(NotThereError, match=r"flight/1"):
    read_recording(epath.Path(tmp_path))
  with pytest.raises(NotThereError, match="writes a recording"):
    read_recording(epath.Path(tmp_path / "nowhere"))


def test_the_watch_names_module_and_layer():
  """Check forward pass, input and gradient under jit, grad, scan and remat."""
  model = vit.build("Ti", width=16, depth=3, num_heads=2, patch_size=8, remat="block", out_dim=4)
  params = jax.jit(lambda key: vit.init(model, key, 16))(jax.random.key(0))
  image = np.ones((2, 16, 16, 3), np.float32)

  def step(params, image, factor):
    loss = lambda params: (model.apply({"params": params}, image)["prediction"] * factor).sum()
    value, grads = jax.value_and_grad(loss)(params)
    return value, finiteness.watch_gradients(grads)

  with finiteness.Watch() as watch:
    step = jax.jit(step)
    step(params, image, 1.0)
    assert watch.first_module() is None
    assert watch.gradients() == []

    watch.clear()
    bad = jax.tree.map(jnp.copy, params)
    bad["blocks"]["mlp"]["fc1"]["kernel"] = bad["blocks"]["mlp"]["fc1"]["kernel"].at[1, 0, 0].set(jnp.inf)
    step(bad, image, 1.0)
    assert watch.first_module() == finiteness.Place("VisionTransformer/blocks/mlp/fc1", 1, True)

    watch.clear()
    image[1, 3, 3, 0] = np.nan
    step(params, image, 1.0)
    assert watch.first_module() == finiteness.Place("VisionTransformer/patch_embed/proj", None, False)

    watch.clear()
    step(params, np.ones_like(image), np.inf)
    assert watch.first_module() is None
    assert watch.gradients()[0].name.startswith("head/")
  assert finiteness.nonfinite({"params": bad}) == [finiteness.Place("params/blocks/mlp/fc1/kernel", 1)]


def test_the_recorder_changes_no_number_and_compiles_nothing_more(world, tmp_path):
  programs = SharedPrograms()
  for name in ("with", "without"):
    config = small_world.probe_config(world, evals={}, log__flight_recorder=name == "with")
    programs.train(config, str(tmp_path / name))
  assert small_world.losses(tmp_path / "with") == small_world.losses(tmp_path / "without")
  assert {line["compilations"] for line in small_world.metrics(tmp_path / "with")} == {1}
  assert not (tmp_path / "with" / "flight").exists()


@pytest.mark.slow
def test_a_huge_rate_is_replayed_and_nothing_bad_is_saved(world, tmp_path, monkeypatch):
  """The update of step 1 breaks the state, and the replay says so."""
  build = linear_probe.build
  strict = lambda *args: dataclasses.replace(build(*args), may_diverge=None)
  monkeypatch.setattr(linear_probe, "build", strict)
  config = small_world.probe_config(world, evals={}, optim__lr=3e38, optim__warmup_steps=0)
  config.checkpoint.save_steps = 1
  with pytest.raises(NonFiniteError, match=r"After step 1 the state is not finite"):
    loop.train(config, str(tmp_path))
  assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
  before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file())
  config.replay = str(tmp_path / "flight" / "1")
  finding = loop.replay(config)
  assert (finding.step, finding.kind) == (1, "state")
  assert "loss and gradients are finite" in finding.text
  assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()) == before


@pytest.mark.slow
def test_a_bad_parameter_is_traced_to_its_module(world, one_device, tmp_path, monkeypatch):
  """The run only says that its loss is bad. The replay makes the step, and finds why."""
  original = vit.init

  def broken(model, key, image_size):
    params = original(model, key, image_size)
    kernel = params["blocks"]["attn"]["qkv"]["kernel"]
    return params | {
      "blocks": params["blocks"]
      | {"attn": params["blocks"]["attn"] | {"qkv": {"kernel": kernel.at[1, 0, 0].set(jnp.inf)}}}
    }

  monkeypatch.setattr(vit, "init", broken)
  config = small_world.debug_config(world, evals={})
  config.morphers = {"tokens": {"name": "identity", "weight": 1.0}}  # it compiles the fastest
  with monkeypatch.context() as patch:
    patch.setattr(pretrain.Pretraining, "train_step", small_world.counting_step(jnp.nan))
    with pytest.raises(NonFiniteError, match="loss became nan at step 1"):
      loop.train(config, str(tmp_path))
  config.replay = str(tmp_path / "flight" / "1")
  finding = loop.replay(config)
  assert (finding.kind, str(finding.place)) == ("module", "VisionTransformer/blocks/attn/qkv, layer 1")
  assert "params/blocks/attn/qkv/kernel, layer 1" in finding.text
  config.seed = 5
  with pytest.raises(UserError, match="other examples"):
    loop.replay(config)
