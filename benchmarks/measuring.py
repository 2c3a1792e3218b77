"""Time calls on a machine that may have other work, and write the results as JSON and as a table.

    times, first = interleaved({"a": call_a, "b": call_b}, rounds=15)
    quartiles(times["a"] / times["b"])

The repeats are interleaved: each round times all calls once, in a new order, so other work on the machine
slows all calls alike. Ratios compare times of one round. Before each timed call the same call is made once
untimed. So caches and free memory are in the state that this call leaves, as in a loop of this call alone.
"""

import argparse
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
"""Environment variables that change the measurements."""


def make_parser(
  doc: str | None, name: str, *, config: str | None = None, **numbers: int
) -> argparse.ArgumentParser:
  """Return a parser with the options that benchmarks share.

  Args:
    doc: the docstring of the benchmark.
    name: the default name of the result files.
    config: the default config; None if the benchmark reads none.
    numbers: further whole-number options with their defaults.
  """
  parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
  if config:
    parser.add_argument("--config", default=config)
    parser.add_argument("--dtype", default="auto", help="type of the matrix products; auto: float32 on a CPU")
  for option, default in numbers.items():
    parser.add_argument(f"--{option}", type=int, default=default)
  parser.add_argument("--name", default=name, help="name of the result files")
  parser.add_argument("--note", default="", help="a sentence about the state of the machine, for the table")
  parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the result files")
  return parser


def seconds(call: Callable[..., object], *args) -> float:
  """Return the seconds of one call, until the device has finished."""
  start = time.perf_counter()
  jax.block_until_ready(call(*args))
  return time.perf_counter() - start


def interleaved(
  calls: Mapping[str, Callable[[int], object]], rounds: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
  """Return the seconds of every round and the seconds of the first call, which compiles, both by name.

  Each call receives the number of the round, so it can draw new random numbers. The first call receives 0.
  """
  first = {name: seconds(call, 0) for name, call in calls.items()}
  times = {name: [] for name in calls}
  for i in range(rounds):
    for name in random.Random(i).sample(list(calls), len(calls)):
      seconds(calls[name], i)
      times[name].append(seconds(calls[name], i))
  return {name: np.array(each) for name, each in times.items()}, first


def quartiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
  """Return the "median", and "low" and "high", between which half of the values lie."""
  low, median, high = np.percentile(values, (25, 50, 75))
  return {"median": float(median), "low": float(low), "high": float(high)}


def spread(values: Mapping[str, float] | None, form: str = ".3f") -> str:
  """Format `quartiles` as "median (low-high)", and None as "-"."""
  if values is None:
    return "-"
  median, low, high = (format(values[name], form) for name in ("median", "low", "high"))
  return f"{median} ({low}-{high})"


def machine(*packages: str) -> str:
  """Describe the device and the versions of Python, JAX and `packages`."""
  device = jax.devices()[0]
  name = f"{os.cpu_count()} cores of {_cpu()}" if device.platform == "cpu" else device.device_kind
  if jax.device_count() > 1 and device.platform != "cpu":
    name = f"{jax.device_count()} x {name}"
  versions = [f"{package} {metadata.version(package)}" for package in ("jax", "jaxlib", *packages)]
  return f"{name}, Python {platform.python_version()}, {', '.join(versions)}"


def _cpu() -> str:
  """Return the name of the processor if Linux knows it."""
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names and names[0] != "unknown" else platform.machine()


def command(module: str) -> str:
  """Return the command line with its settings: `XLA_FLAGS=... python -m benchmarks.step --batch=8`."""
  settings = [f"{name}={shlex.quote(os.environ[name])}" for name in SETTINGS if os.environ.get(name)]
  return " ".join([*settings, "python", "-m", module, *sys.argv[1:]])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Return a Markdown table. All columns but the first are aligned to the right."""
  lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
  lines += ["| " + " | ".join(row) + " |" for row in rows]
  return "\n".join(lines)


def report(
  out: Path, name: str, *, title: str, module: str, body: str, record: Mapping[str, object], note: str = "",
  packages: Sequence[str] = (),
) -> str:  # fmt: skip
  """Write `out`/name.md and name.json, and return the text of the former.

  The text has title, command, machine, day, note and body. The JSON has the same facts and the `record`.

  Args:
    note: a sentence about the state of the machine.
    packages: the packages whose versions matter.
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
