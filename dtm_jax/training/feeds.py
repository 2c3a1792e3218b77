"""Feed the train step: from a host's threads that decode and crop, or from images that are on the devices.

feed = open_feed(config, dataset, mesh)
step = feed.jit(task, state, frozen)
for rows in feed.batches(start=0):
  state, measurements = step(state, frozen, feed.arrays, rows, jax.random.key(seed))
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from dtm_jax import data, rngs
from dtm_jax.arrays import Array, Batch, Key, PyTree, RandomKey, UInt32
from dtm_jax.data import resident
from dtm_jax.data.device_views import DeviceView
from dtm_jax.devices import Device
from dtm_jax.training.mesh import place, replicated, to_device
from dtm_jax.training.sharded_step import Prepare, Trainable, jit_calls

SHARE_OF_MEMORY = 0.5
"""The share of a device's memory that a data set may take."""
UNKNOWN_MEMORY = 8 * 2**30
"""The bytes that a device is assumed to have if it does not say so, as CPUs."""
ON_HOST = ("max_pixels", "prefetch")
"""Options of data.view that concern only the reading."""


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
  """The work that the host gives to the devices at once.

  Attributes:
    steps: the numbers of its steps.
    rows: those of one step [B, ...], or of several steps [steps, B, ...], on the devices.
  """

  steps: range
  rows: Batch

  @property
  def several(self) -> bool:
    """Whether the rows and the measurements have an axis of steps."""
    return len(self.steps) > 1


@dataclasses.dataclass(frozen=True, eq=False)
class Feed:
  """How the images of a run reach its train steps.

  Attributes:
    mesh: the devices.
    arrays: what lies on every device for the whole run: the images, or nothing.
    rows: start -> this process's rows of the steps that follow the first `start` examples of the run.
    prepare: (arrays, the rows of a step on the devices, key) -> the batch of the task's train step.
  """

  mesh: Mesh
  arrays: PyTree
  rows: Callable[[int], Iterator[Batch]]
  prepare: Prepare

  def jit(
    self, task: Trainable, state: PyTree, frozen: PyTree, *, several: bool = False
  ) -> jax.stages.Wrapped:
    """Return (state, frozen, arrays, rows, key) -> (state, measurements); see `sharded_step.jit_calls`."""
    return jit_calls(task, self.prepare, state, frozen, self.mesh, several=several)

  def batches(self, start: int) -> Iterator[Batch]:
    """Yield the rows of each step that follows the first `start` examples of the run, without end."""
    return (call.rows for call in self.calls(start, (range(i, i + 1) for i in itertools.count())))

  def calls(self, start: int, spans: Iterable[range]) -> Iterator[Call]:
    """Yield a call for each span of steps. Its rows travel while the devices work on the call before it.

    Args:
      start: number of examples of the run before the first span.
    """
    rows = self.rows(start)
    ahead: Call | None = None
    for steps in spans:
      call, ahead = ahead, Call(steps, self._to_device(list(itertools.islice(rows, len(steps)))))
      if call is not None:
        yield call
    if ahead is not None:
      yield ahead

  def _to_device(self, steps: list[Batch]) -> Batch:
    if len(steps) == 1:
      return to_device(steps[0], self.mesh)
    stacked = {name: np.stack([rows[name] for rows in steps]) for name in steps[0]}
    return to_device(stacked, self.mesh, axis=1)


def open_feed(config: Any, dataset: data.Dataset, mesh: Mesh, needs_labels: bool = False) -> Feed:
  """Return the feed of the config's section `data`.

  Args:
    needs_labels: refuse images without a label.

  Raises:
    OptionError: `needs_labels`, and the data set has images without a label. Or with data.device_resident,
      the images do not fit on a device, have several sizes, or the view is not made there.
  """
  if needs_labels:
    data.require_known_labels(dataset)
  if config.data.get("device_resident", False):
    return _resident(config, dataset, mesh, needs_labels)

  def rows(start: int) -> Iterator[Batch]:
    batches = data.train_batches(
      dataset,
      batch_size=config.batch_size,
      image_size=config.data.image_size,
      seed=config.seed,
      start=start,
      num_threads=config.data.num_threads,
      **config.data.view,
    )
    return (data.require_labels(batch, dataset) for batch in batches) if needs_labels else batches

  return Feed(mesh, {}, rows, lambda arrays, rows, key: rows)


def _resident(config: Any, dataset: data.Dataset, mesh: Mesh, needs_labels: bool) -> Feed:
  """Return the feed of images that are on the devices."""
  view = device_view(config)
  options = {name: value for name, value in config.data.view.items() if name == "max_pixels"}
  limit = int(SHARE_OF_MEMORY * (Device.present().memory or UNKNOWN_MEMORY))
  loaded = resident.load(dataset, limit=limit, num_threads=config.data.num_threads, **options)
  if needs_labels:
    loaded.require_labels()
  arrays = {"image": loaded.image, "label": loaded.label}
  arrays = place(arrays, jax.tree.map(lambda _: replicated(mesh), arrays))
  size = loaded.image.nbytes / 2**30
  logging.info("All %d images are on the devices, %.2f GiB on each.", dataset.num_examples, size)
  rows = functools.partial(loaded.order.rows, batch_size=config.batch_size, seed=config.seed)
  return Feed(mesh, arrays, lambda start: rows(start=start), functools.partial(view_rows, view))


def device_view(config: Any) -> DeviceView:
  """Return the view of the config's section `data.view`, made on the devices.

  Raises:
    OptionError: the device does not make this view.
  """
  options = {name: value for name, value in config.data.view.items() if name not in ON_HOST}
  return DeviceView(config.data.image_size, **options)


@jax.named_scope("augment")
def view_rows(view: DeviceView, arrays: dict[str, Array], rows: Batch, key: RandomKey) -> Batch:
  """Return the batch of one step: the views of the images with these indices, their labels, and the indices.

  The draws of a row are a function of (seed, place of the row in the run).
  """
  keys_B = keys_of_places(rngs.stream(key, "view"), rows["place"])
  image = jax.vmap(view)(keys_B, arrays["image"][rows["index"]])
  return {"image": image, "label": arrays["label"][rows["index"]], "index": rows["index"]}


def keys_of_places(key: RandomKey, place: UInt32[Array, "B 2"]) -> Key[Array, " B"]:
  """Return one key for each pair (epoch, place in the epoch)."""
  fold = lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1])
  return jax.vmap(fold)(place)
