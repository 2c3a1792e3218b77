"""Choose the options that a whole config leaves to the device: those with the value "auto" (see `devices`).

    config, chosen = resolve(config, Device.present())     # chosen: {"student.remat": "none", ...}

A config also gives the batch, so the memory decides about `remat`.
"""

import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from dtm_jax.devices import AUTO, ELSEWHERE, Device, choose
from dtm_jax.errors import OptionError
from dtm_jax.models.vit import model as vit
from dtm_jax.options.sections import dotted_keys, get, parent_of

BYTES_PER_PARAMETER = 16
"""A float32 parameter, its gradient and two moments."""


def resolve(config: ConfigDict, device: Device | None = None) -> tuple[ConfigDict, dict[str, Any]]:
  """Return a copy of `config` without "auto", and the chosen values by dotted key. Logs them in one line.

  Args:
    config: stays as it is. `data.image_size` must be known if a `remat` is "auto".
    device: by default the present one.

  Raises:
    OptionError: an implementation of attention does not run on this device.
  """
  device = device or Device.present()
  keys = [key for key in dotted_keys(config) if _name(key) in ELSEWHERE and get(config, key) == AUTO]
  chosen: dict[str, Any] = {}
  if keys:
    config = copy.deepcopy(config)  # keeps references between options
    for name in ELSEWHERE:  # remat depends on the others
      for key in (key for key in keys if _name(key) == name):
        parent, _ = parent_of(config, key)
        needed = functools.partial(_bytes_without_remat, config, parent, device)
        depth = {"depth": _trunk(parent).depth} if name == "unroll" else {}
        chosen[key] = choose(name, {**parent, **depth}, device, needed)
        with parent.ignore_type():
          parent[name] = chosen[key]
    values = ", ".join(f"{key}={value}" for key, value in chosen.items())
    logging.info("Chosen for %s: %s.", device, values)
  _check_attention(config, device)
  return config, chosen


def _name(key: str) -> str:
  return key.rpartition(".")[2]


def _bytes_without_remat(config: ConfigDict, section: ConfigDict, device: Device) -> int:
  images = -(-config.batch_size // device.count)
  return memory_without_remat(section, config.data.image_size, images)


def memory_without_remat(section: ConfigDict | dict, image_size: int, batch_size: int) -> int:
  """Return the bytes that a transformer needs in training with `remat="none"`, from shapes alone.

  It counts the parameters, their gradients and moments, and what the forward pass keeps for the backward
  pass. cuDNN and our kernels keep no logits, as `remat="attention"` does in plain JAX.

  Args:
    section: the options of the student or the classifier, without "auto" in attention and stream_dtype.
    batch_size: the images of one device.
  """
  fused = section.get("attention", "xla") != "xla"
  model = _trunk(section, attention="xla", remat="attention" if fused else "none", unroll=1)
  image = jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.float32)
  key = jax.random.key(0)
  params = jax.eval_shape(model.init, key, image)["params"]

  def backward(params: Any, image: Any) -> Any:
    """Return the function of the backward pass. It is a pytree whose leaves are kept."""
    forward = lambda params: model.apply({"params": params}, image, train=True, rngs={"drop_path": key})
    return jax.vjp(forward, params)[1]

  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  parameters = sum(x.size for x in jax.tree.leaves(params))
  return size(jax.eval_shape(backward, params, image)) + BYTES_PER_PARAMETER * parameters


def _trunk(section: ConfigDict | dict, **changes: Any) -> vit.VisionTransformer:
  """Return the transformer that a section describes, without the head of its task."""
  names = {"variant", *vit.Trunk.__dataclass_fields__}
  options = {name: value for name, value in section.items() if name in names and value != AUTO}
  return vit.build(**options | changes)


def _check_attention(config: ConfigDict, device: Device) -> None:
  """Raise an OptionError if an explicit implementation of attention cannot run on the device."""
  for key in dotted_keys(config):
    if _name(key) != "attention":
      continue
    value, dtype = get(config, key), parent_of(config, key)[0].get("dtype")
    given = f"--config.{key}={value}"
    if value == "cudnn" and not device.has_cudnn:
      raise OptionError(f"{given} needs an NVIDIA GPU of Ampere or later, not {device}. Use auto or xla.")
    if value == "cudnn" and dtype == "float32":
      raise OptionError(f"{given} needs half precision, not dtype=float32. Use auto or xla.")
    if value == "pallas" and device.count > 1:
      raise OptionError(f"{given} runs on one device, not {device.count}. Use auto, cudnn or xla.")
