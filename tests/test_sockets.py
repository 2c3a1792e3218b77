"""Try every other choice of each socket in every shipped config, up to the first step.

The options are typed as on the command line. Besides its name, a choice gets only the options that it needs
(`NEEDED`). The weights and images are tiny, and the hub's repositories lead to them. Equal sections are
traced once, to save time.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import small_world
from PIL import Image
from test_teachers import WRITERS

from dtm_jax import device_options, evaluators, loop, plugins
from dtm_jax.data import settings as dataset_settings
from dtm_jax.datasets import imagenet
from dtm_jax.errors import OptionError
from dtm_jax.evaluators import Context
from dtm_jax.models.files import weight_files
from dtm_jax.options import overrides, validation
from dtm_jax.options.arguments import split_arguments
from dtm_jax.options.config_file import load_config
from dtm_jax.options.cross_checks import num_tokens
from dtm_jax.options.sections import get, sections
from dtm_jax.tasks import Run, build_teacher
from dtm_jax.training import mesh as meshes

ROOT = Path(__file__).parents[1]
CONFIGS = sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "common"})
KEPT = {
  "teachers": {"noise", "dtype", "attention", "stream_dtype"},
  "datasets": set(),
  "morphers": {"weight"},
  "evaluators": {
    "at_start", "every_steps", "every_examples", "every_epochs",
    "dataset", "image_size", "batch_size", "features",
  },
}  # fmt: skip
"""Options of the run. They may stay when another choice is typed."""

LABELLED, MAPPED = ("cifar10", "folder", "imagenet"), ("ade20k", "segmentation_folder", "shapes")
NUM_IMAGES = 200
"""The images of each split, so many that every part of a split that a config names has one."""

NEEDED = {
  "teachers": {"checkpoint": {"path": "{world}/checkpoint"}},
  "datasets": {
    "ade20k": {"data_dir": "{world}/ade20k"},
    "cifar10": {"data_dir": "{world}"},
    "folder": {"data_dir": "{world}/folder"},
    "imagenet": {"data_dir": "{world}/folder"},
    "segmentation_folder": {"data_dir": "{world}/segmentation_folder"},
    "shapes": {},
    "tfds": {"data_dir": "{world}", "variant": "mnist"},
  },
  "morphers": {},
  "evaluators": {
    "best_head": {"held_out": "train[99%:]"},
    "consistency": {"morphers": "{{'random': {{'name': 'random'}}}}", "split": "val"},
    "zeroshot": {"prompts": "plain"},
  },
}
"""The options that are typed with a choice, because they have no default or the default is not found here."""

EVALUATES = {
  ("pretrain", "knn"): {},
  ("pretrain", "linear"): {},
  ("pretrain", "consistency"): {"tokens": "teacher_tokens"},
  ("pretrain", "snapshots"): {},
  ("finetune", "knn"): {"features": "features"},
  ("finetune", "linear"): {"features": "features"},
  ("frozen", "linear"): {},
  ("frozen", "consistency"): {"tokens": "tokens"},
  ("frozen", "snapshots"): {"tokens": "tokens"},
  ("frozen_clip", "knn"): {"features": "image"},
  ("frozen_clip", "linear"): {"features": "image"},
  ("frozen_clip", "consistency"): {},
  ("frozen_clip", "snapshots"): {"tokens": "patches"},
  ("frozen_clip", "zeroshot"): {},
  ("contrastive", "knn"): {"features": "image"},
  ("contrastive", "linear"): {"features": "image"},
}
"""The evaluators that a task has outputs for, with the options to type. A task refuses all others."""


def is_without_data_set(section):
  """Whether an evaluator uses the data set of the training. Another choice would need one of its own."""
  return section.socket == "evaluators" and "dataset" not in section.options


def cases(socket):
  """Yield (config, section, choice) for every choice of a socket that a shipped config does not make."""
  for name in CONFIGS:
    for section in sections(load_config(str(ROOT / "configs" / f"{name}.py"))):
      if section.socket == socket and not is_without_data_set(section):
        for choice in plugins.available(socket):
          if choice != section.name:
            yield name, section.path, choice


def every(socket):
  return pytest.mark.parametrize(
    ("name", "path", "choice"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}={case[2]}") for case in cases(socket)],
  )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """Write tiny weights of every teacher and images of every data set."""
  world = tmp_path_factory.mktemp("world")
  for name, write in WRITERS.items():
    (world / name).mkdir()
    write(world / name)
  small_world.write_cifar10(world)
  write_photos(world / "folder", ("train", "val"))
  for name, splits in (("ade20k", ("training", "validation")), ("segmentation_folder", ("train", "val"))):
    for part, mode in (("images", "RGB"), ("annotations", "L")):
      write_copies(world / name / part, splits, mode)
  (world / "segmentation_folder" / "classes.txt").write_text("sky\nsea\n")
  return world


def write_photos(folder, splits):
  for label in ("cat", "dog"):
    write_copies(folder, [f"{split}/{label}" for split in splits], "RGB")


def write_copies(folder, places, mode):
  """Write the same small picture NUM_IMAGES times in each place."""
  for place in places:
    (folder / place).mkdir(parents=True)
    first = folder / place / "0.png"
    Image.new(mode, (40, 40), 1 if mode == "L" else (9, 99, 200)).save(first)
    for i in range(1, NUM_IMAGES):
      (folder / place / f"{i}.png").hardlink_to(first)


@pytest.fixture(autouse=True)
def found_here(world, monkeypatch):
  """Lead each teacher's default repository of the hub to its tiny weights."""
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(imagenet, "NUM_CLASSES", 2)
  repositories = {
    "openai/clip-vit-base-patch16": "clip", "facebook/dinov2-base": "dinov2",
    "facebook/vit-mae-base": "mae", "google/siglip-base-patch16-224": "siglip",
    "microsoft/beit-base-patch16-224-pt22k": "beit",
  }  # fmt: skip

  def find(path, **_):
    if isinstance(path, weight_files.Found):
      return path
    folder = world / repositories[path] if path in repositories else Path(path)
    return weight_files.Found(folder / "model.safetensors")

  monkeypatch.setattr(weight_files, "find", find)


