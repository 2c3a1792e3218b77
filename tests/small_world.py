"""A world that fits in a test: CIFAR-shaped random images, a small random CLIP, the debug config on both."""

import importlib
import json
import os
import re
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import weights as clip_weights

NUM_TRAIN = 80


def write_cifar10(folder: Path) -> None:
  """Write random images and labels where `datasets.cifar10` looks for them in the data_dir `folder`."""
  rng = np.random.default_rng(0)
  folder = folder / "cifar10" / "arrays"
  folder.mkdir(parents=True)
  for split, size in (("train", NUM_TRAIN), ("test", 32)):
    np.save(folder / f"{split}_images.npy", rng.integers(0, 256, (size, 32, 32, 3), np.uint8))
    np.save(folder / f"{split}_labels.npy", np.arange(size, dtype=np.int32) % 10)


def write_clip(folder: Path) -> Path:
  """Write a random image tower of width 32 on a grid of 8x8 patches, and return its folder."""
  config = clip.CLIPConfig(
    clip.ImageConfig(clip.Tower(32, 2, 2, 64), image_size=32, patch_size=4), text=None, embed_dim=16
  )
  tower = clip.ImageTower(config.image, config.embed_dim)
  params = jax.jit(tower.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  clip_weights.save(folder, config, {"image": params})
  return folder


def debug_config(world: Path, **changes):
  """Return configs/debug.py on this world. `changes` sets options; `__` in a name stands for a dot."""
  config = importlib.import_module("configs.debug").get_config()
  config.teacher.path = str(world / "clip")
  config.data.dataset.data_dir = config.evals.knn.dataset.data_dir = str(world)
  return _changed(config, changes)


def probe_config(world: Path, **changes):
  """Return configs/linear_probe_cifar10.py on this world, with the steps of `debug_config`.

  It has the step that compiles soonest: a first run takes a fifth of the time of one of `debug_config`. It is
  for tests of what the loop does for every task. test_loop.py trains, stops and resumes `pretrain` too.
  """
  config = importlib.import_module("configs.linear_probe_cifar10").get_config()
  config.teacher = {"name": "clip", "path": str(world / "clip")}
  config.data.dataset.data_dir = config.evals.test.dataset.data_dir = str(world)
  config.batch_size, config.total_steps = 16, 6
  config.checkpoint.save_steps, config.log.log_steps = 3, 2
  config.evals.test.update(batch_size=32)
  return _changed(config, changes)


def _changed(config, changes):
  for name, value in changes.items():
    *sections, key = name.split("__")
    section = config
    for part in sections:
      section = section[part]
    section[key] = value
  return config


def counting_step(loss: float = 0.0):
  """Return a method that takes the place of a task's `train_step`: it only counts, and measures this loss."""
  return lambda self, state, *_: (state | {"step": state["step"] + 1}, {"loss": jnp.float32(loss)})


def metrics(workdir: Path) -> list[dict]:
  """Return the lines of metrics.jsonl."""
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def timeless(line: dict) -> dict:
  """Return the numbers of a line that do not depend on the speed of the machine."""
  return {name: value for name, value in line.items() if name not in ("images_per_sec", "input_wait")}


def losses(workdir: Path) -> dict[int, float]:
  """Return the loss of every step that has one."""
  return {line["step"]: line["loss"] for line in metrics(workdir) if "loss" in line}


def arguments(world: Path, workdir: Path | str, *more: str) -> list[str]:
  """Return the command line of configs/debug.py on this world."""
  return [
    "--config=configs/debug.py", f"--workdir={workdir}", f"--config.teacher.path={world / 'clip'}",
    f"--config.data.dataset.data_dir={world}", f"--config.evals.knn.dataset.data_dir={world}", *more,
  ]  # fmt: skip


def probe_arguments(world: Path, workdir: Path | str) -> list[str]:
  """Return the command line of `probe_config`."""
  options = [
    "teacher.name=clip", f"teacher.path={world / 'clip'}", f"data.dataset.data_dir={world}",
    f"evals.test.dataset.data_dir={world}", "batch_size=16", "total_steps=6", "checkpoint.save_steps=3",
    "log.log_steps=2", "evals.test.batch_size=32",
  ]  # fmt: skip
  flags = [f"--config.{option}" for option in options]
  return ["--config=configs/linear_probe_cifar10.py", f"--workdir={workdir}", *flags]


def environment(devices: int, **more: str) -> dict[str, str]:
  """Return the environment of a process with this number of CPU devices, which shares our compiled programs.

  The other XLA flags stay the same, because JAX looks a program up by its XLA flags too.
  """
  flags = re.sub(r"(host_platform_device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
  return os.environ | {"XLA_FLAGS": flags} | more


def cluster(devices: int, processes: int = 2) -> list[dict[str, str]]:
  """Return the environments of the processes of one run here, each with this number of CPU devices."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
  return [environment(devices, **shared, JAX_PROCESS_ID=str(index)) for index in range(processes)]
