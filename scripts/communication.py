"""What the devices tell one another in a training step: every collective of it, with its bytes.

    python scripts/communication.py --config=configs/vitb16.py --devices=8 --mesh=data
    python scripts/communication.py --config=configs/vitb16.py --mesh=data=2,fsdp=4 --json=out.json

The step is that of `dtm_jax.main`, lowered from shapes: nothing is trained, and no array of the model's size
is made. The devices are the CPU, split; XLA's CPU compiler writes all-reduce and slice for a reduce-scatter.
With `--topology=v4:2x4x4` and libtpu installed (`pip install 'jax[tpu]'`) the TPU compiler itself is asked,
without a TPU. A CLIP that is no local folder is taken to be ViT-B/16.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
import unittest.mock

import jax
import jax.numpy as jnp
from absl import flags
from collectives import Collective, collectives, total


def compile_step(config, mesh) -> tuple[jax.stages.Compiled, dict, dict]:
  """The train step of the config on the mesh, and the shapes of its state and of the frozen arrays."""
  from dtm_jax import plugins
  from dtm_jax.tasks import Run
  from dtm_jax.training import sharded_step

  run = Run(1000, 100.0, config.batch_size, tuple(f"class {i}" for i in range(1000)))
  with teacher_of_shapes(config.get("teacher", {})):
    task = plugins.load("tasks", config.task).build(config, run)
  state = sharded_step.abstract_state(task, mesh, config.mesh.rules)
  frozen = sharded_step.with_shardings(task.frozen, mesh, config.mesh.rules)
  size, rows = config.data.image_size, config.batch_size
  batch = {
    "image": jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8),
    "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
    "index": jax.ShapeDtypeStruct((rows,), jnp.int64 if jax.config.jax_enable_x64 else jnp.int32),
  }
  step, key = sharded_step.jit_train_step(task, state, frozen, mesh), jax.random.key(config.seed)
  return step.lower(state, frozen, batch, key).compile(), state, frozen


@contextlib.contextmanager
def teacher_of_shapes(options):
  """Within it, a CLIP that is no local folder has the shapes of ViT-B/16 and no values."""
  path = pathlib.Path(options.get("path") or "clip-vit-base-patch16")
  if options.get("name") != "clip" or path.exists():
    yield
    return
  from dtm_jax.models.clip import model as clip
  from dtm_jax.models.clip import weights as clip_weights
  from dtm_jax.models.files import weight_files

  found = weight_files.Found(path / "model.safetensors")

  def shapes(_found, **_options):
    config = clip.CLIPConfig(text=None)
    tower = clip.ImageTower(config.image, config.embed_dim)
    image = jnp.zeros((1, config.image.image_size, config.image.image_size, 3))
    return config, {"image": jax.eval_shape(tower.init, jax.random.key(0), image)["params"]}

  with (
    unittest.mock.patch.object(weight_files, "find", return_value=found),
    unittest.mock.patch.object(clip_weights, "load", shapes),
  ):
    yield


def make_mesh(text: str, devices):
  """The mesh of `--mesh`."""
  from dtm_jax.training import mesh as meshes

  sizes = {"data": {}, "fsdp": {"data": 1, "fsdp": -1}}.get(text)
  if sizes is None:
    sizes = {name: int(size) for name, _, size in (part.partition("=") for part in text.split(","))}
  return meshes.make_mesh(**sizes, devices=devices)


def get_devices():
  """Of the topology, or the CPU's."""
  if topology := flags.FLAGS.topology:
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    return topologies.get_topology_desc(topology, platform="tpu", **options).devices
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", flags.FLAGS.devices)
  return jax.devices()


def table(found: list[Collective]) -> str:
  """One line for each kind, arrays and source, the largest first."""
  lines = [f"{'MB sent/device':>14} {'times':>5} {'n':>3}  {'kind':18} arrays <- source"]
  for each in sorted(found, key=lambda each: -each.sent_per_step):
    arrays = ", ".join(each.arrays[:3]) + (f", ... ({len(each.arrays)})" if len(each.arrays) > 3 else "")
    times = "data" if each.times is None else each.times
    lines.append(
      f"{each.sent_per_step / 1e6:14.6f} {times:>5} {each.group:>3}  {each.kind:18} {arrays} <- {each.source}"
    )
  return "\n".join(lines)


def main(config) -> None:
  """Print the collectives of the train step of `config`, and write what the flags ask for."""
  from dtm_jax.storage import paths

  devices = get_devices()
  mesh = make_mesh(flags.FLAGS.mesh, devices)
  compiled, state, _ = compile_step(config, mesh)
  text = compiled.as_text()
  if flags.FLAGS.hlo:
    paths.resolve(flags.FLAGS.hlo).write_text(text)
  found = collectives(text)
  params = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state["params"]))
  print(table(found))
  print(f"mesh {dict(mesh.shape)}, parameters {params / 1e6:.3f} MB, sent {total(found) / 1e6:.3f} MB")
  print(compiled.memory_analysis())
  if flags.FLAGS.json:
    paths.resolve(flags.FLAGS.json).write_text(json.dumps([dataclasses.asdict(each) for each in found]))


if __name__ == "__main__":  # the flags too: tests import this file beside others that have flags
  flags.DEFINE_integer("devices", 8, "How many devices the CPU shall look like.")
  flags.DEFINE_string("mesh", "data", '"data", "fsdp" or sizes: "data=2,fsdp=4".')
  flags.DEFINE_string("topology", None, 'A TPU to compile for instead: "v4:2x2x1".')
  flags.DEFINE_string("json", None, "Also write the numbers to this file.")
  flags.DEFINE_string("hlo", None, "Also write XLA's text to this file.")
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
  from dtm_jax.options import command_line

  command_line.run_script(main)
