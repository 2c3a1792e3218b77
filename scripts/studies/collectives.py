"""Read the collectives of a compiled program from XLA's text, and count the bytes that they move.

    collectives(compiled.as_text()) -> [Collective(kind="all-reduce", ...), ...]

Each collective is one instruction. `times` is the number of times that a step runs it: the product of the
trip counts of the loops around it, which XLA writes as `known_trip_count`. It is None if XLA gives no trip
count.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

BETWEEN_SLICES = "to other slices"
"""The kind of a send that the runtime of several TPU slices carries over the network between them (DCN)."""
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "token": 0}
"""Bits of the types without a number in their name. Other names contain it: bf16, s32, f8e4m3fn."""

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_COUNTED = re.compile(r"compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}')
_PARTITIONS = re.compile(r"num_partitions=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction.

  Attributes:
    kind: one of KINDS, or BETWEEN_SLICES.
    arrays: the results, such as "f32[768,3072]", without layouts. For a reduce-scatter, the operands.
    size: bytes of these arrays: of the gathered array for an all-gather, of the whole array for a
      reduce-scatter.
    group: number of devices in a group, or of slices.
    times: number of times that a step runs the instruction. None if it depends on the data.
    source: path of the operation that caused it.
  """

  kind: str
  arrays: tuple[str, ...]
  size: int
  group: int
  times: int | None
  source: str

  @property
  def sent(self) -> float:
    """Return the bytes that a device sends each time in a ring, the minimum for a group of n devices.

    all-reduce 2(n-1)/n·S    all-gather, reduce-scatter, all-to-all (n-1)/n·S    permute, to other slices S

    To other slices, S is what a device hands to its host. The host sends it once if there are two slices.
    """
    share = (self.group - 1) / self.group
    shares = {"all-reduce": 2 * share, "collective-permute": 1.0, BETWEEN_SLICES: 1.0}
    return self.size * shares.get(self.kind, share)

  @property
  def sent_per_step(self) -> float:
    """Return `sent` times `times`, or `sent` if `times` is None."""
    return self.sent * (1 if self.times is None else self.times)


def collectives(text: str) -> list[Collective]:
  """Return all collectives that the program `text` (optimised HLO) executes, in the order of the text.

  A pair of start and done counts once. Groups of one device are left out, because they move nothing. On
  several TPU slices, XLA makes a collective in each slice and a send to the others (BETWEEN_SLICES).

  Raises:
    ValueError: the text has no entry computation.
  """
  computations, entry = _computations(text)
  devices = int(match[1]) if (match := _PARTITIONS.search(text)) else 1
  found: list[Collective] = []
  _walk(entry, 1, computations, devices, found)
  return found


def total(found: list[Collective]) -> float:
  """Return the bytes that a device sends in a step."""
  return math.fsum(each.sent_per_step for each in found)


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
  """Return the instructions of each computation as (name, right side), and the name of the entry."""
  computations: dict[str, list[tuple[str, str]]] = {}
  entry, current = None, None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = computations.setdefault(match["name"], [])
      entry = match["name"] if line.startswith("ENTRY") else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      current.append((match["name"], match["rest"]))
  if entry is None:
    raise ValueError(f"No ENTRY computation in this text of {len(text)} characters: is it optimised HLO?")
  return computations, entry


