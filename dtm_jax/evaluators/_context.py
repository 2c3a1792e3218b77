"""The context of an evaluator: what the run gives it beside the options of its config section."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dtm_jax import data
from dtm_jax.arrays import Batch, PyTree
from dtm_jax.errors import OptionError
from dtm_jax.training import mesh as meshes

PredictFunction = Callable[[PyTree, Batch], Any]
"""(state, batch on the devices) -> an array or a tuple of arrays, the same on every process."""

Tokenize = Callable[[list[str]], Any]
"""n captions -> int32 [n, T]."""

Section = ConfigDict | Mapping[str, Any]
"""A section of the config. A ConfigDict is not a Mapping."""


@dataclasses.dataclass(frozen=True)
class Context:
  """Everything that a run gives to each of its evaluators.

  An evaluator uses the fields that it needs and ignores the others.

  Attributes:
    predict: the task's predict functions by name.
    mesh: the devices of the run.
    tokenize: the tokenizer of the task's text tower, or None if the task knows no text.
    training: the data set that the run trains on, with its class names, or None if there is none.
    image_size: side of the run's training images in pixels, or None if there are none.
    workdir: the folder of the run, for evaluators that record more than numbers; None outside of a run.
  """

  predict: Mapping[str, PredictFunction]
  mesh: Mesh
  tokenize: Tokenize | None = None
  training: data.Dataset | None = None
  image_size: int | None = None
  workdir: epath.Path | None = None

  @classmethod
  def bind(
    cls, functions: Mapping[str, Callable[..., Any]], frozen: PyTree, mesh: Mesh, **fields: Any
  ) -> "Context":
    """Return a context whose predict functions are compiled, with `frozen` already passed to them.

    All evaluators of one context share the compiled functions.

    Args:
      functions: a task's functions (state, frozen, batch) -> array, by name.
      frozen: the task's frozen arrays, placed on the mesh.
      mesh: the devices. The outputs of the functions are replicated over them.
      fields: the other fields of the context.
    """

    def bound(function: Callable[..., Any]) -> PredictFunction:
      jitted = jax.jit(function, out_shardings=meshes.replicated(mesh))
      return lambda state, batch: jitted(state, frozen, batch)

    return cls({name: bound(function) for name, function in functions.items()}, mesh, **fields)

  def function(self, name: str) -> PredictFunction:
    """Return the predict function `name`.

    Raises:
      OptionError: the task has no such function. The message lists those that it has.
    """
    if name not in self.predict:
      raise OptionError(
        f"Unknown predict function {name!r}. The task offers: {', '.join(sorted(self.predict))}."
      )
    return self.predict[name]
