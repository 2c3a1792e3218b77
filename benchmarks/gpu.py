"""Measure everything that a GPU decides: `bash scripts/gpu.sh` runs this file.

    python -m benchmarks.gpu --minutes=8 [--only=peer,profile] [--config.OPTION=VALUE]

Each section is a process with its own time limit, and a section that fails or is too slow stops no other. A
section's output appears as it comes and is saved in --out with its table and numbers; summary.md has all
tables. With --minutes, sections are chosen by their importance until their estimates fill the time, and run
in the order of the list. A section that needs an option which the config lacks is skipped with a line.

The sections share a new cache of compiled programs, so "compilation from the cache" is that of a second
start.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

CONFIG, LARGE, QUICKSTART = "configs/vitb16.py", "configs/vitl16.py", "configs/quickstart.py"
OPTIONS_OFF = (
  "teacher.attention=xla",
  "student.attention=xla",
  "student.attention=cudnn",
  "student.attention=pallas",
  "student.unroll=1",
  "student.remat=elementwise",
  "student.remat=activations",
  "student.stream_dtype=float32",
  "teacher.stream_dtype=float32",
  "morphers.dtm.implementation=plain",
  "morphers.dtm.implementation=gram",
  "morphers.dtm.implementation=pallas",
)
"""Each is one variant of the step, beside the defaults."""

QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
"""Flags for toys, which spend most of their time in compilation."""


@dataclasses.dataclass(frozen=True)
class Section:
  """Describe one process.

  Attributes:
    command: the module and its arguments.
    seconds: how long it is expected to take on an H200.
    importance: with --minutes, sections with a smaller number are chosen first.
    needs: options of the config, and modules, without which the section is skipped.
    settings: environment variables.
    saves: whether the module itself writes NAME.md and NAME.json.
  """

  name: str
  command: tuple[str, ...]
  seconds: int
  importance: int
  needs: tuple[str, ...] = ()
  settings: tuple[tuple[str, str], ...] = ()
  saves: bool = True


def sections(smoke: bool, teacher: str | None) -> list[Section]:
  """Return all sections in their order. `smoke` makes them toys; `teacher` is the folder of a small CLIP."""
  config = "configs/debug.py" if smoke else CONFIG
  batch = lambda number: f"--batch={8 if smoke else number}"
  own = (f"--config.teacher.path={teacher}",) if teacher else ()
  few = ("--rounds=1", "--steps=1", "--warm_up=1", "--again=0") if smoke else ()

  def step(name: str, importance: int, *more: str, path: str = config, images: int = 256, seconds: int = 90):
    needs = tuple(each.partition("=")[0] for each in more)
    overrides = (f"--config.{each}" for each in more)
    command = ("benchmarks.throughput", f"--config={path}", batch(images), *few, *own, *overrides)
    return Section(name, command, seconds, importance, needs)

  size = ("--size=64", "--mib=1", "--repeats=1") if smoke else ()
  toy = ("--tokens=16", "--width=16", "--max_rounds=2", "--repeats=1") if smoke else ()
  layer = ("--tokens=9", "--heads=2", "--repeats=1") if smoke else ()
  turns = ("--repeats=1",) if smoke else ()
  small = "configs/debug.py" if smoke else QUICKSTART
  calls = ("--rounds=1", "--steps=2", "--calls=2", "--images=32", "--batch=8") if smoke else ()
  variants = OPTIONS_OFF[-1:] if smoke else OPTIONS_OFF
  profile = (f"--config={config}", f"--config.batch_size={8 if smoke else 256}", *own)
  return [
    Section("ceiling", ("benchmarks.ceiling", *size), 20, 0),
    step("step", 1),
    *(step(f"step, {option}", 6, option) for option in variants),
    Section(
      "profile", ("scripts.studies.profile_step", *profile, "--json={out}/profile.json"), 100, 3, saves=False,
      settings=(("XLA_FLAGS", "--xla_gpu_enable_command_buffer="),),
    ),
    Section("matching", ("benchmarks.morphing", batch(256), "--draws=1", *toy), 60, 2),
    Section(
      "attention", ("benchmarks.attention", batch(256), *layer), 60, 4, needs=("dtm_jax.models.attention",)
    ),
    Section("peer", ("benchmarks.peer", f"--config={config}", batch(256), *turns, *own), 150, 5),
    step("ViT-L", 7, path=config if smoke else LARGE, seconds=150),
    *(step(f"batch {n}", 8, images=n) for n in ((8,) if smoke else (128, 512))),
    Section("quickstart", ("benchmarks.resident", f"--config={small}", *own, *calls), 90, 9),
  ]  # fmt: skip


def choose(every: Sequence[Section], minutes: float | None) -> list[Section]:
  """Return the sections that fit, in their order. None for `minutes` chooses all."""
  if minutes is None:
    return list(every)
  left, chosen = 60 * minutes, set()
  for section in sorted(every, key=lambda section: section.importance):
    if section.seconds <= left:
      chosen.add(section.name)
      left -= section.seconds
  return [section for section in every if section.name in chosen]


def lacking(section: Section, config) -> str | None:
  """Return what the section needs and the checkout lacks, or None."""
  for need in section.needs:
    if need.startswith(("benchmarks.", "dtm_jax.")):
      if importlib.util.find_spec(need) is None:
        return f"the module {need}"
      continue
    place = config
    for part in need.split("."):
      if part not in place:
        return f"the option {need}"
      place = place[part]
  return None


def run(section: Section, out: Path, limit: float, more: Sequence[str], settings: dict[str, str]) -> dict:
  """Run one section, print and save its output, and return its status and seconds."""
  stem = section.name.replace(", ", "_").replace(" ", "_").replace("=", "_").replace(".", "_")
  command = [part.replace("{out}", str(out)) for part in section.command]
  if section.saves:
    command += [f"--out={out}", f"--name={stem}"]
  takes_config = any(part.startswith("--config=") for part in command)
  command += more if takes_config else ()
  environment = os.environ | settings
  for name, value in section.settings:
    environment[name] = f"{environment.get(name, '')} {value}".strip()
  print(f"\n=== {section.name}: python -m {' '.join(command)}  (at most {limit:.0f} s)", flush=True)
  start = time.monotonic()
  process = subprocess.Popen(
    [os.environ.get("PYTHON", sys.executable), "-m", *command], env=environment, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
  )  # fmt: skip
  timer = threading.Timer(limit, _end, [process])
  timer.start()
  lines = []
  with (out / f"{stem}.log").open("w") as log:
    for line in process.stdout:
      print(line, end="", flush=True)
      log.write(line)
      log.flush()
      lines.append(line)
  code, seconds = process.wait(), time.monotonic() - start
  timer.cancel()
  status = "done" if code == 0 else "too slow" if seconds >= limit else f"failed with code {code}"
  if not section.saves and code == 0:
    (out / f"{stem}.md").write_text("".join(lines))
  print(f"=== {section.name}: {status} after {seconds:.0f} s", flush=True)
  return {"section": section.name, "status": status, "seconds": round(seconds, 1), "file": stem}


def _end(process: subprocess.Popen) -> None:
  """End a process and its children."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)


