"""Log how much of some long work is done, and how long the rest will take.

    for batch in track(batches, "Evaluating on 'cifar10'", total=391, unit="batches"): ...

    Evaluating on 'cifar10': 120 of 391 batches, about 40 s left.

At most one line comes every `EVERY` seconds, so short work logs nothing.
"""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from absl import logging

EVERY = 15.0
"""Seconds between two lines."""

T = TypeVar("T")


class Progress:
  """A function of the amount done. It logs a line if one is due.

  Args:
    what: names the work, as the start of a sentence.
    total: the whole amount. None means that it is not known; the lines then give no time.
    unit: of the amount, in the plural.
    done: the amount done before this process started.
    every: seconds between two lines. None means `EVERY`.
  """

  def __init__(
    self,
    what: str,
    total: int | None = None,
    unit: str = "items",
    *,
    done: int = 0,
    every: float | None = None,
  ):
    self._what, self._total, self._unit = what, total, unit
    self._every = EVERY if every is None else every
    self._start, self._from = time.perf_counter(), done
    self._last = self._start

  def __call__(self, done: int) -> None:
    """Log a line with the amount `done` if one is due."""
    now = time.perf_counter()
    if now - self._last < self._every:
      return
    self._last = now
    if self._total is None:
      logging.info("%s: %s %s so far.", self._what, f"{done:,}", self._unit)
      return
    rate = (done - self._from) / (now - self._start)
    left = f", about {duration((self._total - done) / rate)} left" if rate > 0 else ""
    logging.info("%s: %s of %s %s%s.", self._what, f"{done:,}", f"{self._total:,}", self._unit, left)


def track(items: Iterable[T], what: str, total: int | None = None, unit: str = "items") -> Iterator[T]:
  """Yield the items, and log how many have been taken. See `Progress` for the arguments."""
  progress = Progress(what, total, unit)
  for done, item in enumerate(items):
    progress(done)
    yield item


@contextlib.contextmanager
def waiting(what: str, every: float = EVERY) -> Iterator[None]:
  """Log `what` at once, and then every `every` seconds how long the `with` block has taken so far."""
  start, finished = time.perf_counter(), threading.Event()

  def log_time() -> None:
    while not finished.wait(every):
      logging.info("%s: %s so far.", what, duration(time.perf_counter() - start))

  logging.info("%s ...", what)
  thread = threading.Thread(target=log_time, daemon=True)
  thread.start()
  try:
    yield
  finally:
    finished.set()
    thread.join()
  logging.info("%s took %s.", what, duration(time.perf_counter() - start))


def duration(seconds: float) -> str:
  """Return a time for people: "40 s", "12 min", "3.5 h"."""
  if seconds < 10:
    return f"{seconds:.1f} s"
  if seconds < 120:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
