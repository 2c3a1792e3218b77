"""List every collective of a training step with its bytes: what the devices send to each other.

    python scripts/communication.py --config=configs/vitb16.py --devices=8 --mesh=data
    python scripts/communication.py --config=configs/vitb16.py --mesh=data=2,fsdp=4 --json=out.json

The step is the one of `dtm_jax.main`, compiled from shapes alone: the script trains nothing and makes no
array of the model's size. The devices are the CPU, split. XLA's CPU compiler writes a reduce-scatter as
all-reduce and slice. With `--topology=v4:2x4x4` and libtpu (`pip install 'jax[tpu]'`) the script uses the TPU
compiler, without a TPU. `--slices=2` makes it two such slices, and the list says which collectives cross the
network between them. If the CLIP of the config is not a local folder, the script takes the shapes of
ViT-B/16.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import unittest.mock
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dtm_jax import plugins
from dtm_jax.arrays import PyTree
from dtm_jax.errors import OptionError
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.files import weight_files
from dtm_jax.options.command_line import parse_with_config, run_script, script_parser, start_above
from dtm_jax.storage import paths
from dtm_jax.tasks import Run
from dtm_jax.training import mesh as meshes
from dtm_jax.training import sharded_step

if not __package__:
  start_above(__file__)

from .collectives import BETWEEN_SLICES, Collective, collectives, total


def compile_step(config: ConfigDict, mesh: Mesh) -> tuple[jax.stages.Compiled, PyTree, PyTree]:
  """Return the compiled train step of the config on the mesh, and the shapes of state and frozen arrays."""
  run = Run(1000, 100.0, config.batch_size, tuple(f"class {i}" for i in range(1000)))
  with teacher_of_shapes(config.get("teacher", {})):
    task = plugins.load("tasks", config.task).build(config, run)
  state = sharded_step.abstract_state(task, mesh, config.mesh.rules)
  frozen = sharded_step.with_shardings(task.frozen, mesh, config.mesh.rules)
  size, rows = config.data.image_size, config.batch_size
  batch = {
    "image": jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8),
    "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
    "index": jax.ShapeDtypeStruct((rows,), jnp.result_type(int)),
  }
  step, key = sharded_step.jit_train_step(task, state, frozen, mesh), jax.random.key(config.seed)
  return step.lower(state, frozen, batch, key).compile(), state, frozen


@contextlib.contextmanager
def teacher_of_shapes(options: Mapping) -> Iterator[None]:
  """Replace a CLIP that is not a local folder by the shapes of ViT-B/16, without values."""
  path = pathlib.Path(options.get("path") or "clip-vit-base-patch16")
  if options.get("name") != "clip" or path.exists():
    yield
    return
  found = weight_files.Found(path / "model.safetensors")

  def shapes(_found: object, **_options: object) -> tuple[clip.CLIPConfig, PyTree]:
    config = clip.CLIPConfig(text=None)
    tower = clip.ImageTower(config.image, config.embed_dim)
    image = jnp.zeros((1, config.image.image_size, config.image.image_size, 3))
    return config, {"image": jax.eval_shape(tower.init, jax.random.key(0), image)["params"]}

  with (
    unittest.mock.patch.object(weight_files, "find", return_value=found),
    unittest.mock.patch.object(clip_weights, "load", shapes),
  ):
    yield


def make_mesh(text: str, devices: Sequence[jax.Device]) -> Mesh:
  """Return the mesh of `--mesh`, such as "data=2,fsdp=4".

  Raises:
    OptionError: the text has another form, or gives an axis twice.
  """
  known: dict[str, dict[str, int]] = {"data": {}, "fsdp": {"data": 1, "fsdp": -1}}
  sizes = known.get(text)
  if sizes is None:
    if not re.fullmatch(r"(data|fsdp)=-?\d+(,(data|fsdp)=-?\d+)?", text):
      raise OptionError(f"--mesh={text}: must be data, fsdp, or sizes such as data=2,fsdp=4.")
    given = [(name, int(size)) for name, _, size in (part.partition("=") for part in text.split(","))]
    sizes = dict(given)
    if len(sizes) < len(given):
      (name, first), (_, second) = given
      raise OptionError(f"--mesh={text} gives {name} twice: {first} and {second}. Sizes are data=2,fsdp=4.")
  return meshes.make_mesh(**sizes, devices=devices)


def get_devices(topology: str | None, num_devices: int, num_slices: int = 1) -> Sequence[jax.Device]:
  """Return the devices of a TPU topology with `num_slices` slices, or else of the CPU, `num_devices`."""
  if topology:
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    if num_slices > 1:
      options["num_slices"] = num_slices
    return topologies.get_topology_desc(topology, platform="tpu", **options).devices
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", num_devices)
  return jax.devices()


def table(found: list[Collective]) -> str:
  """Return a line for each collective, the largest first."""
  lines = [f"{'MB sent/device':>14} {'times':>5} {'n':>3}  {'kind':18} arrays <- source"]
  for each in sorted(found, key=lambda each: -each.sent_per_step):
    arrays = ", ".join(each.arrays[:3]) + (f", ... ({len(each.arrays)})" if len(each.arrays) > 3 else "")
    times = "data" if each.times is None else each.times
    lines.append(
      f"{each.sent_per_step / 1e6:14.6f} {times:>5} {each.group:>3}  {each.kind:18} {arrays} <- {each.source}"
    )
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  parser = script_parser(__doc__)
  add = parser.add_argument
  add("--devices", type=int, default=8, help="number of devices of the split CPU (default: 8)")
  add("--mesh", default="data", help='"data" (default), "fsdp" or sizes: "data=2,fsdp=4"')
  add("--topology", help='compile for this TPU, such as "v4:2x2x1"')
  add("--slices", type=int, default=1, help="number of slices of this topology (default: 1)")
  add("--json", help="file to write the numbers to")
  add("--hlo", help="file to write XLA's text to")
  config, args = parse_with_config(parser, argv)
  mesh = make_mesh(args.mesh, get_devices(args.topology, args.devices, args.slices))
  compiled, state, _ = compile_step(config, mesh)
  text = compiled.as_text() or ""
  if args.hlo:
    paths.resolve(args.hlo).write_text(text)
  found = collectives(text)
  params = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state["params"]))
  print(table(found))
  print(f"mesh {dict(mesh.shape)}, parameters {params / 1e6:.3f} MB, sent {total(found) / 1e6:.3f} MB")
  if args.slices > 1:
    across = total([each for each in found if each.kind == BETWEEN_SLICES])
    inside = total(found) - across
    print(f"between the slices (DCN) {across / 1e6:.3f} MB, inside a slice (ICI) {inside / 1e6:.3f} MB")
  print(compiled.memory_analysis())
  if args.json:
    paths.resolve(args.json).write_text(json.dumps([dataclasses.asdict(each) for each in found]))


if __name__ == "__main__":
  run_script(main)
