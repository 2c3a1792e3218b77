"""Make the steps of a run, and log and count what this compiles."""

from collections.abc import Callable, Mapping

import jax

from dtm_jax.arrays import Array, PyTree
from dtm_jax.records.compilations import CompilationCounter, warn_of_recompilation
from dtm_jax.records.step_window import StepWindow
from dtm_jax.training.feeds import Call, Feed
from dtm_jax.training.sharded_step import Trainable


class StepMaker:
  """A function (state, call) -> (state, measurements), which donates the state.

  Calls of one step and calls of several have a program each, which is compiled before its first use. A later
  compilation means that shapes change, and is logged as a warning.

  Args:
    seed: of the run.
    window: leaves the time of compilations out of images/s.
  """

  def __init__(
    self,
    feed: Feed,
    task: Trainable,
    frozen: PyTree,
    seed: int,
    window: StepWindow,
    compilations: CompilationCounter,
  ):
    self._feed, self._task, self._frozen = feed, task, frozen
    self._key = jax.random.key(seed)
    self._window, self._compilations = window, compilations
    self._programs: dict[bool, jax.stages.Wrapped] = {}

  def __call__(
    self, state: PyTree, call: Call, meanwhile: Callable[[], object] = lambda: None
  ) -> tuple[PyTree, Mapping[str, Array]]:
    """Return the next state, and the measurements of the step or of all steps with an axis of steps.

    Args:
      meanwhile: is called after a compilation. Its time is that of the compilation.
    """
    if call.several not in self._programs:
      program = self._feed.jit(self._task, state, self._frozen, several=call.several)
      self._programs[call.several] = program
      with self._compilations, self._window.compiling():
        program.lower(state, *self._arguments(call)).compile()
        meanwhile()
      self._compilations.grew()
    with self._compilations:
      result = self._programs[call.several](state, *self._arguments(call))
    if self._compilations.grew():
      warn_of_recompilation(call.steps[0], self._compilations.count)
    return result

  def _arguments(self, call: Call) -> tuple[PyTree, ...]:
    return self._frozen, self._feed.arrays, call.rows, self._key
