"""Count the compilations of the train step. More than one in a run means that shapes change."""

import jax.monitoring
from absl import logging

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompilationCounter:
  """Counts XLA compilations inside its `with` blocks.

  Attributes:
    count: compilations so far.
  """

  def __init__(self) -> None:
    self.count = 0
    self._seen = 0
    self._watching = False
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
    if self._watching and event == _EVENT:
      self.count += 1

  def __enter__(self) -> "CompilationCounter":
    self._watching = True
    return self

  def __exit__(self, *_: object) -> None:
    self._watching = False

  def grew(self) -> bool:
    """Return whether there are new compilations since the last call."""
    self._seen, seen = self.count, self._seen
    return self.count > seen

  def close(self) -> None:
    """Stop listening."""
    jax.monitoring.unregister_event_duration_listener(self._listen)


def warn_of_recompilation(step: int, count: int) -> None:
  """Log that the train step was compiled again, which no step but the first should need."""
  logging.warning(
    "The train step was compiled again at step %d (%d compilations so far): some shape or static value "
    "changes between steps.",
    step,
    count,
  )
