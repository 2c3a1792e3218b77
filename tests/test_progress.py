"""Test the log lines about long work: when they come, and what they say."""

import time

import pytest
from absl import logging

from dtm_jax import data, progress


class Clock:
  """A clock that advances by `step` seconds at each reading."""

  def __init__(self, step=1.0):
    self.now, self.step = 0.0, step

  def __call__(self):
    self.now += self.step
    return self.now


@pytest.fixture
def lines(monkeypatch):
  said = []
  monkeypatch.setattr(logging, "info", lambda text, *args: said.append(text % args))
  return said


def test_lines_come_from_time_to_time_with_the_time_left(lines, monkeypatch):
  monkeypatch.setattr(time, "perf_counter", Clock())
  assert list(progress.track(range(100), "Reading", 100, "images")) == list(range(100))
  assert lines[0] == "Reading: 14 of 100 images, about 92 s left."
  assert len(lines) == 6


def test_without_a_total_only_the_amount_is_logged(lines, monkeypatch):
  monkeypatch.setattr(time, "perf_counter", Clock(20.0))
  list(progress.track(range(3), "Listing photos", unit="images"))
  assert lines == [f"Listing photos: {n} images so far." for n in range(3)]


def test_short_work_says_nothing(lines):
  list(progress.track(range(100), "Reading", 100))
  assert lines == []


def test_a_resumed_count_does_not_make_the_rest_look_short(lines, monkeypatch):
  monkeypatch.setattr(time, "perf_counter", Clock(10.0))
  report = progress.Progress("Training", 100, "steps", done=90)
  report(91)
  report(92)
  assert lines == ["Training: 92 of 100 steps, about 80 s left."]


def test_silent_work_is_named_and_timed(lines):
  with progress.waiting("Fetching", every=0.02):
    time.sleep(0.1)
  assert lines[0] == "Fetching ..."
  assert any("so far" in line for line in lines)
  assert lines[-1].startswith("Fetching took")


@pytest.mark.parametrize(
  ("seconds", "text"), [(0.5, "0.5 s"), (60.0, "60 s"), (600.0, "10 min"), (9000.0, "2.5 h")]
)
def test_durations_are_readable(seconds, text):
  assert progress.duration(seconds) == text


def test_evaluations_log_their_progress(lines, monkeypatch):
  """The lines count the batches that are read; a limit makes them fewer."""
  import numpy as np

  class Source:
    def __len__(self):
      return 40

    def __getitem__(self, index):
      return {"image": np.zeros((8, 8, 3), np.uint8), "label": 0, "name": str(index)}

  monkeypatch.setattr(progress, "EVERY", 0.0)
  dataset = data.Dataset("black", 40, ("one",), Source())
  batches = list(data.eval_batches(dataset, batch_size=8, image_size=8, max_batches=3, num_threads=1))
  assert [batch["index"].tolist()[0] for batch in batches] == [0, 8, 16]
  assert lines[-1].startswith("Evaluating on 'black': 2 of 3 batches, about")
