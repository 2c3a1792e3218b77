"""Test the reports of a run: windows of steps, compilations, metrics.jsonl and TensorBoard."""

import json
import time

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from dtm_jax.records import reporting
from dtm_jax.records.compilations import CompilationCounter, warn_of_recompilation
from dtm_jax.records.metrics import Metrics
from dtm_jax.records.step_window import StepWindow


def test_a_window_averages_and_forgets():
  window = StepWindow(batch_size=10)
  slow = (time.sleep(0.02) for _ in range(1))
  assert list(window.waiting_for(slow)) == [None]
  window.add({"loss": jnp.float32(1)})
  window.add({"loss": jnp.float32(3), "extra": jnp.float32(5)})
  summary = window.summary()
  assert (summary["loss"], summary["extra"]) == (2, 5)
  assert 0 < summary["input_wait"] <= 1
  assert summary["images_per_sec"] < 20 / 0.02
  window.reset()
  assert len(window) == 0
  window.add({"loss": jnp.float32(7)})
  assert window.summary()["loss"] == 7
  assert window.summary()["input_wait"] == 0


def test_a_window_counts_the_steps_of_calls():
  window = StepWindow(batch_size=10)
  window.add({"loss": jnp.arange(3.0)}, 3)
  window.add({"loss": jnp.float32(9)})
  assert (len(window), window.summary()["loss"]) == (4, 3)


def test_compilations_are_counted_only_inside_the_block():
  counter = CompilationCounter()
  step = jax.jit(lambda x: x * 3 + 1)
  jax.jit(lambda x: x - 17)(jnp.ones(3))  # outside
  assert counter.count == 0
  for size in (3, 3, 3):
    x = jnp.ones(size)
    with counter:
      step(x)
  assert counter.count == 1
  assert counter.grew()
  assert not counter.grew()
  other = jnp.ones(4)
  with counter:
    step(other)
  assert counter.grew()
  counter.close()
  third = jnp.ones(5)
  with counter:
    step(third)
  assert counter.count == 2


def test_metrics_are_json_lines_across_resumes(tmp_path):
  for step, loss in ((1, 0.5), (2, 0.25)):
    metrics = Metrics(epath.Path(tmp_path))
    metrics.go_on_from(step - 1)
    metrics.write(step, {"loss": loss})
    metrics.close()
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
  assert list(tmp_path.glob("events.out.tfevents.*"))


def curve(folder, name):
  """Return the steps and values that TensorBoard shows. Its pages read logs with this accumulator."""
  log = EventAccumulator(str(folder)).Reload()
  return [(event.step, round(float(make_ndarray(event.tensor_proto)), 4)) for event in log.Tensors(name)]


def write_steps(folder, losses, start=-1, **options):
  """Write the losses of one start of a run, which goes on from step `start`."""
  metrics = Metrics(epath.Path(folder))
  metrics.go_on_from(start, **options)
  for step, loss in enumerate(losses, start=max(start, 0) + 1):
    metrics.write(step, {"loss": loss})
  metrics.close()


def test_tensorboard_shows_one_value_a_step_after_resumes(tmp_path):
  write_steps(tmp_path, [1.0, 2.0, 3.0, 4.0])
  write_steps(tmp_path, [3.5, 4.5, 5.5], start=2)
  assert curve(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5), (5, 5.5)]
  write_steps(tmp_path, [2.25], start=1)
  assert curve(tmp_path, "loss") == [(1, 1.0), (2, 2.25)]
  write_steps(tmp_path, [7.0])
  assert curve(tmp_path, "loss") == [(1, 7.0)]


def test_tensorboard_forgets_evaluations_that_run_again(tmp_path):
  for value in (0.25, 0.5):
    metrics = Metrics(epath.Path(tmp_path))
    metrics.go_on_from(0, again=["knn"])
    metrics.write(0, {"knn/accuracy": value}, evaluator="knn")
    if value == 0.25:
      metrics.write(0, {"other/accuracy": 0.75}, evaluator="other")
    metrics.close()
  assert curve(tmp_path, "knn/accuracy") == [(0, 0.5)]
  assert curve(tmp_path, "other/accuracy") == [(0, 0.75)]


def test_a_log_of_older_versions_without_session_starts_is_purged_too(tmp_path, monkeypatch):
  monkeypatch.setattr(reporting, "_write_restart", lambda *_: None)
  write_steps(tmp_path, [1.0, 2.0, 3.0])
  monkeypatch.undo()
  time.sleep(1.1)  # TensorBoard reads files in the order of their names, which hold the second
  write_steps(tmp_path, [9.0], start=2)
  assert curve(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_a_recompilation_is_warned_of(caplog):
  with caplog.at_level("WARNING", logger="absl"):
    warn_of_recompilation(12, 2)
  assert "step 12" in caplog.text


@pytest.mark.parametrize("first_step", [None, 3])
def test_a_profile_is_made_only_on_request(tmp_path, first_step):
  profile = reporting.make_profile(epath.Path(tmp_path), first_step, num_steps=1)
  for step in range(1, 7):
    jax.jit(jnp.sin)(jnp.ones(2)).block_until_ready()
    profile(step)
  assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (first_step is not None)
