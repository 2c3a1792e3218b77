"""Read data sets of images, and make batches that are functions of (seed, step).

dataset.py               Example, Source, Stream, Dataset, and the checks of labels and label maps
order.py                 which example each row of a training batch shows
training_batches.py      the endless stream of random crops
resident.py              the same stream of a data set that is on the devices; device_views.py crops there
evaluation_batches.py    every example exactly once
reading.py               what happens to images that are corrupt or cannot be read
pools.py                 the threads that make rows into batches, and each process's share of the rows
views.py                 crops for training and evaluation
label_maps.py            maps of one class id for each pixel, and joint crops of an image and its map
image_decoding.py        from encoded bytes to 8-bit RGB; pixel_depth.py and orientation.py help
resampling.py            resizes images; rand_augment.py changes them at random on the host
settings.py              image size and normalisation that a config leaves to the data set
"""

from dtm_jax.data.dataset import (
  Dataset,
  Example,
  Source,
  Stream,
  require_known_labels,
  require_labels,
  require_maps,
)
from dtm_jax.data.evaluation_batches import eval_batches, whole_examples
from dtm_jax.data.reading import corrupt_count
from dtm_jax.data.training_batches import train_batches

__all__ = [
  "Dataset",
  "Example",
  "Source",
  "Stream",
  "corrupt_count",
  "eval_batches",
  "require_known_labels",
  "require_labels",
  "require_maps",
  "train_batches",
  "whole_examples",
]