def _walk(name: str, times: int | None, computations: dict, devices: int, found: list[Collective]) -> None:
  """Append to `found` the collectives of the computation `name`, which runs `times` times."""
  types: dict[str, str] = {}
  for instruction, rest in computations[name]:
    type_, opcode, operands = _split(rest)
    types[instruction] = type_
    if opcode.endswith(("-done", "-update")):
      continue
    kind = opcode.removesuffix("-start")
    if kind in KINDS:
      arrays = _arrays(kind, opcode, type_, [types.get(operand, "") for operand in operands])
      group = _group_size(rest, devices)
      if group > 1:
        size = sum(_bytes(array) for array in arrays)
        found.append(Collective(kind, arrays, size, group, times, _source(rest)))
      continue  # it calls only the addition of its elements
    if opcode == "send" and (match := _SLICES.search(rest)):
      array = _list_arrays(type_)[0]
      found.append(
        Collective(BETWEEN_SLICES, (array,), _bytes(array), match[1].count(",") + 1, times, _source(rest))
      )
      continue
    inner = times
    if opcode == "while":
      condition = _group(r"condition=%?([\w.\-]+)", rest)
      trips = _trips(rest, computations[condition])
      inner = None if times is None or trips is None else times * trips
      _walk(condition, inner, computations, devices, found)
    for called in _called(rest):
      _walk(called, inner, computations, devices, found)


def _source(rest: str) -> str:
  """Return the path of the operation that caused an instruction, or "" if XLA does not give it."""
  return match[1] if (match := _OP_NAME.search(rest)) else ""


def _trips(rest: str, condition: list[tuple[str, str]]) -> int | None:
  """Return how often a loop runs: XLA's count, or n if its condition is `i < n`, since JAX counts from 0."""
  if match := _TRIPS.search(rest):
    return int(match[1])
  constants = {name: right for name, right in condition if " constant(" in right}
  if (match := _COUNTED.search(condition[-1][1])) and match[2] in constants:
    return int(_group(r" constant\((\d+)\)", constants[match[2]]))
  return None


def _split(rest: str) -> tuple[str, str, list[str]]:
  """Return type, opcode and names of the operands from the right side of an instruction."""
  end = rest.index(" ")
  if rest.startswith("("):  # a tuple, perhaps of tuples: find the bracket that closes it
    depths = itertools.accumulate((character == "(") - (character == ")") for character in rest)
    end = next(place for place, depth in enumerate(depths) if depth == 0) + 1
  type_, call = rest[:end], rest[end:].lstrip()
  opcode, _, arguments = call.partition("(")
  operands = re.findall(r"%([\w.\-]+)", arguments.partition(")")[0])
  return type_, opcode, operands


def _arrays(kind: str, opcode: str, type_: str, operands: list[str]) -> tuple[str, ...]:
  """Return the attribute `arrays` of a collective."""
  results = _list_arrays(type_)
  given = [array for operand in operands for array in _list_arrays(operand)]
  if kind == "reduce-scatter":
    return tuple(given)
  if opcode in ("all-gather-start", "collective-permute-start"):  # (operands, results, contexts)
    return tuple(results[len(given) : 2 * len(given)])
  return tuple(results)


def _list_arrays(type_: str) -> list[str]:
  """Return the arrays of a type, such as "f32[768,3072]", without layouts."""
  return [f"{dtype}[{shape}]" for dtype, shape in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", type_))]


def _bytes(array: str) -> int:
  """Return the bytes of an array, such as "f32[768,3072]"."""
  dtype, _, shape = array.removesuffix("]").partition("[")
  bits = BITS[dtype] if dtype in BITS else int(_group(r"(\d+)", dtype))
  return math.prod(map(int, shape.split(","))) * bits // 8 if shape else bits // 8


def _group(pattern: str, text: str) -> str:
  """Return the first group of the pattern, which must be in the text."""
  match = re.search(pattern, text)
  if match is None:
    raise ValueError(f"{pattern!r} is not in {text!r}.")
  return match[1]


def _group_size(rest: str, devices: int) -> int:
  """Return the number of devices in a group of a collective; by default all."""
  if match := _IOTA_GROUPS.search(rest):
    return int(match[2])
  if match := _MESH_GROUPS.search(rest):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
  if match := _LISTED_GROUPS.search(rest):
    return len(match[1].split(","))
  return devices


def _called(rest: str) -> Iterator[str]:
  """Yield the names of the computations that an instruction calls."""
  yield from _CALLED.findall(rest)
  for names in _BRANCHES.findall(rest):
    yield from re.findall(r"%?([\w.\-]+)", names)
