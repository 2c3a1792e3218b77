"""Tell whether a process that a file names still runs on this machine.

A process id alone proves nothing, because the system gives it to another process later. Machine, boot,
namespace of processes and start time together name one process.
"""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def describe(pid: int) -> dict[str, Any]:
  """Return the fields that name a process of this machine: host, pid, started, boot and namespace."""
  boot, namespace = _boot_and_namespace()
  return {
    "host": platform.node(), "pid": pid, "started": _start_time(pid), "boot": boot, "namespace": namespace,
  }  # fmt: skip


def is_alive(process: Mapping[str, Any]) -> bool | None:
  """Return whether the described process runs here, or None if this machine cannot tell."""
  here = (platform.node(), *_boot_and_namespace())
  if "pid" not in process or (process.get("host"), process.get("boot"), process.get("namespace")) != here:
    return None
  if not os.path.exists("/proc/self/stat"):
    return _exists(process["pid"])
  return _start_time(process["pid"]) == process.get("started")


def _start_time(pid: int) -> int | None:
  """Return when the process started, in clock ticks after boot; None if it has ended."""
  try:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return None
  return None if fields[0] in "ZX" else int(fields[19])


def _exists(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True


def _boot_and_namespace() -> tuple[str | None, str | None]:
  """Return identifiers of this boot and of this namespace of processes; None if there are none."""
  try:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
  except OSError:
    return None, None
