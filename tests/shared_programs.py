"""Runs of one config in one process that share the task, its initial state and its compiled programs.

    def test_two_runs(programs):         # the fixture has the programs of all tests of this process
      programs.train(config, first)      # compiles
      programs.train(config, second)     # neither traces nor compiles the step again

Such runs differ from others in nothing but their count of compilations. A test that counts those, or that
changes how a task or a mesh is made, calls `loop.train` itself.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator
from typing import Any
from unittest import mock

import jax

from dtm_jax import loop
from dtm_jax.evaluators import Context
from dtm_jax.training.feeds import Feed

WITHOUT = ("checkpoint", "evals", "log", "mesh", "replay", "resume", "seed", "train")
"""Sections of a config on which its task does not depend."""


class SharedPrograms:
  """Keeps what the runs have in common. Call `train` and `run` in place of the loop's functions."""

  def __init__(self) -> None:
    self._kept: dict[Hashable, Any] = {}
    names = ("build_task", "abstract_state", "init_state")
    self._original = {name: getattr(loop, name) for name in names}

  def train(self, config: Any, workdir: str) -> loop.State:
    with self._shared():
      return loop.train(config, workdir)

  def run(self, config: Any, workdir: str) -> tuple[loop.State, bool]:
    with self._shared():
      return loop.run(config, workdir)

  @contextlib.contextmanager
  def _shared(self) -> Iterator[None]:
    names = {name: getattr(self, f"_{name}") for name in self._original}
    bind, jit = Context.bind, Feed.jit
    predict = lambda *args, **fields: self._bind(bind, *args, **fields)
    step = lambda feed, *args, several=False: self._jit(jit, feed, *args, several=several)
    with (
      mock.patch.multiple(loop, **names),
      mock.patch.object(Context, "bind", predict),
      mock.patch.object(Feed, "jit", step),
    ):
      yield

  def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
    if key not in self._kept:
      self._kept[key] = make()
    return self._kept[key]

  def _build_task(self, config, course, dataset):
    plain = config.to_dict()
    content = repr([(name, plain[name]) for name in sorted(plain.keys() - {*WITHOUT})])
    places = repr((sorted(course.for_schedules(config).items()), dataset.class_names))
    return self._once((content, places), lambda: self._original["build_task"](config, course, dataset))

  def _abstract_state(self, task, mesh, rules):
    make = lambda: self._original["abstract_state"](task, mesh, rules)
    return self._once(("shapes", task, mesh, repr(rules)), make)

  def _init_state(self, task, key, mesh, rules, params=None):
    make = lambda: self._original["init_state"](task, key, mesh, rules, params)
    if params is not None:
      return make()
    bits = jax.random.key_data(key).tobytes()
    host = self._once(("state", task, mesh, bits), lambda: jax.device_get(make()))  # a step donates its state
    shardings = jax.tree.map(lambda x: x.sharding, self._abstract_state(task, mesh, rules))
    return jax.device_put(host, shardings)

  def _jit(self, jit, feed, task, state, frozen, several):
    shardings = tuple(x.sharding for x in jax.tree.leaves((state, frozen)))
    make = lambda: jit(feed, task, state, frozen, several=several)
    return self._once(("step", task, feed.mesh, shardings, several), make)

  def _bind(self, bind, functions, frozen, mesh, **fields):
    task = next(function.__self__ for function in functions.values() if hasattr(function, "__self__"))
    context = self._once(("predict", task, mesh), lambda: bind(functions, frozen, mesh, **fields))
    return dataclasses.replace(context, **fields)
