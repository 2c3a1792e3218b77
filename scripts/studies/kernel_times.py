"""Read a profile of a compiled step: the time of each kernel, its part of the model and its kind.

The profiler of JAX writes a file `*.xplane.pb`, which `jax.profiler.ProfileData` reads. Its events name the
instructions of the compiled program. The text of the program says from which named scope each instruction
comes, for example `jit(train_step)/transpose(jvp(predict))/.../attn/qkv/dot_general`.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.profiler import ProfileData

PARTS = {
  "augment": "augmentation", "teach": "teacher", "mask": "mask", "group": "matching", "predict": "student",
  "compare": "morphing and loss", "probe": "probe", "optimiser": "optimiser",
}  # fmt: skip
"""The named scopes of a train step, and their names in the table."""
BACKWARD, OTHER = "student, backward", "other"
KINDS = ("products", "attention", "elementwise", "copies", "matching", "optimiser", "communication")

DENSE = {"qkv", "proj", "out", "query", "key", "value"}
"""The linear maps of attention, which count as products."""
PRODUCTS = {"dot", "convolution", "scaled-dot"}
MOVES = {
  "copy", "copy-start", "copy-done", "transpose", "slice", "dynamic-slice", "dynamic-update-slice",
  "concatenate", "pad", "reshape", "bitcast", "broadcast", "gather", "reverse", "parameter", "constant",
  "tuple", "get-tuple-element", "iota",
}  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective")
CONTAINERS = {"while", "conditional"}
"""Instructions whose time is that of the instructions in their bodies."""
PRODUCT_KERNELS = re.compile(r"gemm|nvjet|cutlass|xmma|matmul|cublas", re.IGNORECASE)
ATTENTION_KERNELS = re.compile(r"fmha|flash|cudnn|attention|sdpa", re.IGNORECASE)
COPY_KERNELS = re.compile(r"memcpy|memset|copy|transpose", re.IGNORECASE)

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """Describe one instruction of the compiled program.

  Attributes:
    opcodes: its own opcode, or those of the computation that it calls as a fusion.
    scopes: the words of its scopes, from the outside to the inside.
    backward: whether it belongs to a gradient.
    details: the rest of its line.
  """

  opcodes: frozenset[str]
  scopes: tuple[str, ...]
  backward: bool
  details: str


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Hold the time of all runs of one instruction."""

  name: str
  part: str
  kind: str
  nanoseconds: float


def instructions(text: str) -> dict[str, Instruction]:
  """Return the instructions of a compiled program by name, from `compiled.as_text()`."""
  bodies: dict[str, set[str]] = {}
  lines: list[tuple[str, str, str]] = []
  body: set[str] = set()
  for line in text.splitlines():
    if found := _COMPUTATION.match(line):
      body = bodies.setdefault(found[1], set())
    elif found := _INSTRUCTION.match(line):
      name, shape, opcode, details = found.groups()
      if not shape.endswith("[]"):  # numbers are the indices of slices
        body.add(opcode)
      lines.append((name, opcode, details))
  return {name: _instruction(opcode, details, bodies) for name, opcode, details in lines}


def _instruction(opcode: str, details: str, bodies: Mapping[str, set[str]]) -> Instruction:
  called = re.search(r"calls=%?([\w.\-]+)", details)
  opcodes = bodies.get(called[1], set()) if called and opcode in ("fusion", "call") else {opcode}
  path = found[1] if (found := re.search(r'op_name="([^"]*)"', details)) else ""
  return Instruction(frozenset(opcodes), *_scopes(path), details)


def _scopes(path: str) -> tuple[tuple[str, ...], bool]:
  """Return the words of a path of scopes, and whether it belongs to a gradient."""
  return tuple(re.findall(r"[\w.\-]+", path)), "transpose(" in path


