"""Start runs with mistyped or broken inputs: each is refused in seconds, and the message names it."""

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tests.campaign import runs
from tests.campaign.trial import Trial

TITLE = "bad inputs"

VALUES = {
  "--config.student.drop_path": ("1.5", "-0.5", "nan"),
  "--config.optim.lr": ("-0.001", "inf"),
  "--config.optim.weight_decay": ("-0.05",),
  "--config.optim.clip_norm": ("-1.0",),
  "--config.optim.betas": ("(2.0,2.0)", "(0.9,)"),
  "--config.optim.accumulate": ("0", "-1"),
  "--config.optim.warmup_steps": ("-1",),
  "--config.augment.flip": ("2.0", "-0.1"),
  "--config.augment.color_jitter": ("-1.0",),
  "--config.augment.normalization": ("imagnet",),
  "--config.data.view.scale": ("(2.0,3.0)", "(0.0,0.0)", "(1.0,0.4)"),
  "--config.data.view.crop": ("randon_resized",),
  "--config.data.image_size": ("-32", "33"),
  "--config.data.num_threads": ("0",),
  "--config.data.dataset.name": ("cifar11",),
  "--config.data.split": ("trian", "train[:0%]", "train[90%"),
  "--config.teacher.name": ("clipp",),
  "--config.teacher.dtype": ("foo",),
  "--config.teacher.path": ("/nowhere/clip",),
  "--config.student.patch_size": ("0", "5"),
  "--config.student.dtype": ("foo",),
  "--config.student.num_heads": ("0", "5"),
  "--config.student.depth": ("0",),
  "--config.student.remat": ("some",),
  "--config.batch_size": ("0", "-16", "15"),
  "--config.total_steps": ("-1",),
  "--config.checkpoint.save_steps": ("0", "-3"),
  "--config.checkpoint.keep": ("0", "-1"),
  "--config.log.log_steps": ("0",),
  "--config.mesh.data": ("3",),
  "--config.mesh.fsdp": ("0",),
  "--config.morphers.dtm.weight": ("-1.0",),
  "--config.morphers.dtm.name": ("bipartit",),
  "--config.morphers.dtm.min_groups": ("0", "65"),
  "--config.morphers.dtm.max_rounds": ("0",),
  "--config.mask.kind": ("blocks",),
  "--config.loss.distance": ("l3",),
  "--config.loss.schedules": ("0",),
  "--config.evals.knn.k": ("0",),
  "--config.bach_size": ("8",),
  "--config.task": ("pretrian",),
  "--workdir": ("",),
}
"""Flag -> values that must be refused. The message must name the key and the value."""

Check = Callable[[Path, runs.World], tuple[list[str], dict[str, str], list[str]]]


def trials(world: runs.World, reference: Path, seed: int, smoke: bool) -> Iterator[Trial]:
  """Yield one start for each value of VALUES and each broken file or environment of FILES."""
  pairs = [(flag, value) for flag, values in VALUES.items() for value in values]
  for flag, value in pairs[:1] if smoke else pairs:
    words = [flag.rpartition(".")[2].removeprefix("--"), value.split(",")[0].strip("(")]
    yield Trial(
      f"{flag}={value}",
      lambda folder, f=flag, v=value, w=words: _refused(folder, world, [f"{f}={v}"], {}, w),
    )
  for name, make in list(FILES.items())[:1] if smoke else FILES.items():
    yield Trial(name, lambda folder, make=make: _refused(folder, world, *make(folder, world)))


def _refused(folder: Path, world: runs.World, flags: list[str], env: dict[str, str], words: list[str]) -> str:
  arguments = world.arguments(folder / "run", *flags)
  if any(flag.startswith("--config=") for flag in flags):
    arguments = flags
  process = runs.Process(arguments, folder / "log", env=env)
  code, text = process.wait(120), process.text()
  assert code != 0, f"accepted:\n{text[-800:]}"
  assert "Traceback" not in text, f"a traceback:\n{text[-1500:]}"
  missing = [word for word in words if word not in text]
  assert not missing, f"the message does not have {missing}:\n{text[-1000:]}"
  assert not (folder / "run" / "config.json").exists(), "a refused start left records"
  return next((line for line in reversed(text.splitlines()) if line.strip()), "")[:120]


def _weights(name: str, contents: bytes, words: list[str]) -> Check:
  """Return what makes a teacher's folder in which the file `name` has other contents."""

  def make(folder: Path, world: runs.World) -> tuple[list[str], dict[str, str], list[str]]:
    target = folder / "weights"
    target.mkdir()
    for path in (world.folder / "clip").iterdir():
      (target / path.name).write_bytes(contents if path.name == name else path.read_bytes())
    return [f"--config.teacher.path={target}"], {}, words

  return make