def typed(world, name, options):
  """Return the checked config with these options. Weights that are not here are replaced by tiny ones."""
  config = load_config(f"configs/{name}.py")
  if config.get("teacher") and config.teacher.name == "checkpoint":
    config.teacher.path = str(world / "checkpoint")
  if config.task == "frozen_clip":
    config.clip.path = "assets/tiny_clip_cifar10"  # for its tokenizer
  flags = [f"--config.{key}={value}" for key, value in options.items()]
  problems = overrides.apply(config, split_arguments(["main", *flags]).typed)
  validation.check(config, problems)
  return config


def choose(world, socket, name, path, choice, **more):
  """Return the config with another choice in a section. No option of the first choice may be left."""
  options = {key: text.format(world=world) for key, text in NEEDED[socket].get(choice, {}).items()} | more
  variant = options.pop("variant", None)
  options = {"name": f"{choice}/{variant}" if variant else choice, **options}
  config = typed(world, name, {f"{path}.{key}": text for key, text in options.items()})
  left = {*get(config, path)} - {*options} - KEPT[socket]
  assert not left, f"--config.{path}.name={choice} keeps {left}"
  return config


_traced = {}


def once(key, trace):
  """Return `trace()`, which is called once for equal keys."""
  key = json.dumps(key, sort_keys=True, default=str)
  if key not in _traced:
    _traced[key] = trace()
  return _traced[key]


def task_of(config):
  steps = 0 if config.total_steps == 0 else 100
  run = Run(steps, 10.0, config.batch_size, ("cat", "dog"))
  return plugins.load("tasks", config.task).build(config, run)


def trace_step(config, functions=False):
  """Trace the first train step with shapes alone and, with `functions`, all predict functions of the task."""
  if "student" in config:
    with config.unlocked(), config.student.ignore_type():  # unroll may be "auto"
      config.student.update(depth=1, unroll=1)
  task, size = task_of(config), config.data.image_size
  state = jax.eval_shape(task.init, jax.random.key(0))
  batch = {
    "image": jax.ShapeDtypeStruct((4, size, size, 3), jnp.uint8),
    "label": jax.ShapeDtypeStruct((4,), jnp.int32),
  }
  _, measurements = jax.eval_shape(task.train_step, state, task.frozen, batch, jax.random.key(0))
  assert measurements["loss"].shape == ()
  for function in task.outputs.values() if functions else ():
    jax.eval_shape(function, state, task.frozen, batch)


@pytest.mark.parametrize(
  ("socket", "name", "path", "choice"),
  [("teachers", "vitb16", "teacher", "dinov2"), ("datasets", "seg_debug", "data.dataset", "cifar10"),
   ("morphers", "vitb16", "morphers.dtm", "identity"), ("evaluators", "quickstart", "evals.knn", "linear")],
)  # fmt: skip
def test_options_of_the_first_choice_that_stay_are_seen(world, monkeypatch, socket, name, path, choice):
  """The tests below fail if a choice receives options of another one."""
  monkeypatch.setattr(overrides, "_drop", lambda *_: None)
  with pytest.raises((OptionError, AssertionError), match=r"has no option|keeps"):
    choose(world, socket, name, path, choice)


# Teachers ------------------------------------------------------------------------------------------------