def kernels(folder: Path, text: str) -> list[Kernel]:
  """Return the kernels of the newest profile below `folder`, the slowest first.

  Args:
    folder: what `jax.profiler.start_trace` was given.
    text: the text of the compiled program that ran.

  Raises:
    FileNotFoundError: there is no profile.
  """
  files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  if not files:
    raise FileNotFoundError(f"{folder} has no profile (*.xplane.pb).")
  program = instructions(text)
  totals: dict[tuple[Instruction, str], float] = {}
  for event, nanoseconds in _own_times(ProfileData.from_file(str(files[-1]))):
    unknown = Instruction(frozenset(), *_scopes(event.path), "")
    instruction = program.get(event.instruction, unknown)
    if not instruction.opcodes & CONTAINERS:
      key = instruction, event.kernel
      totals[key] = totals.get(key, 0.0) + nanoseconds
  found = [Kernel(name, *_part_and_kind(each, name), total) for (each, name), total in totals.items()]
  return sorted(found, key=lambda each: -each.nanoseconds)


def _part_and_kind(instruction: Instruction, kernel: str) -> tuple[str, str]:
  part = next((PARTS[word] for word in instruction.scopes if word in PARTS), OTHER)
  kind = _kind(instruction, kernel)
  if part == "matching" and kind != "communication":
    kind = "matching"
  elif part == "optimiser" and kind != "communication":
    kind = "optimiser"
  elif part == "student" and instruction.backward:
    part = BACKWARD
  return part, kind


def _kind(instruction: Instruction, kernel: str) -> str:
  opcodes, scopes = instruction.opcodes, instruction.scopes
  if any(opcode.startswith(COLLECTIVES) for opcode in opcodes):
    return "communication"
  inside = scopes[scopes.index("attn") + 1 :] if "attn" in scopes else ()
  if ATTENTION_KERNELS.search(kernel) or (inside and not DENSE & set(inside)):
    return "attention"
  target = re.search(r'custom_call_target="([^"]*)"', instruction.details)
  if opcodes & PRODUCTS or PRODUCT_KERNELS.search(f"{kernel} {target[1] if target else ''}"):
    return "products"
  if (opcodes and opcodes <= MOVES) or (not opcodes and COPY_KERNELS.search(kernel)):
    return "copies"
  return "elementwise"


class _Event(NamedTuple):
  instruction: str
  kernel: str
  path: str
  start: float
  duration: float


def _own_times(profile: ProfileData) -> Iterator[tuple[_Event, float]]:
  """Yield each event of a device with its nanoseconds, without those of the events inside it."""
  for line in _device_lines(profile):
    events = [event for event in map(_event, line.events) if event is not None]
    events.sort(key=lambda event: (event.start, -event.duration))
    own = [event.duration for event in events]
    stack: list[int] = []
    for i, event in enumerate(events):
      while stack and events[stack[-1]].start + events[stack[-1]].duration <= event.start:
        stack.pop()
      if stack:
        own[stack[-1]] -= event.duration
      stack.append(i)
    yield from zip(events, own, strict=True)


def _device_lines(profile: ProfileData) -> list[Any]:
  """Return the lines with the kernels: a TPU's operations, a GPU's streams, or the threads of the host."""
  planes = list(profile.planes)
  devices = [plane for plane in planes if plane.name.startswith(("/device:GPU", "/device:TPU"))]
  lines = [line for plane in devices or planes for line in plane.lines]
  operations = [line for line in lines if line.name == "XLA Ops"]
  streams = [line for line in lines if line.name.startswith("Stream")]
  return operations or streams or lines


def _event(event: Any) -> _Event | None:
  """Return what the table needs of an event, or None if the event is not a kernel of the device."""
  stats = dict(event.stats)
  if "hlo_op" not in stats and "correlation_id" not in stats:  # a copy on a GPU may have the latter only
    return None
  instruction = str(stats.get("hlo_op", "")).lstrip("%")
  return _Event(instruction, event.name, str(stats.get("tf_op", "")), event.start_ns, event.duration_ns)
