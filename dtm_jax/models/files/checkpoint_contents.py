"""Find the tensors of one model in a checkpoint, and remove the prefixes of their names.

One rule serves all formats and families. Containers ("state_dict", "model", "teacher") and wrappers
("module.", "_orig_mod.", "backbone.") are both prefixes of a model's names. The *anchor* of a model shows its
prefix. An anchor is the patch embedding or the class token under its name in a known library:

    state_dict.module.visual.class_embedding   ->  one model has the prefix "state_dict."
    state_dict_ema.visual.class_embedding      ->  another one has the prefix "state_dict_ema."

If a file holds several models, `weights` names the wanted one. Without `weights`, the model with
exponentially averaged (EMA) weights is read, as in timm, and the log says so.
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
"""Anchors: of CLIP and SigLIP in transformers, of its other towers, of OpenAI, and of the authors or timm."""

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a name that torch's data parallelism, compilation and recomputation insert anywhere."""

CONTAINERS = (
  "model",
  "module",
  "state_dict",
  "state_dict_ema",
  "model_ema",
  "model_state",
  "model_state_dict",
)
"""Containers to search for a state dict without an anchor, in this order."""

TOP = "top"
"""The value of `weights` for a model whose names have no prefix."""

_WRAPPER = re.compile(rf"(?:(?<=[./])|^)(?:{'|'.join(WRAPPERS)})[./]")
_EMA = re.compile(r"(?:^|_)ema(?:_|\d|$)")
_TRAINING = {
  "optimizer", "optimizers", "optim", "opt_state", "optimizer_state", "exp_avg", "exp_avg_sq", "mu", "nu",
}  # fmt: skip
_COUNTER = "n_averaged"


def pick(tensors: Mapping[str, T], *, source: str, weights: str | None = None) -> dict[str, T]:
  """Return the tensors of one model under their names without prefixes.

  Args:
    tensors: all tensors of the file. A dot or a slash joins the containers to the names.
    source: the file, for messages.
    weights: the container or wrapper of the wanted model, if there are several models.

  Raises:
    OptionError: there are several models and `weights` is missing, or `weights` names none of them.
    ValueError: two names differ only in their wrappers.
  """
  clean: dict[str, T] = {}
  for name, tensor in tensors.items():
    short = _WRAPPER.sub("", name)
    if short in clean:
      raise ValueError(f"two tensors are called {short} when the names of their wrappers are removed")
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
    logging.info("Reading the model %r of %s. Ignoring %d other tensors: %s, ...", prefix[:-1] or TOP, source,
                 len(rest), rest[0])  # fmt: skip
  return {name[len(prefix) :]: tensor for name, tensor in clean.items() if belongs(name)}


def _choose(prefixes: list[str], source: str, weights: str | None) -> str:
  """Return the prefix of the wanted model."""
  names = {prefix[:-1] or TOP: prefix for prefix in prefixes}
  listed = ", ".join(names)
  if weights is not None:
    chosen = [names[weights]] if weights in names else [
      prefix for name, prefix in names.items() if weights in name.split(".")
    ]  # fmt: skip
    if len(chosen) != 1:
      raise OptionError(
        f"weights={weights!r} names no single model of {source}. Available: {listed or 'none'}."
      )
    return chosen[0]
  if len(prefixes) == 1:
    return prefixes[0]
  averaged = [name for name in names if any(_EMA.search(part) for part in name.split("."))]
  if len(averaged) != 1:
    raise OptionError(f"{source} holds several models: {listed}. Choose one with the option `weights`.")
  others = ", ".join(name for name in names if name != averaged[0])
  logging.info("%s holds several models. Reading the EMA weights %r. The option `weights` can choose %s.",
               source, averaged[0], others)  # fmt: skip
  return names[averaged[0]]


def _from_container(tensors: dict[str, T]) -> dict[str, T]:
  """Return the tensors below the first of CONTAINERS that exists, or all tensors."""
  for container in CONTAINERS:
    inner = {
      name[len(container) + 1 :]: tensor
      for name, tensor in tensors.items()
      if name.startswith((f"{container}.", f"{container}/"))
    }
    if inner:
      return _from_container(inner)
  return tensors
