"""Show how much of some long work is done, and how long the rest will take.

    for batch in track(batches, "Evaluating on 'cifar10'", total=391, unit="batches"): ...

    with Progress("Writing shards", 1024, "shards") as progress:
      for number, shard in enumerate(shards, start=1):
        write(shard)
        progress(number)

On a terminal this is a bar of tqdm on stderr. Everywhere else, such as in a file, at most one line of the log
comes every `EVERY` seconds, so short work logs nothing:

    Evaluating on 'cifar10': 120 of 391 batches, about 40 s left.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeVar

from absl import logging

EVERY = 15.0
"""Seconds between two lines."""

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]"
_WITHOUT_TOTAL = "{desc}: {n_fmt} {unit} [{elapsed}{postfix}]"
_WAITING = "{desc} ... {elapsed}"
_DELAY = 0.5
"""Shorter work shows no bar."""
_TICK = 0.5
"""Seconds between two updates of a clock."""

T = TypeVar("T")
_lines_only = False


def only_lines() -> None:
  """Show no bars in this process. Process 0 of a cluster shows them for all."""
  global _lines_only
  _lines_only = True


def on_terminal() -> bool:
  """Return whether bars are shown: stderr is a terminal that can move its cursor."""
  return not _lines_only and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Progress:
  """A function of the amount done. It updates the bar, or logs a line if one is due.

  Use it in a `with` statement, or call `close` at the end. A bar that reaches its total closes itself.

  Args:
    what: names the work, as the start of a sentence.
    total: the whole amount. None means that it is not known; no time is shown then.
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
    self._bar = None
    if on_terminal():
      style = _WITHOUT_TOTAL if total is None else _BAR
      self._bar = _Bar(desc=what, total=total, unit=unit, initial=done, bar_format=style)

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def __call__(self, done: int) -> None:
    """Show the amount `done`. Off a terminal, log a line if one is due."""
    if self._bar is not None:
      self._bar.move_to(done)
      if done == self._total:
        self.close()
      return
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

  def note(self, text: str) -> None:
    """Show this text behind the bar from now on, such as "loss 0.31". No line gets it."""
    if self._bar is not None:
      self._bar.note(text)

  def close(self, done: int | None = None) -> None:
    """Leave the bar as it is, or at the amount `done`, on a line of its own."""
    if self._bar is not None:
      if done is not None:
        self._bar.move_to(done)
      self._bar.close()
      self._bar = None


class _Bar:
  """A bar of tqdm. While it is open, lines of the log are written above it."""

  _open: ClassVar[list["_Bar"]] = []

  def __init__(self, **options: Any):
    from tqdm import tqdm  # type: ignore[import-untyped]  # only a terminal needs it

    # leave=None: a bar inside another one vanishes at its end, and the outer one stays.
    options = {"leave": None, "delay": _DELAY, "miniters": 1, "mininterval": 0.2} | options
    self._tqdm = tqdm(file=sys.stderr, dynamic_ncols=True, **options)
    handler = logging.get_absl_handler().python_handler
    if not _Bar._open:

      def emit_above_bars(record: Any, emit: Any = handler.emit) -> None:
        with tqdm.get_lock():
          shown = [bar for bar in _Bar._open if bar.shown]
          for bar in shown:
            bar._tqdm.clear(nolock=True)
          emit(record)
          for bar in shown:
            bar._tqdm.refresh(nolock=True)

      handler.emit = emit_above_bars  # type: ignore[method-assign]
    _Bar._open.append(self)

  @property
  def shown(self) -> bool:
    """Whether the bar is on the terminal. It waits for `_DELAY` seconds."""
    bar = self._tqdm
    return bar.delay <= 0 or bar.last_print_t >= bar.start_t + bar.delay

  def move_to(self, done: int) -> None:
    self._tqdm.update(done - self._tqdm.n)

  def note(self, text: str) -> None:
    self._tqdm.set_postfix_str(text, refresh=False)

  def refresh(self) -> None:
    self._tqdm.refresh()

  def close(self) -> None:
    self._tqdm.close()
    _Bar._open.remove(self)
    if not _Bar._open:
      del logging.get_absl_handler().python_handler.emit


def track(items: Iterable[T], what: str, total: int | None = None, unit: str = "items") -> Iterator[T]:
  """Yield the items, and show how many have been taken. See `Progress` for the arguments."""
  with Progress(what, total, unit) as progress:
    done = 0
    for done, item in enumerate(items, start=1):
      progress(done - 1)
      yield item
    progress.close(done)


@contextlib.contextmanager
def waiting(what: str, every: float = EVERY) -> Iterator[None]:
  """Show for how long the `with` block runs: by a clock on a terminal, or by a line every `every` seconds.

  A line at the end says how long it took. Off a terminal, another line at the beginning names the work.
  """
  start, finished = time.perf_counter(), threading.Event()
  bar = _Bar(desc=what, bar_format=_WAITING, leave=False, delay=0.0) if on_terminal() else None

  def show_time() -> None:
    while not finished.wait(every if bar is None else _TICK):
      if bar is not None:
        bar.refresh()
      else:
        logging.info("%s: %s so far.", what, duration(time.perf_counter() - start))

  if bar is None:
    logging.info("%s ...", what)
  thread = threading.Thread(target=show_time, daemon=True)
  thread.start()
  try:
    yield
  finally:
    finished.set()
    thread.join()
    if bar is not None:
      bar.close()
  logging.info("%s took %s.", what, duration(time.perf_counter() - start))


def duration(seconds: float) -> str:
  """Return a time for people: "40 s", "12 min", "3.5 h"."""
  if seconds < 10:
    return f"{seconds:.1f} s"
  if seconds < 120:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