def save(out: Path, done: Sequence[dict]) -> None:
  """Write summary.json and summary.md: the status of every section so far, and its table."""
  (out / "summary.json").write_text(json.dumps(list(done), indent=2) + "\n")
  rows = ["| section | status | seconds |", "|---|---|---:|"]
  rows += [f"| {each['section']} | {each['status']} | {each['seconds']} |" for each in done]
  texts = [out / f"{each['file']}.md" for each in done if each["status"] == "done"]
  tables = [path.read_text() for path in texts if path.exists()]
  (out / "summary.md").write_text("\n\n".join(["# scripts/gpu.sh", "\n".join(rows), *tables]))


def parse(argv=None):
  """Return the options of this script and the remaining arguments, which override the config."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--minutes", type=float, help="choose the sections that fit (default: all)")
  parser.add_argument("--only", help="names of sections, separated by commas")
  parser.add_argument("--list", action="store_true", help="show the sections and end")
  parser.add_argument("--smoke", action="store_true", help="toy sizes, for a test on any device")
  parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of the results")
  args, more = parser.parse_known_args(argv)
  if unknown := [each for each in more if not each.startswith("--config.")]:
    parser.error(f"unknown arguments: {' '.join(unknown)}")
  known = dict.fromkeys(each.name.partition(",")[0] for each in sections(args.smoke, None))
  if unknown := [name for name in (args.only or "").split(",") if args.only and name not in known]:
    parser.error(f"--only={args.only}: unknown {', '.join(unknown)}; the sections are {', '.join(known)}")
  return args, more


def main(argv=None):
  args, more = parse(argv)
  with tempfile.TemporaryDirectory(prefix="dtm_jax_gpu_") as folder:
    teacher = _small_clip(Path(folder)) if args.smoke else None
    every = sections(args.smoke, teacher)
    if args.only:
      names = args.only.split(",")
      every = [each for each in every if each.name in names or each.name.partition(",")[0] in names]
    if args.list:
      for each in every:
        print(f"{each.name:40} about {each.seconds:4} s, importance {each.importance}")
      return
    config = _config("configs/debug.py" if args.smoke else CONFIG)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "cache")}
    if args.smoke:  # most of its time is compilation
      flags = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILATION}"
      settings |= {"XLA_FLAGS": flags.strip(), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"}
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    done = []
    for section in choose(every, args.minutes):
      left = deadline - time.monotonic()
      if missing := lacking(section, config):
        print(f"\n=== {section.name}: skipped, because {missing} is not there", flush=True)
        status = {"status": f"skipped without {missing}", "seconds": 0, "file": ""}
        done.append({"section": section.name, **status})
      elif left < section.seconds / 2:
        print(f"\n=== {section.name}: skipped, because only {left:.0f} s are left", flush=True)
        done.append({"section": section.name, "status": "skipped: no time left", "seconds": 0, "file": ""})
      else:
        done.append(run(section, args.out, min(3 * section.seconds, left), more, settings))
      save(args.out, done)
  failed = [each["section"] for each in done if each["status"].startswith(("failed", "too slow"))]
  print(f"\nAll tables: {args.out / 'summary.md'}" + (f". Failed: {', '.join(failed)}" if failed else ""))
  sys.exit(1 if failed else 0)


def _config(path: str):
  """Return the config in this file, as it is."""
  return importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config()


def _small_clip(folder: Path) -> str:
  """Write a small random CLIP for configs/debug.py, and return its folder."""
  from benchmarks import workload
  from dtm_jax.models.clip import model as clip

  image = clip.ImageConfig(clip.Tower(32, 2, 2, 64), image_size=32, patch_size=4)
  return str(workload.random_clip(folder / "clip", clip.CLIPConfig(image, text=None, embed_dim=16)))


if __name__ == "__main__":
  main()
