"""Test the messages between processes, with process 0 and process 1 in turn played by this process."""

import pytest

from dtm_jax import processes
from dtm_jax.errors import OptionError, UserError


@pytest.fixture
def cluster(monkeypatch):
  """Return a function that runs `from_first_process(function)` as process 0 and then as process 1."""
  sent = []

  def gather(value):
    sent.append(value)
    return [sent[0], value]

  def play(function):
    found = []
    for index in range(2):
      monkeypatch.setattr(processes.jax, "process_index", lambda index=index: index)
      try:
        found.append(processes.from_first_process(function))
      except Exception as error:
        found.append(error)
    return found

  monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes, "gather", gather)
  return play


def test_process_0_decides_for_all(cluster):
  answers = iter([["of process 0"], ["of process 1"]])
  assert cluster(lambda: next(answers)) == [["of process 0"], ["of process 0"]]


def test_every_process_raises_the_error_of_process_0_with_its_notes(cluster):
  def refuse():
    error = OptionError("The folder is empty.")
    error.add_note("This concerns --config.data.dataset.data_dir=photos.")
    raise error

  first, second = cluster(refuse)
  assert isinstance(first, OptionError)
  assert isinstance(second, UserError)
  assert str(first) == str(second) == "The folder is empty."
  assert first.__notes__ == second.__notes__ == ["This concerns --config.data.dataset.data_dir=photos."]


def test_a_failure_of_process_0_ends_all(cluster):
  def fail():
    raise ZeroDivisionError("division by zero")

  first, second = cluster(fail)
  assert isinstance(first, ZeroDivisionError)
  assert str(second) == "Process 0 failed: ZeroDivisionError: division by zero"


def test_a_process_on_its_own_gets_what_json_would_hold():
  assert processes.gather((1, "a")) == [[1, "a"]]
  assert processes.from_first_process(lambda: (1, None)) == [1, None]
