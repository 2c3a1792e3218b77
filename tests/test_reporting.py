"""What a run says of itself: windows, compilations and the lines of metrics.jsonl."""

import json
import time

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from dtm_jax.records import reporting
from dtm_jax.records.compilations import CompilationCounter, warn_of_recompilation
from dtm_jax.records.metrics import Metrics
from dtm_jax.records.step_window import StepWindow


def test_a_window_averages_and_forgets():
  window = StepWindow(batch_size=10)
  with window.waiting():
    time.sleep(0.02)
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


def test_compilations_are_counted_inside_only():
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


def test_a_recompilation_is_warned_of(caplog):
  with caplog.at_level("WARNING", logger="absl"):
    warn_of_recompilation(12, 2)
  assert "step 12" in caplog.text


@pytest.mark.parametrize("first_step", [None, 3])
def test_a_profile_is_made_only_when_asked(tmp_path, first_step):
  profile = reporting.make_profile(epath.Path(tmp_path), first_step, num_steps=1)
  for step in range(1, 7):
    jax.jit(jnp.sin)(jnp.ones(2)).block_until_ready()
    profile(step)
  assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (first_step is not None)
