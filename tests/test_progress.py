"""Test bars on a terminal, and elsewhere the log lines about long work: when they come, and what they say."""

import os
import pty
import re
import subprocess
import sys
import termios
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


# On a terminal -------------------------------------------------------------------------------------------

PROGRAM = """
import time
from absl import app, logging
from dtm_jax import progress
progress._DELAY = {delay}

def main(_):
  {body}
  logging.info("The end.")

app.run(main)
"""
READ = """for n in progress.track(range(8), "Reading", 8, "images"):
    if n == 4: logging.info("Image %d is large.", n)"""
FAIL = """for n in progress.track(range(8), "Reading", 8, "images"):
    if n == 4: raise SystemExit("No image 4.")"""
TRAIN = """with progress.Progress("Training", 20, "steps", done=10) as report:
    for step in range(11, 21):
      for _ in progress.track(range(3), "Evaluating", 3, "batches"): pass
      report.note(f"loss {1 / step:.4f}, 530 images/s")
      report(step)"""
STOP = """with progress.Progress("Training", 20, "steps", done=10) as report:
    report(12)
    time.sleep(0.25)
    report(15)"""
WAIT = """with progress.waiting("Fetching"):
    time.sleep(0.7)
    logging.info("It is slow.")"""


def command(body, delay=0.0):
  return [sys.executable, "-c", PROGRAM.format(body=body, delay=delay)]


def on_terminal(body, *, delay=0.0, **environment):
  """Return the bytes that a program writes to a terminal of 80 columns, as text."""
  master, slave = pty.openpty()
  termios.tcsetwinsize(slave, (24, 80))
  environment = {**os.environ, "TERM": "xterm", **environment}
  with subprocess.Popen(command(body, delay), stderr=slave, stdout=slave, env=environment):
    os.close(slave)
    written = b""
    try:
      while some := os.read(master, 65536):
        written += some
    except OSError:  # the terminal's way to say that the program has ended
      pass
  os.close(master)
  return written.decode()


def screen(text):
  """Return the lines that a terminal shows after this text. It obeys \\r, \\n and the cursor's way up."""
  lines, row, column = [""], 0, 0
  for part in re.findall(r"\x1b\[A|[\r\n]|[^\r\n\x1b]+", text):
    if part == "\x1b[A":
      row -= 1
    elif part == "\r":
      column = 0
    elif part == "\n":
      row += 1
      lines += [""] * (row + 1 - len(lines))
    else:
      lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + len(part) :]
      column += len(part)
  return [line.rstrip() for line in lines]


def said(line):
  """Return the text of a log line, without its date and place."""
  return line.partition("] ")[2]


def test_a_bar_ends_complete_below_the_lines_of_the_log():
  lines = screen(on_terminal(READ))
  assert said(lines[0]) == "Image 4 is large."
  assert re.fullmatch(r"Reading: 100%\|█+\| 8/8 images \[00:00<00:00\]", lines[1])
  assert said(lines[2]) == "The end."
  assert lines[3:] == [""]


def test_a_bar_inside_another_one_vanishes():
  lines = screen(on_terminal(TRAIN))
  assert re.fullmatch(
    r"Training: 100%\|█+\| 20/20 steps \[00:00<00:00, loss 0.0500, 530 images/s\]", lines[0]
  )
  assert [said(lines[1]), *lines[2:]] == ["The end.", ""]


def test_an_error_leaves_the_bar_on_a_line_of_its_own():
  lines = screen(on_terminal(FAIL))
  assert re.fullmatch(r"Reading:  50%\|█+.? +\| 4/8 images \[00:00<.*\]", lines[0])
  assert lines[1:] == ["No image 4.", ""]


def test_a_resumed_bar_begins_where_it_stopped_and_may_end_early():
  lines = screen(on_terminal(STOP))
  assert re.fullmatch(r"Training:  75%\|█+.? +\| 15/20 steps \[00:00<00:00\]", lines[0])


def test_a_clock_runs_while_one_waits():
  text = on_terminal(WAIT)
  assert "Fetching ... 00:00" in text
  lines = screen(text)
  assert said(lines[0]) == "It is slow."
  assert said(lines[1]).startswith("Fetching took 0.")
  assert said(lines[2]) == "The end."


def test_short_work_shows_no_bar():
  lines = screen(on_terminal(READ, delay=5.0))
  assert [said(line) for line in lines] == ["Image 4 is large.", "The end.", ""]


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {}])
def test_bars_have_no_colours(environment):
  assert not re.search(r"\x1b\[[\d;]*m", on_terminal(TRAIN, **environment))


def test_a_dumb_terminal_gets_lines():
  text = on_terminal(READ + '\n  with progress.waiting("Fetching"): pass', TERM="dumb").replace("\r\n", "\n")
  assert "\r" not in text
  assert "\x1b" not in text
  ours = [said(line) for line in text.splitlines()]
  assert ours[:2] == ["Image 4 is large.", "Fetching ..."]


@pytest.mark.parametrize("body", [READ, TRAIN, WAIT])
def test_a_file_gets_lines(tmp_path, body):
  path = tmp_path / "log.txt"
  with path.open("wb") as file:
    subprocess.run(command("progress.EVERY = 0.0\n  " + body), stderr=file, check=True)
  text = path.read_bytes().decode()
  assert "\r" not in text
  assert "\x1b" not in text
  assert said(text.splitlines()[-1]) == "The end."
  assert "█" not in text


def test_other_processes_of_a_cluster_show_no_bars(monkeypatch):
  monkeypatch.setattr(sys, "stderr", type("Terminal", (), {"isatty": lambda self: True})())
  monkeypatch.setenv("TERM", "xterm")
  assert progress.on_terminal()
  monkeypatch.setattr(progress, "_lines_only", False)
  progress.only_lines()
  assert not progress.on_terminal()
