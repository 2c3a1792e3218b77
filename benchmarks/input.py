"""Measure the input pipeline: images per CPU-second, memory over a long run, and the wait in training.

    python -m benchmarks.input --workdir=FOLDER_OF_A_RUN

Generated JPEGs of 500 x 375 pixels go through `data.train_batches` (decode, random resized crop to 224,
batch), through simplejpeg alone with as many threads, and through tf.data's fused decode-and-crop with a
bicubic resize. Each reader has a process, pinned to one core, and counts its CPU time. So the result is
images a second of a whole core, even if other work takes a part of the core. The repeats are interleaved.
The wait is read from the metrics.jsonl of the run in --workdir.
"""

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks import measuring, photos

SIZES = dict(batch=128, image_size=224, threads=16, examples=1_281_167)
GOALS = {"pipeline, images a second of one core": 1000, "pipeline / decode alone": 0.75, "wait": 0.01}
READERS = {}


def reader(function):
  """Register a reader, which yields the number of images of each batch."""
  READERS[function.__name__] = function
  return function


class Repeated:
  """A few photos, repeated to the size of ImageNet, because Grain's shuffle costs more in a small set."""

  def __init__(self, dataset, count: int):
    self._dataset, self._count = dataset, count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int):
    return self._dataset.source[index % self._dataset.num_examples]


@reader
def pipeline(folder, args, antialias=False):
  from dtm_jax import data
  from dtm_jax.datasets import folder as image_folder

  few = image_folder.build(data_dir=str(folder), labels=False)
  dataset = dataclasses.replace(few, num_examples=args.examples, source=Repeated(few, args.examples))
  batches = data.train_batches(
    dataset,
    batch_size=args.batch, image_size=args.image_size, seed=0, antialias=antialias, num_threads=args.threads,
  )  # fmt: skip
  for batch in batches:
    yield len(batch["image"])


@reader
def pipeline_antialias(folder, args):
  yield from pipeline(folder, args, antialias=True)


@reader
def decode_alone(folder, args, view=lambda image: image):
  import simplejpeg

  paths = sorted(folder.glob("*.jpg"))
  load = lambda i: view(simplejpeg.decode_jpeg(paths[i % len(paths)].read_bytes(), "RGB")).shape
  with ThreadPoolExecutor(args.threads) as pool:
    first = 0
    while True:
      yield len(list(pool.map(load, range(first, first + args.batch))))
      first += args.batch


@reader
def decode_and_crop(folder, args):
  """The pipeline adds to this: Grain, a random generator for each image, and the batch."""
  from dtm_jax.data.views import TrainView

  view, rng = TrainView(args.image_size), np.random.default_rng(0)
  yield from decode_alone(folder, args, lambda image: view(image, rng))


@reader
def tf_data(folder, args, antialias=False):
  import tensorflow as tf

  tf.config.set_visible_devices([], "GPU")

  def load(path):
    encoded = tf.io.read_file(path)
    box = tf.image.sample_distorted_bounding_box(
      tf.io.extract_jpeg_shape(encoded), tf.zeros((0, 0, 4)), area_range=(0.2, 1.0),
      aspect_ratio_range=(3 / 4, 4 / 3), use_image_if_no_bounding_boxes=True, min_object_covered=0.0,
    )  # fmt: skip
    window = tf.concat([box[0][:2], box[1][:2]], 0)
    image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
    image = tf.image.resize(image, (args.image_size,) * 2, "bicubic", antialias=antialias)
    return tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8)

  paths = tf.data.Dataset.from_tensor_slices([str(path) for path in sorted(folder.glob("*.jpg"))])
  batches = paths.repeat().shuffle(1000).map(load, num_parallel_calls=args.threads)
  for batch in batches.batch(args.batch).prefetch(2).as_numpy_iterator():
    yield len(batch)


@reader
def tf_data_antialias(folder, args):
  yield from tf_data(folder, args, antialias=True)


def resident_mb() -> float:
  return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(name: str, folder: Path, args) -> dict:
  """Measure one reader in the child process, after a first batch that warms it up."""
  os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
  batches = READERS[name](folder, args)
  next(batches)
  images, memory = 0, []
  cpu, wall = time.process_time(), time.perf_counter()
  while images < args.count:
    images += next(batches)
    memory.append((images, resident_mb()))
  cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
  return {"images": images, "cpu_s": cpu, "wall_s": wall, "memory": memory}