@every("teachers")
def test_another_teacher(world, name, path, choice):
  config, _ = device_options.resolve(choose(world, "teachers", name, path, choice))
  patch_size = config.student.patch_size if config.task == "pretrain" else None
  key = ("teacher", config.teacher.to_dict(), config.data.image_size, patch_size)
  once(key, lambda: trace_teacher(config, patch_size))
  once(("task", config.task, choice), lambda: trace_step(config, functions=True))


def trace_teacher(config, patch_size):
  """Check that the teacher's tokens lie on the student's grid, at the teacher's own image size."""
  teacher = build_teacher(config, patch_size)
  side = teacher.image_size
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  tokens = jax.eval_shape(teacher.apply, teacher.params, image)
  rows = config.data.image_size // (patch_size or teacher.patch_size)
  assert tokens.shape == (1, rows**2, teacher.width)
  own = config.teacher.name in teacher.name and config.teacher.get("normalization") is None
  assert own, "the weights or the normalisation belong to another teacher"


# Morphers ------------------------------------------------------------------------------------------------


@every("morphers")
def test_another_morpher(world, name, path, choice):
  config = choose(world, "morphers", name, path, choice)
  section = {key: value for key, value in get(config, path).items() if key != "weight"}
  tokens = num_tokens(config) or 64
  size = config.data.image_size
  once(("morpher", section, tokens, size), lambda: trace_morpher(section, tokens, size))
  if config.task == "pretrain":
    once(("step", choice), lambda: trace_step(config))


def trace_morpher(section, tokens, size):
  token_BNC = jax.ShapeDtypeStruct((2, tokens, 8), jnp.float32)
  image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
  label = jax.eval_shape(plugins.build("morphers", section), jax.random.key(0), token_BNC, image)
  assert (label.shape, label.dtype) == ((2, tokens), jnp.int32)


# Data sets -----------------------------------------------------------------------------------------------


@every("datasets")
def test_another_data_set(world, name, path, choice):
  """The data set opens and gives a batch, or is refused by name if it lacks what the task reads."""
  config = choose(world, "datasets", name, path, choice)
  section = get(config, path)
  opens = lambda: plugins.build("datasets", section, split="train")
  if choice == "tfds":
    with pytest.raises(OptionError, match=f"'mnist' is not prepared in {world}"):
      once(("data set", section.to_dict()), opens)
    return
  dataset = once(("data set", section.to_dict()), opens)
  assert once(("splits", section.to_dict()), lambda: plugins.build("datasets", section, function="splits"))
  if path == "data.dataset" and config.total_steps != 0:
    key = ("batch", section.to_dict(), config.data.view.to_dict(), config.task)
    once(key, lambda: first_batch(config, dataset))


def first_batch(config, dataset):
  reads = {"segment": MAPPED, "pretrain": (*LABELLED, *MAPPED)}.get(config.task, LABELLED)
  needs_labels = config.task in ("finetune", "linear_probe", "contrastive")
  config.update(batch_size=8)
  config.data.update(image_size=32, num_threads=2)
  if config.data.get("device_resident"):
    config.data.device_resident = False  # test_resident.py has the feed of images on the devices
  config = dataset_settings.resolve(config, dataset)
  batches = lambda: loop.open_feed(config, dataset, meshes.make_mesh(-1, 1), needs_labels).batches(0)
  if config.data.dataset.name not in reads:
    with pytest.raises(OptionError, match=r"[Dd]ata set '"):
      next(batches())
    return
  batch = next(batches())
  assert batch["image"].shape == (8, 32, 32, 3)
  assert ("map" in batch) == (config.task == "segment")


# Evaluators ----------------------------------------------------------------------------------------------


@every("evaluators")
def test_another_evaluator(world, name, path, choice):
  """The evaluator is made from the task's outputs, or refused by name before anything is loaded."""
  task = typed(world, name, {}).task
  if (task, choice) not in EVALUATES:
    with pytest.raises(OptionError, match=rf"--config\.{path}\.\w+={choice}|{path}.*has no output"):
      choose(world, "evaluators", name, path, choice)
    return
  config = choose(world, "evaluators", name, path, choice, **EVALUATES[task, choice])
  section = get(config, path).copy_and_resolve_references()
  section.dataset = {"name": "folder", "data_dir": str(world / "folder")}
  key = ("evaluator", task, choice, section.to_dict())
  once(key, lambda: make_evaluator(once(("functions", task), lambda: task_of(config)), choice, section))


def make_evaluator(task, choice, section):
  mesh = meshes.make_mesh(-1, 1)
  evaluators.make(choice, section, Context.bind(task.outputs, task.frozen, mesh, tokenize=task.tokenize))
