"""What the benchmarks run: a config with random teacher weights, and photos made up on the spot.

Speed does not depend on the weights, so CLIP's are drawn where the config names some that are not here.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_dict, config_flags

from dtm_jax import loop
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.tasks import Run, Task, pretrain
from dtm_jax.training import mesh as meshes

TOTAL_STEPS, STEPS_PER_EPOCH = 100_000, 1000.0
PHOTO = (375, 500, 3)


def temporary_folder() -> Path:
  """Kept until the process ends."""
  folder = tempfile.TemporaryDirectory(prefix="dtm_jax_benchmark_")
  _kept.append(folder)
  return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory] = []


def config_from(path: str, overrides: Sequence[str], dtype: str = "auto") -> config_dict.ConfigDict:
  """The config in the file `path`, changed by `--config.x=y`, with a teacher that is there.

  `dtype` is of teacher and student: "auto" is float32 on a CPU, that has nothing faster, and the config's own
  elsewhere.
  """
  values = flags.FlagValues()
  argv = ["benchmark", f"--config={path}", *overrides]
  config_flags.DEFINE_config_file("config", path, flag_values=values, lock_config=True, sys_argv=argv)
  values(argv)
  config = values["config"].value
  if dtype == "auto":
    dtype = "float32" if jax.default_backend() == "cpu" else config.teacher.dtype
  config.teacher.dtype = config.student.dtype = dtype
  if config.teacher.name == "clip" and not Path(config.teacher.path).exists():
    config.teacher.path = str(random_clip(temporary_folder()))
  return config


def random_clip(folder: Path, config: clip.CLIPConfig | None = None) -> Path:
  """A folder with the image tower of `config`, by default of CLIP B/16, its weights at random."""
  config = config or clip.CLIPConfig(text=None)
  tower, size = clip.ImageTower(config.image, config.embed_dim), config.image.image_size
  shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
  rng = np.random.default_rng(0)

  def draw(path, x):
    """Norms multiply by one; everything else is small."""
    return np.float32(path[-1].key == "scale") + 0.03 * rng.standard_normal(x.shape, np.float32)

  clip_weights.save(folder, config, {"image": jax.tree_util.tree_map_with_path(draw, shapes)})
  return folder


def photos(folder: Path, count: int) -> Path:
  """`count` JPEGs of a photo's usual size and of about its number of bytes, in `folder`."""
  import cv2

  rng = np.random.default_rng(0)
  for i in range(count):
    coarse = rng.random((12, 16, 3), np.float32)
    smooth = cv2.resize(coarse, PHOTO[1::-1], interpolation=cv2.INTER_CUBIC)
    noise = 0.06 * rng.standard_normal(PHOTO, np.float32)
    pixels = (255 * np.clip(smooth + noise, 0, 1)).astype(np.uint8)
    cv2.imwrite(str(folder / f"{i:05}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
  return folder


def task_of(config: config_dict.ConfigDict) -> Task:
  return pretrain.build(config, Run(TOTAL_STEPS, STEPS_PER_EPOCH, config.batch_size))


def synthetic_batch(config: config_dict.ConfigDict, mesh) -> dict[str, jax.Array]:
  """A global batch of smooth noise on the device."""
  size, batch_size = config.data.image_size, config.batch_size
  coarse = np.random.default_rng(0).random((batch_size, 8, 8, 3), np.float32)
  image = jax.image.resize(jnp.asarray(coarse), (batch_size, size, size, 3), "cubic")
  return meshes.to_device({"image": np.asarray(255 * jnp.clip(image, 0, 1)).astype(np.uint8)}, mesh)


def state_and_frozen(config: config_dict.ConfigDict, task: Task, mesh, *, abstract: bool = False):
  """The initial state and the teacher's parameters on the mesh; `abstract` for their shapes alone."""
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  place = lambda tree: meshes.param_shardings(mesh, tree, config.mesh.rules)
  if abstract:
    as_shape = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return (jax.tree.map(as_shape, tree, place(tree)) for tree in (shapes, task.frozen))
  state = jax.jit(task.init, out_shardings=place(shapes))(jax.random.key(config.seed))
  return state, meshes.place(task.frozen, place(task.frozen))


def compiled_step(config: config_dict.ConfigDict, batch_size: int):
  """The whole train step, compiled for `batch_size` images and not run: (lowered, compiled)."""
  config = config.copy_and_resolve_references()
  config.batch_size = batch_size
  task, mesh = task_of(config), meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
  state, frozen = state_and_frozen(config, task, mesh, abstract=True)
  size = config.data.image_size
  image = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8, sharding=meshes.batch_sharding(mesh))
  step, key = loop.jit_train_step(task, state, frozen, mesh), jax.random.key(config.seed)
  lowered = step.lower(state, frozen, {"image": image}, key)
  return lowered, lowered.compile()
