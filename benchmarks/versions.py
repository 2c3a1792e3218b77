"""Compare the train step and matching of this checkout with those of another commit, in turns.

    python -m benchmarks.versions --old=COMMIT --config=configs/quickstart.py --batch=32 --repeats=15

Each side is a process in its own checkout; that of the other commit is a temporary `git worktree`. One side
works while the other waits. In each round each side makes every call twice, and the second call is timed. The
order of the sides changes from round to round, and each ratio compares two times of the same round. Both
sides make the same steps on the same batch, so equal code has equal losses, to the bit.
"""

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks import measuring

ROOT = Path(__file__).parents[1]
SIDES = ("old", "new")
STEP, MATCHING = "train step", "matching and loss"
WORKER = """
import sys, time
import jax, jax.numpy as jnp
from benchmarks import morphers, morphing, workload
from benchmarks.step import Step

path, batch, images, *overrides = sys.argv[1:]
config = workload.config_from(path, overrides)
config.batch_size = int(batch)
step = Step(config)
matching = morphing.loss_and_gradient(jnp.asarray(morphers.tokens(int(images), 196, 512, 1.5)), "image")
calls = {"train step": lambda i: step(), "matching and loss": matching}
for i, call in enumerate(calls.values()):
  jax.block_until_ready(call(0))
print("ready", flush=True)
count = 0
for line in sys.stdin:
  call = calls[line.strip()]
  for _ in range(2):
    start = time.perf_counter()
    result = jax.block_until_ready(call(count))
    seconds = time.perf_counter() - start
  count += 1
  value = result["loss"] if isinstance(result, dict) else result[0]
  print(seconds, float(value).hex(), flush=True)
"""
"""The program of a side. It uses only what old commits have too."""


class Side:
  """Runs the calls of one checkout in a process."""

  def __init__(self, checkout: Path, arguments):
    self.process = subprocess.Popen(
      [sys.executable, "-c", WORKER, *arguments], cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      text=True, env={name: value for name, value in os.environ.items() if name != "PYTHONHOME"},
    )  # fmt: skip
    self._answer("ready")

  def _answer(self, expected: str = "") -> str:
    line = self.process.stdout.readline().strip()
    if not line.startswith(expected) or not line:
      raise RuntimeError(f"{self.process.args[0]}: the process said {line!r} and ended.")
    return line

  def call(self, name: str) -> tuple[float, str]:
    """Make a call twice, and return the seconds and the loss of the second."""
    self.process.stdin.write(f"{name}\n")
    self.process.stdin.flush()
    seconds, loss = self._answer().split()
    return float(seconds), loss

  def close(self):
    self.process.stdin.close()
    self.process.wait()


@contextlib.contextmanager
def checkout(commit: str):
  """Check the commit out into a temporary folder."""
  from benchmarks import workload

  folder = workload.temporary_folder() / "old"
  git = lambda *arguments: subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True)
  git("worktree", "add", "--detach", str(folder), commit)
  try:
    yield folder
  finally:
    git("worktree", "remove", "--force", str(folder))


def compare(args, overrides) -> dict:
  """Return seconds and losses by call and side."""
  found = {name: {side: [] for side in SIDES} for name in (STEP, MATCHING)}
  arguments = [args.config, str(args.batch), str(args.images), *overrides]
  with checkout(args.old) as old, contextlib.ExitStack() as stack:
    sides = {}
    for side, folder in zip(SIDES, (old, ROOT), strict=True):
      sides[side] = Side(folder, arguments)
      stack.callback(sides[side].close)
    for i in range(args.repeats):
      for name, each in found.items():
        for side in random.Random(i).sample(SIDES, len(SIDES)):
          each[side].append(sides[side].call(name))
      print(f"round {i + 1} of {args.repeats}", flush=True)
  return found


def summarize(found, per_call: dict[str, int]) -> tuple[list[list[str]], dict]:
  """Return the rows of the table and the record."""
  rows, record = [], {}
  for name, each in found.items():
    seconds = {side: np.array([x[0] for x in each[side]]) for side in SIDES}
    losses = {side: [x[1] for x in each[side]] for side in SIDES}
    ms = {side: measuring.quartiles(1e3 * seconds[side] / per_call[name]) for side in SIDES}
    ratio = measuring.quartiles(seconds["new"] / seconds["old"])
    equal = sum(x == y for x, y in zip(losses["old"], losses["new"], strict=True))
    rows.append(
      [name, *(measuring.spread(ms[side], ".2f") for side in SIDES), measuring.spread(ratio),
       f"{equal} of {len(losses['old'])}"]
    )  # fmt: skip
    record[name] = {"ms_per_image": ms, "new_to_old": ratio, "equal_losses": equal, "losses": losses}
  return rows, record


def parse(argv=None):
  """Return the options of the benchmark and the remaining arguments, which override the config."""
  parser = measuring.make_parser(
    __doc__, "versions", config="configs/quickstart.py", batch=32, images=8, repeats=15
  )
  parser.add_argument("--old", required=True, help="the other commit")
  return parser.parse_known_args(argv)


def main(argv=None):
  args, overrides = parse(argv)
  name = subprocess.run(["git", "rev-parse", "--short", args.old], cwd=ROOT, capture_output=True, text=True)
  old = name.stdout.strip() or args.old
  rows, record = summarize(compare(args, overrides), {STEP: args.batch, MATCHING: args.images})
  body = (
    f"`{args.config}` at batch {args.batch}, and matching with loss and gradient for {args.images} images "
    f"of 196 tokens; median and quartiles of {args.repeats} rounds.\n\n"
    + measuring.table(["call", f"{old}, ms an image", "new, ms an image", "new to old", "equal losses"], rows)
  )
  print(measuring.report(
    args.out, args.name, title=f"Beside commit {old}", module="benchmarks.versions", note=args.note,
    body=body, record={"old": old, "config": args.config, "batch": args.batch, "calls": record},
  ))  # fmt: skip


if __name__ == "__main__":
  main()