def _with_nan(folder: Path, world: runs.World) -> tuple[list[str], dict[str, str], list[str]]:
  from safetensors.numpy import load_file, save_file

  tensors = load_file(world.folder / "clip" / "model.safetensors")
  name = sorted(tensors)[0]
  tensors[name] = np.full_like(tensors[name], np.nan)
  buffer = folder / "bad.safetensors"
  save_file(tensors, buffer)
  return _weights("model.safetensors", buffer.read_bytes(), [name, "model.safetensors"])(folder, world)


def _escaping_index(folder: Path, world: runs.World) -> tuple[list[str], dict[str, str], list[str]]:
  target = folder / "weights"
  target.mkdir()
  (target / "config.json").write_bytes((world.folder / "clip" / "config.json").read_bytes())
  index = {"weight_map": {"x": "../../secret.safetensors"}}
  (target / "model.safetensors.index.json").write_text(json.dumps(index))
  return [f"--config.teacher.path={target}"], {}, ["../../secret.safetensors"]


def _images(make_files: Callable[[Path], None], words: list[str]) -> Check:
  """Return what makes a folder of images as the data set."""

  def make(folder: Path, world: runs.World) -> tuple[list[str], dict[str, str], list[str]]:
    target = folder / "images"
    target.mkdir()
    make_files(target)
    flags = ["--config.data.dataset.name=folder"]
    flags += [f"--config.{key}={target}" for key in ("data.dataset.data_dir", "evals.knn.dataset.data_dir")]
    return flags, {}, words

  return make


def _picture(path: Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((32, 32, 3), 120, np.uint8)).save(path)


def _only_text(folder: Path) -> None:
  (folder / "train" / "cat").mkdir(parents=True)
  (folder / "train" / "cat" / "1.txt").write_text("no picture")


def _all_corrupt(folder: Path) -> None:
  _picture(folder / "val" / "cat" / "1.png")
  for place in range(16):
    path = folder / "train" / "cat" / f"{place}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\nnothing")


def _two_names_of_one_split(folder: Path) -> None:
  _picture(folder / "train" / "cat" / "1.png")
  _picture(folder / "Train" / "dog" / "1.png")


def _file_as_workdir(folder: Path, world: runs.World) -> tuple[list[str], dict[str, str], list[str]]:
  (folder / "file").write_text("here")
  return [f"--workdir={folder / 'file'}"], {}, [str(folder / "file")]


def _broken_config(text: str, words: list[str]) -> Check:
  def make(folder: Path, world: runs.World) -> tuple[list[str], dict[str, str], list[str]]:
    (folder / "mine.py").write_text(text)
    return [f"--config={folder / 'mine.py'}", f"--workdir={folder / 'run'}"], {}, words

  return make


def _no_config(folder: Path, world: runs.World) -> tuple[list[str], dict[str, str], list[str]]:
  return ["--config=configs/vitb17.py", f"--workdir={folder / 'run'}"], {}, ["vitb17"]


def _environment(env: dict[str, str], words: list[str]) -> Check:
  return lambda folder, world: ([], env, words)


def _html() -> bytes:
  return b"<!DOCTYPE html><html><head><title>404</title></head><body>Not Found</body></html>"


def _lfs() -> bytes:
  return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 344390296\n"


def _archive() -> bytes:
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    archive.writestr("readme.txt", "no weights")
  return buffer.getvalue()


FILES: dict[str, Check] = {
  "weights: a Git LFS pointer": _weights("model.safetensors", _lfs(), ["git lfs pull"]),
  "weights: a web page": _weights("model.safetensors", _html(), ["web page"]),
  "weights: an empty file": _weights("model.safetensors", b"", ["empty", "model.safetensors"]),
  "weights: an archive": _weights("model.safetensors", _archive(), ["model.safetensors"]),
  "weights: random bytes": _weights("model.safetensors", os.urandom(4096), ["model.safetensors"]),
  "weights: not a number": _with_nan,
  "weights: an index that leaves its folder": _escaping_index,
  "config.json: a web page": _weights("config.json", _html(), ["config.json"]),
  "config.json: a list": _weights("config.json", b"[1, 2]", ["config.json"]),
  "config.json: cut short": _weights("config.json", b'{"model_type": "cl', ["config.json"]),
  "images: none that can be read": _images(_only_text, [".txt", "data_dir"]),
  "images: all corrupt": _images(_all_corrupt, ["corrupt"]),
  "images: two folders of one split": _images(_two_names_of_one_split, ["Train", "train"]),
  "images: a folder that is not there": lambda folder, world: (
    ["--config.data.dataset.name=folder", "--config.data.dataset.data_dir=/nowhere"], {}, ["/nowhere"]
  ),
  "workdir: a file": _file_as_workdir,
  "config: no such file": _no_config,
  "config: a mistake of Python": _broken_config("def get_config(:\n", ["mine.py", "1"]),
  "config: no get_config": _broken_config("x = 1\n", ["mine.py", "get_config"]),
  "cluster: the address alone": _environment(
    {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1234"}, ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
  ),
  "cluster: a process id out of range": _environment(
    {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
    ["JAX_PROCESS_ID", "2"],
  ),
}  # fmt: skip
"""Name -> a function that returns the flags, the environment, and the words that the message must have."""
