"""Compare the train step, matching and k-means of this checkout with those of another commit, in turns.

    python -m benchmarks.versions --old=COMMIT --config=configs/quickstart.py --batch=32 --repeats=15

Each side is a process in its own checkout; that of the other commit is a temporary `git worktree`. One side
works while the other waits. In each round each side makes every call twice, and the second call is timed. The
order of the sides changes from round to round, and each ratio compares two times of the same round. Both
sides make the same steps on the same batch, so equal code has equal losses, to the bit. Processor time is
that of all threads of a side. Other work on the machine disturbs it less than the seconds.
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
STEP, MATCHING, KMEANS = "train step", "matching and loss", "k-means"
WORKER = """
import sys, time
import jax, jax.numpy as jnp
from benchmarks import morphers, morphing, workload
from benchmarks.step import Step
from dtm_jax import plugins

path, batch, images, *overrides = sys.argv[1:]
config = workload.config_from(path, overrides)
config.batch_size = int(batch)
step = Step(config)
tokens = jnp.asarray(morphers.tokens(int(images), 196, 512, 1.5))
assign, image, N = plugins.build("morphers", {"name": "kmeans"}), jnp.zeros((int(images), 224, 224, 3)), 196
labels = jax.jit(lambda *arrays: (jnp.sum(assign(*arrays) * jnp.arange(N)),))
calls = {
  "train step": lambda i: step(),
  "matching and loss": morphing.loss_and_gradient(tokens, "image"),
  "k-means": lambda i: labels(jax.random.key(i), tokens, image),
}
for call in calls.values():
  jax.block_until_ready(call(0))
print("ready", flush=True)
count = 0
for line in sys.stdin:
  call = calls[line.strip()]
  for _ in range(2):
    start, cpu = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(call(count))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
  count += 1
  value = result["loss"] if isinstance(result, dict) else result[0]
  print(seconds, cpu, float(value).hex(), flush=True)
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

  def call(self, name: str) -> tuple[float, float, str]:
    """Make a call twice, and return the seconds, the processor's seconds and the loss of the second."""
    self.process.stdin.write(f"{name}\n")
    self.process.stdin.flush()
    seconds, cpu, loss = self._answer().split()
    return float(seconds), float(cpu), loss

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
  found = {name: {side: [] for side in SIDES} for name in (STEP, MATCHING, KMEANS)}
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
    cpu = {side: np.array([x[1] for x in each[side]]) for side in SIDES}
    losses = {side: [x[2] for x in each[side]] for side in SIDES}
    ms = {side: measuring.quartiles(1e3 * seconds[side] / per_call[name]) for side in SIDES}
    ratio, cpu_ratio = (measuring.quartiles(x["new"] / x["old"]) for x in (seconds, cpu))
    equal = sum(x == y for x, y in zip(losses["old"], losses["new"], strict=True))
    rows.append(
      [name, *(measuring.spread(ms[side], ".2f") for side in SIDES), measuring.spread(ratio),
       measuring.spread(cpu_ratio), f"{equal} of {len(losses['old'])}"]
    )  # fmt: skip
    ratios = {"new_to_old": ratio, "cpu_new_to_old": cpu_ratio}
    record[name] = {"ms_per_image": ms, **ratios, "equal_losses": equal, "losses": losses}
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
  rows, record = summarize(
    compare(args, overrides), {STEP: args.batch, MATCHING: args.images, KMEANS: args.images}
  )
  body = (
    f"`{args.config}` at batch {args.batch}, matching with loss and gradient, and k-means, for "
    f"{args.images} images of 196 tokens; median and quartiles of {args.repeats} rounds.\n\n"
    + measuring.table(
      ["call", f"{old}, ms an image", "new, ms an image", "new to old", "in processor time", "equal results"],
      rows,
    )
  )
  print(measuring.report(
    args.out, args.name, title=f"Beside commit {old}", module="benchmarks.versions", note=args.note,
    body=body, record={"old": old, "config": args.config, "batch": args.batch, "calls": record},
  ))  # fmt: skip


if __name__ == "__main__":
  main()
