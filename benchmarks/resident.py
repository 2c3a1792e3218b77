"""Time the quickstart with images from the host and with images on the device, one or several steps a call.

    python -m benchmarks.resident --config=configs/quickstart.py --steps=100 --calls=10,50

Four ways of feeding the same train step are timed in turns: the input pipeline of the host; images on the
device (`data.device_resident`); and these with `train.steps_per_call`. The images are synthetic, 50,000 of
the size of CIFAR-10. No file and no network is needed.
"""

import itertools
import time

import jax
import numpy as np

from benchmarks import measuring, workload
from dtm_jax import data
from dtm_jax.training.feeds import open_feed
from dtm_jax.training.spans import Stops, spans

HOST, DEVICE = "host pipeline", "on the device"


class Random:
  """A source of random images of `side` pixels, all in memory."""

  def __init__(self, count: int, side: int):
    self._images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> data.Example:
    return {"image": self._images[index], "label": index % 10, "name": f"random/{index}"}


class Variant:
  """One way of feeding the step, with its own state.

  Attributes:
    losses: of all steps so far.
    compile_seconds: for tracing, lowering and compiling.
  """

  def __init__(self, config, task, dataset: data.Dataset, resident: bool, size: int):
    config = config.copy_and_resolve_references()
    config.data.device_resident = resident
    mesh = workload.mesh_of(config)
    self._key = jax.random.key(config.seed)
    self._state, self._frozen = workload.state_and_frozen(config, task, mesh)
    self._feed = open_feed(config, dataset, mesh)
    self._calls = self._feed.calls(0, spans(0, Stops(10**9, {}), size))
    self._size, self.losses = size, []
    program = self._feed.jit(task, self._state, self._frozen, several=size > 1)
    first = next(self._calls)
    self._calls = itertools.chain([first], self._calls)
    start = time.perf_counter()
    lowered = program.lower(self._state, self._frozen, self._feed.arrays, first.rows, self._key)
    self._program = lowered.compile()
    self.compile_seconds = time.perf_counter() - start

  def seconds(self, steps: int) -> float:
    """Return the seconds of so many steps, until the device has finished."""
    losses, start = [], time.perf_counter()
    for call in itertools.islice(self._calls, steps // self._size):
      self._state, measurements = self._program(
        self._state, self._frozen, self._feed.arrays, call.rows, self._key
      )
      losses.append(measurements["loss"])
    jax.block_until_ready(losses)
    seconds = time.perf_counter() - start
    self.losses += np.concatenate([np.atleast_1d(loss) for loss in losses]).tolist()
    return seconds


def parse(argv=None):
  """Return the options of the benchmark and the remaining arguments, which override the config."""
  parser = measuring.make_parser(
    __doc__, "resident", config="configs/quickstart.py", rounds=5, steps=100, images=50_000, batch=0
  )
  parser.add_argument("--calls", default="10,50", help="numbers of steps per call, separated by commas")
  args, overrides = parser.parse_known_args(argv)
  args.calls = [int(size) for size in args.calls.split(",")]
  if wrong := [size for size in args.calls if args.steps % size]:
    parser.error(f"--steps={args.steps} must be a multiple of --calls={wrong[0]}")
  return args, overrides


def collect(args, overrides) -> dict:
  """Return the numbers of all variants."""
  config = workload.config_from(args.config, overrides, args.dtype)
  config.batch_size = args.batch or config.batch_size
  task, side = workload.task_of(config), config.data.image_size
  dataset = data.Dataset("random", args.images, None, Random(args.images, side), image_size=side)
  kinds = {HOST: (False, 1), DEVICE: (True, 1)}
  kinds |= {f"{DEVICE}, {size} steps a call": (True, size) for size in args.calls}
  variants = {}
  for name, kind in kinds.items():
    variants[name] = Variant(config, task, dataset, *kind)
    print(f"{name}: compiled in {variants[name].compile_seconds:.1f} s", flush=True)
  seconds = {name: [] for name in variants}
  for i in range(-1, args.rounds):  # the first round warms up
    order = list(variants)
    np.random.default_rng(i + 1).shuffle(order)
    for name in order:
      taken = variants[name].seconds(args.steps)
      if i >= 0:
        seconds[name].append(taken)
        print(f"round {i + 1}: {name}: {args.steps * config.batch_size / taken:,.0f} images/s", flush=True)
  rates = {name: args.steps * config.batch_size / np.array(each) for name, each in seconds.items()}
  expected = np.array(variants[DEVICE].losses)
  return {
    "config": args.config,
    "overrides": overrides,
    "batch": config.batch_size,
    "images": args.images,
    "steps": args.steps,
    "images_per_s": {name: measuring.quartiles(rate) for name, rate in rates.items()},
    "to_host": {name: measuring.quartiles(rate / rates[HOST]) for name, rate in rates.items()},
    "compile_s": {name: each.compile_seconds for name, each in variants.items()},
    "loss_difference": {
      name: float(np.max(np.abs(np.array(each.losses) / expected - 1)))
      for name, each in variants.items()
      if name != HOST
    },
  }


def markdown(record, args) -> str:
  """Return the table of all variants."""
  rows = []
  for name, rate in record["images_per_s"].items():
    difference = record["loss_difference"].get(name)
    cells = [measuring.spread(rate, ",.0f"), measuring.spread(record["to_host"][name], ".3f")]
    cells += [f"{record['compile_s'][name]:.1f}", "-" if difference is None else f"{difference:.1g}"]
    rows.append([name, *cells])
  about = (
    f"`{record['config']}` {' '.join(record['overrides'])}: batch {record['batch']}, {record['images']:,} "
    f"random images. Median and quartiles of {args.rounds} rounds of {record['steps']} steps; the variants "
    "run in turns. The last column is the largest relative difference of a loss from that of single steps "
    "with the same images; other draws give the host's pipeline other losses."
  )
  header = ["images", "images/s", "to the host pipeline", "compilation, s", "loss difference"]
  return about + "\n\n" + measuring.table(header, rows)


def main(argv=None):
  args, overrides = parse(argv)
  record = collect(args, overrides)
  print(measuring.report(
    args.out, args.name, title="Images on the device", module="benchmarks.resident", note=args.note,
    body=markdown(record, args), record=record,
  ))  # fmt: skip


if __name__ == "__main__":
  main()
