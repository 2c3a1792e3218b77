"""Measure the memory of a step: what the compiler plans, and which arrays are kept for the backward pass."""

import jax
import jax.extend.core
import numpy as np

from benchmarks import measuring, prefixes, workload
from dtm_jax import device_options

GIB = 2**30


def memory_by_kind(compiled: jax.stages.Compiled) -> dict[str, float]:
  """Return the planned GiB of each kind of memory, and the device's peak if the device reports it."""
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
  """Return XLA's count of GFLOP per image, before and after optimisation. It counts a scan's body once."""
  counts = {"as lowered": lowered.cost_analysis(), "as compiled": compiled.cost_analysis()}
  return {name: cost["flops"] / batch_size / 1e9 for name, cost in counts.items() if cost and "flops" in cost}


def kept_for_backward(config) -> float:
  """Return the GiB that the student's forward pass keeps for its backward pass.

  The number follows from shapes alone and is the same on any device. Parameters that the backward pass reads
  do not count, but their casts do.
  """
  task, key = workload.task_of(config), jax.random.key(config.seed)
  loss = prefixes.prefix_functions(task)["loss"]
  state, frozen = workload.abstract_state_and_frozen(config, task, workload.mesh_of(config))
  size = config.data.image_size
  batch = {"image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), np.uint8)}

  def backward(params, frozen, batch):
    """Return the function of the backward pass. It is a pytree, and the kept arrays are its leaves."""
    return jax.vjp(lambda params: loss(params, 0, frozen, batch, key), params)[1]

  jaxpr = jax.make_jaxpr(backward)(state["params"], frozen, batch).jaxpr
  kept = {x for x in jaxpr.outvars if isinstance(x, jax.extend.core.Var)} - set(jaxpr.invars)
  return sum(x.aval.size * x.aval.dtype.itemsize for x in kept) / GIB


def plan(path: str, overrides, batch_size: int, dtype: str) -> dict:
  """Return the memory that a step of `batch_size` images needs. The step is compiled but not run."""
  config = workload.config_from(path, overrides, dtype)
  config.batch_size = batch_size
  config, _ = device_options.resolve(config)
  kept = kept_for_backward(config)
  _, compiled = workload.compiled_step(config, batch_size)
  return {
    "batch": batch_size, "dtype": dtype, "backend": jax.default_backend(), "remat": config.student.remat,
    "kept_for_backward": kept, **memory_by_kind(compiled),
  }  # fmt: skip


def markdown(plans) -> str:
  """Return a table with one row per plan."""
  names = ("kept_for_backward", "arguments", "temporary", "planned in all")
  rows = [
    [f"{each['batch']}, {each['dtype']}, remat {each['remat']}", *(f"{each[name]:.2f}" for name in names)]
    for each in plans
  ]
  backend = plans[0]["backend"]
  header = ["batch", "kept for backward, by shapes", *(f"{name}, by XLA:{backend}" for name in names[1:])]
  return f"Memory in GiB of a step that was compiled but not run:\n\n{measuring.table(header, rows)}"