def in_child(name: str, folder: Path, args, count: int) -> dict:
  options = {"child": name, "folder": folder, "count": count}
  options |= {name: getattr(args, name) for name in SIZES}
  command = [
    sys.executable,
    "-m",
    "benchmarks.input",
    *(f"--{key}={value}" for key, value in options.items()),
  ]
  quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, env=os.environ | quiet, check=True, capture_output=True, text=True)
  return json.loads(done.stdout.splitlines()[-1])


def growth(memory: list[tuple[int, float]]) -> dict[str, float]:
  """Return the MB of memory at the end, and the MB per 10,000 images over the later two thirds of a run."""
  images, mb = np.array(memory[len(memory) // 3 :]).T
  slope = np.polyfit(images, mb, 1)[0] if len(mb) > 1 else float("nan")
  return {"images": int(images[-1]), "end_mb": float(mb[-1]), "mb_per_10000_images": 1e4 * float(slope)}


def waits(workdir: Path) -> np.ndarray:
  """Return the share of its time that each logged window waited for input, without the first window.

  The first window compiles.
  """
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  found = [line[WAIT] for line in lines if WAIT in line][1:]
  if not found:
    raise ValueError(f"{workdir}/metrics.jsonl has no two lines with {WAIT!r}.")
  return np.array(found)


WAIT = "input_wait"


def collect(args) -> dict:
  with TemporaryDirectory(prefix="dtm_jax_photos_") as folder:
    size = photos.write_photos(Path(folder), args.photos)
    runs = {name: [] for name in READERS}
    for i in range(args.repeats):
      for name in random.Random(i).sample(list(READERS), len(READERS)):
        runs[name].append(in_child(name, Path(folder), args, args.count))
    memory = growth(in_child("pipeline", Path(folder), args, args.long)["memory"]) if args.long else None

  rates = {name: np.array([run["images"] / run["cpu_s"] for run in each]) for name, each in runs.items()}
  rows = {
    name: {
      "images_per_core_second": measuring.quartiles(rate),
      "to_decode_alone": measuring.quartiles(rate / rates["decode_alone"]),
    }
    for name, rate in rates.items()
  }
  wait = measuring.quartiles(waits(args.workdir)) if args.workdir else None
  return {"mean_bytes": size, "readers": rows, "memory": memory, "wait_share": wait, "goals": GOALS}


def markdown(record: dict) -> str:
  rows = [
    [name.replace("_", " "), measuring.spread(row["images_per_core_second"], ".0f"),
     measuring.spread(row["to_decode_alone"], ".2f")]
    for name, row in record["readers"].items()
  ]  # fmt: skip
  memory, wait = record["memory"], record["wait_share"]
  long = "Memory over a long run: not measured." if memory is None else (
    "Memory over {images} images: {end_mb:.0f} MB at the end, {mb_per_10000_images:+.1f} MB for each 10,000 "
    "images over the later two thirds.".format(**memory)
  )  # fmt: skip
  waited = "Wait for input in training: not measured (--workdir)." if wait is None else (
    f"Wait for input in training, of the time: {measuring.spread(wait, '.2%')}."
  )  # fmt: skip
  return "\n\n".join([
    f"JPEGs of 500 x 375 pixels, {record['mean_bytes'] / 1000:.0f} kB on average. Images a second of one "
    "core's CPU time, and the ratio to decoding alone; median and quartiles.",
    measuring.table(["reader", "images / core s", "to decode alone"], rows),
    long, waited, "Goals: 1,000 images a second of one core; 0.75 of decode alone; a wait of 1 %.",
    "Input runs on the host. The wait with an accelerator has not been measured.",
  ])  # fmt: skip


def parse(arguments=None):
  """Return the options of the benchmark."""
  parser = measuring.make_parser(__doc__, "input", photos=400, count=2000, long=20000, repeats=5, **SIZES)
  parser.add_argument("--workdir", type=Path, help="report the wait of this run")
  parser.add_argument("--child", choices=list(READERS), help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
  return parser.parse_args(arguments)


def main(arguments=None):
  args = parse(arguments)
  if args.child:
    print(json.dumps(measure(args.child, args.folder, args)), flush=True)
    os._exit(0)  # the threads of the readers never end
  record = collect(args)
  sizes = {name: getattr(args, name) for name in ("count", "repeats", *SIZES)}
  print(measuring.report(
    args.out, args.name, title="What input costs", module="benchmarks.input", body=markdown(record),
    record=sizes | record, note=args.note, packages=("grain", "simplejpeg", "tensorflow-cpu"),
  ))  # fmt: skip


if __name__ == "__main__":
  main()
