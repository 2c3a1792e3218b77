"""Choose the options that a config leaves to the device: those with the value "auto".

    config, chosen = resolve(config, Device.present())     # chosen: {"student.remat": "none", ...}

| option | on an NVIDIA GPU | elsewhere |
|---|---|---|
| attention | cudnn in half precision, else xla | xla |
| stream_dtype | bfloat16 if `dtype` is, else float32 | float32 |
| unroll | all blocks, at most 12 | 1 |
| remat | none if the memory suffices, else elementwise | elementwise |
| implementation (of a morpher) | gram | plain |

results/gpu.md has the measurements behind these choices. All of them keep the mathematics. `attention` and
`stream_dtype` change the rounding.
"""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from dtm_jax.errors import OptionError
from dtm_jax.models.vit import model as vit
from dtm_jax.options.sections import dotted_keys, get, parent_of

AUTO = "auto"
ELSEWHERE = {
  "attention": "xla",
  "stream_dtype": "float32",
  "unroll": 1,
  "remat": "elementwise",
  "implementation": "plain",
}
"""The options that can be "auto", and their values on CPUs, TPUs and unknown devices."""
ON_GPU = {"implementation": "gram"}
"""The values on an NVIDIA GPU that depend on nothing else."""

MOST_UNROLLED = 12
"""More blocks in one iteration take minutes to compile."""
SHARE_OF_MEMORY = 0.8
"""The share of the device's memory that parameters and what is kept for the backward pass may take."""
BYTES_PER_PARAMETER = 16
"""A float32 parameter, its gradient and two moments."""

_CUDNN_CAPABILITY = 8.0


@dataclasses.dataclass(frozen=True)
class Device:
  """What the choices depend on. All devices of a run are alike.

  Attributes:
    platform: "cpu", "tpu", "gpu" (NVIDIA) or another name.
    kind: the name that the maker gives it.
    memory: bytes that JAX can use on one device; None if unknown.
    capability: compute capability of an NVIDIA GPU.
    count: number of devices of the run.
  """

  platform: str
  kind: str = ""
  memory: int | None = None
  capability: float = 9.0
  count: int = 1

  @classmethod
  def present(cls) -> "Device":
    """Return the devices of this process's run."""
    first = jax.local_devices()[0]
    nvidia = first.platform == "gpu" and "cuda" in first.client.platform_version
    capability = float(getattr(first, "compute_capability", 0) or 0) if nvidia else 0.0
    platform = "rocm" if first.platform == "gpu" and not nvidia else first.platform
    memory = (first.memory_stats() or {}).get("bytes_limit")
    return cls(platform, first.device_kind, memory, capability, jax.device_count())

  @property
  def has_cudnn(self) -> bool:
    """Whether cuDNN's attention runs on it."""
    return self.platform == "gpu" and self.capability >= _CUDNN_CAPABILITY

  def __str__(self) -> str:
    return self.platform if self.kind in ("", self.platform) else f"{self.platform} ({self.kind})"


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
        chosen[key] = _choose(config, parent, name, device)
        with parent.ignore_type():
          parent[name] = chosen[key]
    values = ", ".join(f"{key}={value}" for key, value in chosen.items())
    logging.info("Chosen for %s: %s.", device, values)
  _check_attention(config, device)
  return config, chosen


def _name(key: str) -> str:
  return key.rpartition(".")[2]


def _choose(config: ConfigDict, section: ConfigDict, name: str, device: Device) -> Any:
  """Return the value of the option `name` of a section. The options before it in ELSEWHERE are chosen."""
  dtype = section.get("dtype")
  if device.platform != "gpu":
    return ELSEWHERE[name]
  if name in ON_GPU:
    return ON_GPU[name]
  if name == "attention" and device.has_cudnn and dtype in ("bfloat16", "float16"):
    return "cudnn"
  if name == "stream_dtype" and dtype == "bfloat16":
    return "bfloat16"
  if name == "unroll":
    return min(_trunk(section).depth, MOST_UNROLLED)
  if name == "remat" and device.memory is not None:
    images = -(-config.batch_size // device.count)
    needed = memory_without_remat(section, config.data.image_size, images)
    return "none" if needed <= SHARE_OF_MEMORY * device.memory else "elementwise"
  return ELSEWHERE[name]


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
