"""What a compiled step needs, as its compiler plans it, and what the backward pass keeps by its shapes."""

import jax
import jax.extend.core
import numpy as np

from benchmarks import beginnings, measuring, workload
from dtm_jax.training import mesh as meshes

GIB = 2**30


def of(compiled) -> dict[str, float]:
  """GiB by kind as the compiler plans them, and the device's own count where it keeps one."""
  plan = compiled.memory_analysis()
  arguments, outputs = plan.argument_size_in_bytes, plan.output_size_in_bytes
  temporary, shared = plan.temp_size_in_bytes, plan.alias_size_in_bytes
  sizes = {
    "arguments": arguments,
    "temporary": temporary,
    "planned in all": arguments + outputs - shared + temporary,
  }
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    sizes["peak on the device"] = stats["peak_bytes_in_use"]
  return {name: size / GIB for name, size in sizes.items()}


def flops_by_xla(lowered, compiled, batch_size: int) -> dict[str, float]:
  """XLA's own count in GFLOP an image, before and after it optimises; of a scan it sees one turn."""
  counts = {"as lowered": lowered.cost_analysis(), "as compiled": compiled.cost_analysis()}
  return {name: cost["flops"] / batch_size / 1e9 for name, cost in counts.items() if cost and "flops" in cost}


def kept_for_backward(config) -> float:
  """GiB that the student's forward keeps for its backward, from shapes alone: the same on any device.

  Parameters that the backward reads are not counted, their casts are.
  """
  functions, *_ = beginnings.of(config)
  task, mesh = workload.task_of(config), meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
  state, frozen = workload.state_and_frozen(config, task, mesh, abstract=True)
  size = config.data.image_size
  batch = {"image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), np.uint8)}

  def backward(params, frozen, batch):
    """A function that is a tree: its leaves are what was kept."""
    return jax.vjp(lambda params: functions["loss"](params, 0, frozen, batch), params)[1]

  jaxpr = jax.make_jaxpr(backward)(state["params"], frozen, batch).jaxpr
  kept = {x for x in jaxpr.outvars if isinstance(x, jax.extend.core.Var)} - set(jaxpr.invars)
  return sum(x.aval.size * x.aval.dtype.itemsize for x in kept) / GIB


def plan(path: str, overrides, batch_size: int, dtype: str) -> dict:
  """What a step of `batch_size` images would take, without running it."""
  config = workload.config_from(path, overrides, dtype)
  config.batch_size = batch_size
  kept = kept_for_backward(config)
  _, compiled = workload.compiled_step(config, batch_size)
  return {
    "batch": batch_size, "dtype": dtype, "backend": jax.default_backend(), "remat": config.student.remat,
    "kept_for_backward": kept, **of(compiled),
  }  # fmt: skip


def markdown(plans) -> str:
  names = ("kept_for_backward", "arguments", "temporary", "planned in all")
  rows = [
    [f"{each['batch']}, {each['dtype']}, remat {each['remat']}", *(f"{each[name]:.2f}" for name in names)]
    for each in plans
  ]
  backend = plans[0]["backend"]
  header = ["batch", "kept for backward, by shapes", *(f"{name}, by XLA:{backend}" for name in names[1:])]
  return f"Memory in GiB of a step that was compiled and not run:\n\n{measuring.table(header, rows)}"
