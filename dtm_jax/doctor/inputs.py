"""Check the inputs of a run: its images, how fast this host reads them, and the weights of its teacher."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dtm_jax import data, device_options, loop, plugins
from dtm_jax.arrays import Batch, named_leaves
from dtm_jax.data import Stream, settings
from dtm_jax.data.image_decoding import CorruptImageError, decode
from dtm_jax.doctor import FAILURE, OK, WARNING, Examination, Finding
from dtm_jax.errors import concerning
from dtm_jax.teachers import Teacher
from dtm_jax.training.course import Course

SAMPLE = 64
"""Number of examples that are decoded one by one."""
PHOTOS = 8
"""Number of images that the teacher sees."""
READING_SECONDS, READING_BATCHES = 8.0, 50
"""How long, or how many batches, the reading speed is measured."""


def check_data(examination: Examination) -> Iterator[Finding]:
  """Open the training set, decode a sample, read some batches, and open the sets of the evaluators."""
  config = examination.config
  options = {f"data__dataset__{name}": value for name, value in config.data.dataset.items()}
  with concerning(**options, data__split=config.data.split):
    dataset = plugins.build("datasets", config.data.dataset, split=config.data.split)
    examination.config, examination.auto = device_options.resolve(settings.resolve(config, dataset))
  yield from _check_sample(dataset, config)
  examination.dataset = dataset
  examination.course = Course.fresh(config.batch_size, dataset.num_examples)
  if examination.course.total_steps(examination.config) and not config.data.get("device_resident", False):
    examination.host_rate = _images_per_second(examination)
    yield Finding(OK, "data", f"this host reads and crops {examination.host_rate:,.0f} images/s")


def check_teacher(examination: Examination) -> Iterator[Finding]:
  """Load the weights that the task names, and look at the teacher's tokens of some photos."""
  examination.require("dataset", "course")
  assert examination.course is not None
  assert examination.dataset is not None
  task = loop.build_task(examination.config, examination.course, examination.dataset)
  wrong = _not_finite(task.frozen)
  pretrained = task.pretrained(jax.random.key(examination.config.seed))
  if pretrained is not None:
    wrong += [f"init_from {name}" for name in _not_finite(pretrained)]
  if wrong:
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    text = f"weights with NaN or infinite values: {', '.join(wrong[:3])}{more}"
    yield Finding(
      FAILURE, "teacher", text, "Get the weights again, or name others with --config.teacher.path."
    )
    return
  examination.task = task
  teacher: Teacher | None = getattr(task, "teacher", None)
  if teacher is None:
    yield Finding(OK, "teacher", f"the task {examination.config.task!r} has none")
  else:
    yield _check_tokens(teacher, next(_batches(examination))["image"][:PHOTOS])


def _check_sample(dataset: data.Dataset, config: Any) -> Iterator[Finding]:
  """Decode some examples, evenly spaced in the data set."""
  bad: list[str] = []
  number = 0
  limit = config.data.get("view", {}).get("max_pixels") or 200_000_000
  for index, read in enumerate(_readers(dataset)):
    number += 1
    try:
      example = read()
      decode(example["image"], limit)
    except (CorruptImageError, OSError) as error:
      bad.append(f"{getattr(error, 'filename', None) or f'sample {index}'}: {error}")
  what = f"{dataset.name} has {dataset.num_examples:,} images"
  if not bad:
    yield Finding(OK, "data", f"{what}; {number} of them were decoded")
    return
  status = FAILURE if len(bad) > number / 2 else WARNING
  fix = "Replace these files. A run replaces a corrupt image by another one, and stops after ten in a row."
  yield Finding(status, "data", f"{what}; {len(bad)} of {number} cannot be read, such as {bad[0]}", fix)


def _readers(dataset: data.Dataset) -> Iterator[Any]:
  """Yield functions that return the examples of the sample."""
  if isinstance(dataset.source, Stream):
    examples = dataset.source.read(0, 1, None, 0)
    yield from (lambda: next(examples) for _ in range(min(SAMPLE, dataset.num_examples)))
    return
  source, count = dataset.source, min(SAMPLE, dataset.num_examples)
  for place in range(count):
    yield lambda index=place * dataset.num_examples // count: source[index]


def _batches(examination: Examination) -> Iterator[Batch]:
  """Return this process's rows of the training batches."""
  config, dataset = examination.config, examination.dataset
  assert dataset is not None
  return data.train_batches(
    dataset, batch_size=config.batch_size, image_size=config.data.image_size, seed=config.seed,
    num_threads=config.data.num_threads, **config.data.view,
  )  # fmt: skip


def _images_per_second(examination: Examination) -> float:
  """Return how fast this host makes its rows of training batches. The first batch does not count."""
  batches = _batches(examination)
  next(batches)
  start, images, seconds = time.perf_counter(), 0, 0.0
  for batch in itertools.islice(batches, READING_BATCHES):
    images += len(batch["image"])
    seconds = time.perf_counter() - start
    if seconds > READING_SECONDS:
      break
  return images / seconds


def _not_finite(arrays: Any) -> list[str]:
  """Return the names of arrays with NaN or infinite values."""
  return [
    name for name, x in named_leaves(arrays).items() if not np.isfinite(np.asarray(x, np.float32)).all()
  ]


def _check_tokens(teacher: Teacher, image: np.ndarray) -> Finding:
  """Run the teacher on photos and look at its tokens [B, N, C]."""
  tokens = np.asarray(teacher.tokens(image), np.float32)
  norm = np.linalg.norm(tokens, axis=-1)
  text = (
    f"{teacher.name}: {tokens.shape[1]} tokens of {tokens.shape[2]} numbers on {len(image)} photos, "
    f"norm {norm.mean():.3g} +- {norm.std():.2g}"
  )
  fix = "Check that --config.teacher.path has the trained weights of this model."
  if not np.isfinite(tokens).all():
    return Finding(FAILURE, "teacher", f"{text}; some are not finite", fix)
  unit = tokens / np.maximum(norm[..., None], 1e-12)
  spread = 1 - float(np.square(unit.mean(axis=(0, 1))).sum())  # 0 if all tokens have one direction
  if norm.mean() < 1e-6 or spread < 1e-4:
    return Finding(FAILURE, "teacher", f"{text}; all tokens are the same, whatever the image shows", fix)
  return Finding(OK, "teacher", f"{text}; they differ (spread {spread:.2f} of 1)")
