"""Describe the code and the machine of a run: versions, commit, checksum of the source, devices."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import jax

_PACKAGE = Path(__file__).parents[1]


def describe() -> dict[str, Any]:
  """Return host, processes, devices, versions, commit and command of this process."""
  return {
    "host": platform.node(),
    "processes": jax.process_count(),
    "devices": devices(),
    "versions": _versions(),
    "commit": _commit(),
    "command": shlex.join(sys.argv),
  }


def devices() -> str:
  """Return the number and the kind of the devices of the run."""
  return f"{jax.device_count()} {jax.devices()[0].device_kind}"


def checksum_of_code() -> int:
  """Return one CRC-32 of all source files of the package."""
  crc = 0
  for path in sorted(_PACKAGE.rglob("*.py")):
    crc = zlib.crc32(path.read_bytes(), crc)
  return crc


def _versions() -> dict[str, str | None]:
  try:
    own = importlib.metadata.version("dtm_jax")
  except importlib.metadata.PackageNotFoundError:  # used from a checkout
    own = None
  return {"dtm_jax": own, "jax": jax.__version__, "python": platform.python_version()}


def _commit() -> str | None:
  """Return the git commit of the code, with "-dirty" if files differ; None outside of a repository."""
  command = ["git", "-C", str(_PACKAGE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return done.stdout.strip() or None
