"""`--fast` selects quick tests of every file, and slow files come first."""

import pytest
import seconds


class Item:
  """The part of a pytest item that the order depends on."""

  def __init__(self, file, test, slow=False):
    self.nodeid = f"tests/{file}::{test}"
    self.slow = slow

  def get_closest_marker(self, name):
    return self if self.slow and name == "slow" else None


def names(items):
  return [item.nodeid.removeprefix("tests/") for item in items]


@pytest.fixture(autouse=True)
def known(monkeypatch):
  measured = {"test_a.py": {"slow": 30.0, "middle": 1.0, "more": 0.8}, "test_b.py": {"slow": 40.0}}
  monkeypatch.setattr(seconds, "_known", measured)
  monkeypatch.setattr(seconds, "FAST_PART", 1.0)


def test_the_quickest_tests_of_a_file_keep_their_order():
  tests = [Item("test_a.py", test) for test in ("slow", "more", "middle", "quick")]
  assert names(seconds._quickest(tests)) == ["test_a.py::more", "test_a.py::quick"]


def test_an_unknown_test_is_slow_if_it_is_marked():
  tests = [Item("test_c.py", "marked", slow=True), Item("test_c.py", "other")]
  assert names(seconds._quickest(tests)) == ["test_c.py::other"]


def test_each_worker_begins_with_a_slow_file():
  quick = [Item("test_c.py", str(number)) for number in range(6)]
  files = [quick, [Item("test_a.py", "slow")], [Item("test_b.py", "slow")]]
  ordered = names(seconds._slow_files_first(files, workers=2))
  assert sorted(ordered) == sorted(names(item for file in files for item in file))
  assert (ordered[0], ordered[4]) == ("test_b.py::slow", "test_a.py::slow")
  assert names(seconds._slow_files_first(files, workers=1))[:2] == ["test_b.py::slow", "test_a.py::slow"]
