"""Workdirs of runs that nobody trained, for tests of the report."""

import json
from pathlib import Path

import numpy as np
from etils import epath

from dtm_jax.records import snapshots

CONFIG = {
  "task": "pretrain",
  "seed": 0,
  "batch_size": 128,
  "total_steps": 300,
  "data": {"dataset": {"name": "cifar10"}, "image_size": 32},
  "teacher": {"name": "clip", "path": "assets/tiny_clip_cifar10"},
  "optim": {"lr": 0.0015, "betas": [0.9, 0.98]},
  "evals": {"knn": {"k": 20}, "snapshots": {"every_steps": 100}},
}
START = {
  "time": "2026-11-27T20:00:00+00:00",
  "step": 0,
  "host": "vm",
  "processes": 1,
  "devices": "8 cpu",
  "versions": {"dtm_jax": "1.0", "jax": "0.10.2", "python": "3.11.7"},
  "commit": "0123456789abcdef0123456789abcdef01234567",
  "command": "python -m dtm_jax.main --config=configs/quickstart.py",
  "changes": {},
}
CLASSES = ["airplane", "automobile", "bird"]


def lines(steps=(50, 100, 150, 200, 250, 300), scale=1.0):
  """Return the lines of metrics.jsonl of a run with evaluations at step 0 and the last."""
  found = [evaluation(0, 0.26)] if steps else []
  for step in steps:
    loss = scale * (0.1 + 10 / step)
    losses = {"loss": loss, "loss_dtm": loss, "loss_tokens": 2 * loss}
    speeds = {"images_per_sec": 140.5, "input_wait": 0.01, "epoch": step / 390, "compilations": 1}
    line = {"step": step, "groups_dtm": 34.5, "groups_tokens": 64.0, "learning_rate": 1e-3 / step}
    line |= losses | speeds
    found.append(line | (evaluation(step, 0.37) if step == steps[-1] else {}))
  return found


def evaluation(step, accuracy):
  watched = {"student_patches_cosine": 0.8, "student_patches_rank": 12.5, "teacher_tokens_agreement": 0.2}
  watched |= {"teacher_tokens_cosine": 0.7, "teacher_tokens_rank": 30.0}
  return {"step": step, "knn/student_accuracy": accuracy} | {f"snapshots/{k}": v for k, v in watched.items()}


def write(workdir: Path, content=None, config=CONFIG, classes=CLASSES, starts=(START,), images=4) -> Path:
  """Write a run: its metrics, its config, and snapshots at steps 0 and 300."""
  workdir.mkdir(parents=True, exist_ok=True)
  content = lines() if content is None else content
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
  if config is not None:
    (workdir / "config.json").write_text(
      json.dumps(config | {"class_names": classes, "starts": list(starts)})
    )
  if images:
    folder, rng = epath.Path(workdir), np.random.default_rng(0)
    image, index = rng.integers(0, 256, (images, 32, 32, 3), np.uint8), np.arange(images)
    snapshots.write_images(folder, image, index, index % 3)
    for step in (0, 300):
      groups = {name: rng.integers(0, 16, (images, 64)) for name in ("student_patches", "teacher_tokens")}
      snapshots.write_groups(folder, step, index, groups)
  return workdir
