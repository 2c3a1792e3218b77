"""Name the ways to compute the rounds of matching, for `morphers.*.implementation` in a config."""

from collections.abc import Mapping

import jax
from jax.sharding import PartitionSpec as P

from dtm_jax.arrays import Array, Float, Int
from dtm_jax.matching import gram, rounds
from dtm_jax.matching.rounds import Rounds, Rules


def kernel_rounds(
  target_BNC: Float[Array, "B N C"],
  merges_BK: Int[Array, "B K"],
  order_BKN: Float[Array, "B K N"] | None,
  rules: Rules,
) -> Int[Array, "B N"]:
  """Compute the rounds in one Pallas kernel on a TPU or a GPU, and with the plain rounds elsewhere.

  If a mesh is set, every device runs the kernel on its own images. XLA cannot split a kernel by itself, so
  otherwise all devices would compute all images.
  """
  # Pallas is imported only if this way is chosen.
  from dtm_jax.matching import gpu_kernel, tpu_kernel

  def match(target_BNC: Array, merges_BK: Array, *order_BKN: Array) -> Array:
    way = lambda match: lambda *arrays: match(*arrays[:2], arrays[2] if order_BKN else None, rules)
    return jax.lax.platform_dependent(
      target_BNC, merges_BK, *order_BKN,
      tpu=way(tpu_kernel.match_rounds), cuda=way(gpu_kernel.match_rounds), default=way(rounds.match_rounds),
    )  # fmt: skip

  arrays = (target_BNC, merges_BK, *([] if order_BKN is None else [order_BKN]))
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return match(*arrays)
  images = P(mesh.axis_names)
  return jax.shard_map(match, mesh=mesh, in_specs=images, out_specs=images, check_vma=False)(*arrays)


IMPLEMENTATIONS: Mapping[str, Rounds] = {
  "plain": rounds.match_rounds,
  "gram": gram.match_rounds,
  "pallas": kernel_rounds,
}
