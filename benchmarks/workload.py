"""Build what the benchmarks time: a config, its task, its state and its compiled step.

If the CLIP weights of the config are not on this machine, random weights replace them. Speed does not depend
on the values of the weights.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from dtm_jax.arrays import Batch, PyTree
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.tasks import Run, pretrain
from dtm_jax.tasks.pretrain import Pretraining
from dtm_jax.training import mesh as meshes
from dtm_jax.training import sharded_step

TOTAL_STEPS, STEPS_PER_EPOCH = 100_000, 1000.0


def temporary_folder() -> Path:
  """Return a new folder that is deleted when the process ends."""
  folder = tempfile.TemporaryDirectory(prefix="dtm_jax_benchmark_")
  _kept.append(folder)
  return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory] = []


def config_from(path: str, overrides: Sequence[str], dtype: str = "auto") -> ConfigDict:
  """Return the config in the file `path`. A CLIP that is not on this machine becomes a random one.

  Args:
    overrides: arguments such as `--config.x=y`.
    dtype: the type of the matrix products of teacher and student. On a CPU, "auto" means float32, because a
      CPU has no faster type. On other devices it means the teacher's type in the config.
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
  """Write the image tower of `config` (default: CLIP B/16) with random weights and return the folder."""
  config = config or clip.CLIPConfig(text=None)
  tower, size = clip.ImageTower(config.image, config.embed_dim), config.image.image_size
  shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
  rng = np.random.default_rng(0)

  def draw(path, x):
    """Return weights near 1 for the scales of norms, and near 0 for all others."""
    return np.float32(path[-1].key == "scale") + 0.03 * rng.standard_normal(x.shape, np.float32)

  clip_weights.save(folder, config, {"image": jax.tree_util.tree_map_with_path(draw, shapes)})
  return folder


def task_of(config: ConfigDict) -> Pretraining:
  """Return the pre-training task of the config."""
  return pretrain.build(config, Run(TOTAL_STEPS, STEPS_PER_EPOCH, config.batch_size))


def mesh_of(config: ConfigDict) -> Mesh:
  """Return the mesh of the config over all devices."""
  return meshes.make_mesh(config.mesh.data, config.mesh.fsdp)


def synthetic_batch(config: ConfigDict, mesh: Mesh) -> Batch:
  """Return a global batch of smooth noise on the devices."""
  size, batch_size = config.data.image_size, config.batch_size
  coarse = np.random.default_rng(0).random((batch_size, 8, 8, 3), np.float32)
  image = jax.image.resize(jnp.asarray(coarse), (batch_size, size, size, 3), "cubic")
  return meshes.to_device({"image": np.asarray(255 * jnp.clip(image, 0, 1)).astype(np.uint8)}, mesh)


def state_and_frozen(config: ConfigDict, task: Pretraining, mesh: Mesh) -> tuple[PyTree, PyTree]:
  """Return the initial state and the teacher's parameters on the mesh."""
  rules = config.mesh.rules
  state = sharded_step.init_state(task, jax.random.key(config.seed), mesh, rules)
  return state, sharded_step.place_frozen(task, mesh, rules)


def abstract_state_and_frozen(config: ConfigDict, task: Pretraining, mesh: Mesh) -> tuple[PyTree, PyTree]:
  """Return the shapes and shardings of `state_and_frozen`."""
  rules = config.mesh.rules
  state = sharded_step.abstract_state(task, mesh, rules)
  return state, sharded_step.with_shardings(task.frozen, mesh, rules)


def compiled_step(config: ConfigDict, batch_size: int) -> tuple[jax.stages.Lowered, jax.stages.Compiled]:
  """Compile the whole train step for `batch_size` images without running it."""
  config = config.copy_and_resolve_references()
  config.batch_size = batch_size
  task, mesh = task_of(config), mesh_of(config)
  state, frozen = abstract_state_and_frozen(config, task, mesh)
  size = config.data.image_size
  image = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8, sharding=meshes.batch_sharding(mesh))
  step, key = sharded_step.jit_train_step(task, state, frozen, mesh), jax.random.key(config.seed)
  lowered = step.lower(state, frozen, {"image": image}, key)
  return lowered, lowered.compile()
