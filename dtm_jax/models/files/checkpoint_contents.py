"""Which tensors of a file are the model's, and their names without what wrappers put before them.

One rule serves all formats and all families. Containers ("state_dict", "model", "teacher") and wrappers
("module.", "_orig_mod.", "backbone.") are the same thing here: words before the names of a model. A model
begins where its *anchor* does, the tensor of its patch embedding or class token under its library's name:

    state_dict.module.visual.class_embedding   ->  the model lies below "state_dict."
    state_dict_ema.visual.class_embedding      ->  another one lies below "state_dict_ema."

Where a file holds several models, the one with exponentially averaged (EMA) weights is read, as timm does,
and the log says so; `weights` names another one. Several models without that mark must be told apart by
`weights`.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from absl import logging

from dtm_jax.errors import OptionError

T = TypeVar("T")

_ROOTS = "beit|vit|dinov2|dinov2_with_registers|data2vec_vision"
ANCHOR = re.compile(
  r"(?P<prefix>(?:.*?\.)??)"
  r"(?:(?:vision_model\.)?embeddings\.(?:class_embedding|patch_embedding\.(?:weight|kernel))"
  rf"|(?:(?:{_ROOTS})\.)?embeddings\.patch_embeddings\.projection\.weight"
  r"|(?:visual\.)?class_embedding"
  r"|patch_embed\.proj\.weight)"
)
"""CLIP's and SigLIP's in transformers, its other towers', OpenAI's, and the authors' or timm's."""

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Put by torch's data parallelism, compilation and recomputation, anywhere in a name."""

CONTAINERS = (
  "model",
  "module",
  "state_dict",
  "state_dict_ema",
  "model_ema",
  "model_state",
  "model_state_dict",
)
"""Where a state dict without an anchor is looked for, in this order."""

TOP = "top"
"""What `weights` calls a model whose names have nothing before them."""

_WRAPPER = re.compile(rf"(?:(?<=[./])|^)(?:{'|'.join(WRAPPERS)})[./]")
_EMA = re.compile(r"(?:^|_)ema(?:_|\d|$)")
_TRAINING = {
  "optimizer", "optimizers", "optim", "opt_state", "optimizer_state", "exp_avg", "exp_avg_sq", "mu", "nu",
}  # fmt: skip
_COUNTER = "n_averaged"


def pick(tensors: Mapping[str, T], *, source: str, weights: str | None = None) -> dict[str, T]:
  """Return the tensors of one model under its own names.

  Args:
    tensors: of the whole file; containers are joined to the names with a dot or a slash.
    source: the file, for messages.
    weights: the container or wrapper of the model that is wanted, where there are several.

  Raises:
    OptionError: there are several models and nothing tells which, or none is called `weights`.
    ValueError: two names differ in wrappers alone.
  """
  clean: dict[str, T] = {}
  for name, tensor in tensors.items():
    short = _WRAPPER.sub("", name)
    if short in clean:
      raise ValueError(f"two tensors are called {short} once their wrappers' names are removed")
    if not _TRAINING & set(re.split("[./]", short)) and short != _COUNTER:
      clean[short] = tensor
  anchors = (ANCHOR.fullmatch(name.replace("/", ".")) for name in clean)
  prefixes = sorted({anchor["prefix"] for anchor in anchors if anchor})
  if not prefixes and weights is None:
    return _from_container(clean)
  prefix = _choose(prefixes, source, weights)
  others = tuple(other for other in prefixes if len(other) > len(prefix))

  def belongs(name: str) -> bool:
    dotted = name.replace("/", ".")
    return dotted.startswith(prefix) and not (others and dotted.startswith(others))

  rest = [name for name in clean if not name.replace("/", ".").startswith(tuple(prefixes))]
  if rest:
    logging.info("Of %s the model below %r is read; left out: %d tensors (%s, ...).", source, prefix[:-1],
                 len(rest), rest[0])  # fmt: skip
  return {name[len(prefix) :]: tensor for name, tensor in clean.items() if belongs(name)}


def _choose(prefixes: list[str], source: str, weights: str | None) -> str:
  names = {prefix[:-1] or TOP: prefix for prefix in prefixes}
  listed = ", ".join(names)
  if weights is not None:
    chosen = [names[weights]] if weights in names else [
      prefix for name, prefix in names.items() if weights in name.split(".")
    ]  # fmt: skip
    if len(chosen) != 1:
      raise OptionError(
        f"weights={weights!r}: {source} has {listed or 'no model that is known by its names'}."
      )
    return chosen[0]
  if len(prefixes) == 1:
    return prefixes[0]
  averaged = [name for name in names if any(_EMA.search(part) for part in name.split("."))]
  if len(averaged) != 1:
    raise OptionError(f"{source} holds several models: {listed}. Say which by the option `weights`.")
  others = ", ".join(name for name in names if name != averaged[0])
  logging.info("%s has several weights. The EMA ones, %r, are read, not %s; see the option `weights`.",
               source, averaged[0], others)  # fmt: skip
  return names[averaged[0]]


def _from_container(tensors: dict[str, T]) -> dict[str, T]:
  """The tensors below the first of CONTAINERS, or those at the top."""
  for container in CONTAINERS:
    inner = {
      name[len(container) + 1 :]: tensor
      for name, tensor in tensors.items()
      if name.startswith((f"{container}.", f"{container}/"))
    }
    if inner:
      return _from_container(inner)
  return tensors
