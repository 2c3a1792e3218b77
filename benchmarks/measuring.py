"""Timing on a machine that may have other things to do, and the JSON and the table of what was seen.

    times, first = interleaved({"a": call_a, "b": call_b}, rounds=15)
    quartiles(times["a"] / times["b"])

The repeats are interleaved: each round times all calls once, in an order of its own, so that whatever else
the machine does falls on all alike. Ratios are of times of one round. Before it is timed, a call is made once
untimed: caches and free memory are then its own and not what another call has left, as in a loop of it alone.
"""

import datetime
import json
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

SETTINGS = ("GLIBC_TUNABLES", "XLA_FLAGS")
"""Variables of the environment that change what is measured."""


def seconds(call: Callable[..., object], *args) -> float:
  """How long one call takes, with what it started on the device."""
  start = time.perf_counter()
  jax.block_until_ready(call(*args))
  return time.perf_counter() - start


def interleaved(
  calls: Mapping[str, Callable[[int], object]], rounds: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
  """{name: seconds of each round}, and {name: seconds of the first call, that compiles}.

  Each call gets the number of the round, for draws of its own; the first call gets 0.
  """
  first = {name: seconds(call, 0) for name, call in calls.items()}
  times = {name: [] for name in calls}
  for i in range(rounds):
    for name in random.Random(i).sample(list(calls), len(calls)):
      seconds(calls[name], i)
      times[name].append(seconds(calls[name], i))
  return {name: np.array(each) for name, each in times.items()}, first


def quartiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
  """The median, and low and high, between which half of the values lie."""
  low, median, high = np.percentile(values, (25, 50, 75))
  return {"median": float(median), "low": float(low), "high": float(high)}


def spread(values: Mapping[str, float] | None, form: str = ".3f") -> str:
  """ "median (low-high)" of `quartiles`; "-" for None."""
  if values is None:
    return "-"
  median, low, high = (format(values[name], form) for name in ("median", "low", "high"))
  return f"{median} ({low}-{high})"


def machine(*packages: str) -> str:
  """The device JAX uses and the versions that matter; `packages` are named beside JAX."""
  device = jax.devices()[0]
  name = f"{os.cpu_count()} cores of {_cpu()}" if device.platform == "cpu" else device.device_kind
  if jax.device_count() > 1 and device.platform != "cpu":
    name = f"{jax.device_count()} x {name}"
  versions = [f"{package} {metadata.version(package)}" for package in ("jax", "jaxlib", *packages)]
  return f"{name}, Python {platform.python_version()}, {', '.join(versions)}"


def _cpu() -> str:
  """The processor's own name, where Linux tells it."""
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names and names[0] != "unknown" else platform.machine()


def command(module: str) -> str:
  """What was typed, after what the environment sets: `XLA_FLAGS=... python -m benchmarks.step --batch=8`."""
  settings = [f"{name}={shlex.quote(os.environ[name])}" for name in SETTINGS if os.environ.get(name)]
  return " ".join([*settings, "python", "-m", module, *sys.argv[1:]])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A markdown table; all columns but the first are aligned to the right."""
  lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
  lines += ["| " + " | ".join(row) + " |" for row in rows]
  return "\n".join(lines)


def report(
  out: Path, name: str, *, title: str, module: str, body: str, record: Mapping[str, object], note: str = "",
  packages: Sequence[str] = (),
) -> str:  # fmt: skip
  """Writes `out`/name.md and name.json and returns the former: title, command, machine, day, note and body.

  `note` is a sentence on the machine's state; the JSON has `record` below the same facts.
  """
  facts = {
    "command": command(module),
    "machine": machine(*packages),
    "date": datetime.date.today().isoformat(),
    "note": note,
  }
  about = f"{facts['machine']}; {facts['date']}. {note}".strip()
  text = "\n\n".join([f"# {title}", f"`{facts['command']}`", about, body]) + "\n"
  out.mkdir(parents=True, exist_ok=True)
  (out / f"{name}.md").write_text(text)
  (out / f"{name}.json").write_text(json.dumps(facts | dict(record), indent=2) + "\n")
  return text
