"""A world that fits a test: CIFAR-shaped random images, a small random CLIP, and the debug config on both."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import weights as clip_weights

NUM_TRAIN = 80


def write_cifar10(folder: Path) -> None:
  """Arrays where `datasets.cifar10` looks for them below the data_dir `folder`."""
  rng = np.random.default_rng(0)
  folder = folder / "cifar10" / "arrays"
  folder.mkdir(parents=True)
  for split, size in (("train", NUM_TRAIN), ("test", 32)):
    np.save(folder / f"{split}_images.npy", rng.integers(0, 256, (size, 32, 32, 3), np.uint8))
    np.save(folder / f"{split}_labels.npy", np.arange(size, dtype=np.int32) % 10)


def write_clip(folder: Path) -> Path:
  """A random image tower of width 32 on 8x8 patches."""
  config = clip.CLIPConfig(
    clip.ImageConfig(clip.Tower(32, 2, 2, 64), image_size=32, patch_size=4), text=None, embed_dim=16
  )
  tower = clip.ImageTower(config.image, config.embed_dim)
  params = tower.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  clip_weights.save(folder, config, {"image": params})
  return folder


def debug_config(world: Path, **changes):
  """configs/debug.py on this world; `changes` are top-level keys or dotted ones with __ for the dot."""
  config = importlib.import_module("configs.debug").get_config()
  config.teacher.path = str(world / "clip")
  config.data.dataset.data_dir = config.evals.knn.dataset.data_dir = str(world)
  for name, value in changes.items():
    *sections, key = name.split("__")
    section = config
    for part in sections:
      section = section[part]
    section[key] = value
  return config


def metrics(workdir: Path) -> list[dict]:
  """The lines of metrics.jsonl."""
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def timeless(line: dict) -> dict:
  """The numbers of a line that do not depend on the speed of the machine."""
  return {name: value for name, value in line.items() if name not in ("images_per_sec", "input_wait")}


def losses(workdir: Path) -> dict[int, float]:
  """step -> loss, of the lines that have one."""
  return {line["step"]: line["loss"] for line in metrics(workdir) if "loss" in line}
