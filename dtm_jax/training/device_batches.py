"""Feed the train step: global batches on the devices, made one step ahead."""

from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from dtm_jax import data
from dtm_jax.arrays import Batch
from dtm_jax.training.mesh import to_device


def device_batches(
  config: Any, dataset: data.Dataset, mesh: Mesh, start: int, needs_labels: bool = False
) -> Iterator[Batch]:
  """Yield the global batches that follow the first `start` examples of the run.

  Each batch is on its way to the devices while the step uses the one before it.

  Args:
    needs_labels: refuse images without a label.

  Raises:
    OptionError: `needs_labels`, and the data set has images without a label.
  """
  batches = data.train_batches(
    dataset,
    batch_size=config.batch_size,
    image_size=config.data.image_size,
    seed=config.seed,
    start=start,
    num_threads=config.data.num_threads,
    **config.data.view,
  )
  if needs_labels:
    data.require_known_labels(dataset)
    batches = (data.require_labels(batch, dataset) for batch in batches)
  ahead = to_device(next(batches), mesh)
  while True:
    batch, ahead = ahead, to_device(next(batches), mesh)
    yield batch
