"""Choose the options that are left to the device: those with the value "auto".

    resolved({"dtype": "bfloat16", "attention": "auto"})     # on a CPU: "attention": "xla"

| option | on an NVIDIA GPU | elsewhere |
|---|---|---|
| attention | cudnn in half precision, else xla | xla |
| stream_dtype | bfloat16 if `dtype` is, else float32 | float32 |
| unroll | all blocks, at most 12 | 1 |
| remat | none if the memory suffices, else elementwise | elementwise |
| implementation (of a morpher) | gram | plain |

The builders of models, teachers and morphers take "auto" and ask `resolved`. It knows no batch, so `remat`
becomes "elementwise". `device_options.resolve` does the same for a whole config, which also gives the batch.

results/gpu.md has the measurements behind these choices. All of them keep the mathematics. `attention` and
`stream_dtype` change the rounding.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

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
    import jax  # a start with wrong options is refused before JAX is imported

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


def choose(
  name: str, options: Mapping[str, Any], device: Device, needed: Callable[[], int] | None = None
) -> Any:
  """Return the value of the option `name`.

  Args:
    name: one of ELSEWHERE.
    options: those of the same section. The ones that come before `name` in ELSEWHERE are chosen.
    needed: returns the bytes that a device needs with remat="none"; None if nobody knows.
  """
  dtype = options.get("dtype")
  if device.platform != "gpu":
    return ELSEWHERE[name]
  if name in ON_GPU:
    return ON_GPU[name]
  if name == "attention" and device.has_cudnn and dtype in ("bfloat16", "float16"):
    return "cudnn"
  if name == "stream_dtype" and dtype == "bfloat16":
    return "bfloat16"
  if name == "unroll":
    return min(options["depth"], MOST_UNROLLED)
  if name == "remat" and needed is not None and device.memory is not None:
    return "none" if needed() <= SHARE_OF_MEMORY * device.memory else "elementwise"
  return ELSEWHERE[name]


def resolved(options: Mapping[str, Any], device: Device | None = None) -> dict[str, Any]:
  """Return the options of one model, teacher or morpher without "auto".

  Args:
    options: with `depth` if `unroll` is "auto".
    device: by default the present one.
  """
  options = dict(options)
  for name in [name for name in ELSEWHERE if options.get(name) == AUTO]:
    device = device or Device.present()
    options[name] = choose(name, options, device)
  return options
