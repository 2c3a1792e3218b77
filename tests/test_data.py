"""Batches: a function of (seed, step) that starts anywhere, covers every example, and survives bad files."""

import itertools
import logging as std_logging

import numpy as np
import pytest
import simplejpeg

from dtm_jax import data
from dtm_jax.data import image_decoding


class Images:
  """Images of noise. The label is the number of the image, and some images are corrupt."""

  def __init__(self, count: int, corrupt: tuple[int, ...] = (), shape=(12, 15, 3)):
    pixels = np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(np.uint8)
    self.encoded = [simplejpeg.encode_jpeg(image, 95) for image in pixels]
    for index in corrupt:
      self.encoded[index] = self.encoded[index][: len(self.encoded[index]) // 2]

  def __len__(self):
    return len(self.encoded)

  def __getitem__(self, index):
    return {"image": self.encoded[index], "label": index, "name": f"photo {index}"}


class StreamedImages(Images):
  """The same images, which can only be read in sequence."""

  def _part(self, process_index, process_count):
    return np.array_split(np.arange(len(self)), process_count)[process_index]

  def num_local(self, process_index, process_count):
    return len(self._part(process_index, process_count))

  def read(self, process_index, process_count, seed, skip):
    part = self._part(process_index, process_count)
    if seed is not None:
      part = np.random.default_rng(seed).permutation(part)
    for index in part[skip:].tolist():
      yield {**self[index], "index": index}


def _dataset(count=23, kind=Images, **kwargs):
  return data.Dataset("numbers", count, None, kind(count, **kwargs))


def _train(dataset, steps, process=(0, 1), **kwargs):
  options = {"batch_size": 8, "image_size": 8, "seed": 5, "num_threads": 2} | kwargs
  batches = data.train_batches(dataset, process_index=process[0], process_count=process[1], **options)
  return list(itertools.islice(batches, steps))


def _eval(dataset, process=(0, 1), **kwargs):
  options = {"batch_size": 8, "image_size": 8, "num_threads": 2} | kwargs
  return list(data.eval_batches(dataset, process_index=process[0], process_count=process[1], **options))


def _assert_same(batches, others):
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for name, value in batch.items():
      np.testing.assert_array_equal(value, other[name])


def _indices(batches):
  return np.concatenate([batch["index"] for batch in batches]).tolist()


def test_a_batch_has_arrays_of_these_types_and_shapes():
  (batch,) = _train(_dataset(), 1)
  assert {name: (value.dtype, value.shape) for name, value in batch.items()} == {
    "image": (np.uint8, (8, 8, 8, 3)),
    "label": (np.int32, (8,)),
    "index": (np.int64, (8,)),
  }
  np.testing.assert_array_equal(batch["label"], batch["index"])


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("batch_size", [8, 72])  # one chunk of rows, and several chunks of unequal size
def test_processes_together_make_the_batches_of_one_process(processes, batch_size):
  whole = _train(_dataset(), 5, batch_size=batch_size)
  parts = [_train(_dataset(), 5, (p, processes), batch_size=batch_size) for p in range(processes)]
  joined = [
    {k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts, strict=True)
  ]
  _assert_same(joined, whole)


@pytest.mark.parametrize("kind", [Images, StreamedImages])
def test_a_stream_from_step_7_is_the_stream_without_its_first_7_batches(kind):
  dataset = _dataset(kind=kind)
  _assert_same(_train(dataset, 4, start=7 * 8), _train(dataset, 11)[7:])


@pytest.mark.parametrize("num_threads", [1, 7])
def test_threads_do_not_change_the_stream(num_threads):
  _assert_same(_train(_dataset(), 6, num_threads=num_threads, prefetch=1), _train(_dataset(), 6))


def test_the_seed_changes_order_and_crops():
  first, second = (_train(_dataset(), 3, seed=seed, batch_size=23) for seed in (5, 6))
  assert _indices(first) != _indices(second)
  place = [batch[0]["index"].tolist().index(4) for batch in (first, second)]
  assert not np.array_equal(first[0]["image"][place[0]], second[0]["image"][place[1]])


@pytest.mark.parametrize("kind", [Images, StreamedImages])
def test_every_epoch_shows_every_example_once_in_a_different_order(kind):
  # 8 epochs in 23 batches, of which some hold the end of one epoch and the start of the next.
  order = _indices(_train(_dataset(kind=kind), 23, batch_size=8))
  epochs = [tuple(order[first : first + 23]) for first in range(0, 184, 23)]
  assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
  assert len(set(epochs)) == 8


@pytest.mark.parametrize("kind", [Images, StreamedImages])
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 16, 23])
def test_evaluation_reads_every_example_once(kind, processes, count):
  parts = [_eval(_dataset(count, kind=kind), (p, processes)) for p in range(processes)]
  assert {len(part) for part in parts} == {-(-count // 8)}
  seen = []
  for batch in itertools.chain(*parts):
    assert batch["image"].shape == (8 // processes, 8, 8, 3)
    np.testing.assert_array_equal(batch["label"], batch["index"])
    np.testing.assert_array_equal(batch["index"] >= 0, batch["valid"])
    seen += batch["index"][batch["valid"]].tolist()
  assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("kind", [Images, StreamedImages])
def test_a_corrupt_image_is_replaced_named_and_counted(kind, caplog):
  dataset, before = _dataset(kind=kind, corrupt=(3, 11)), data.corrupt_count()
  with caplog.at_level(std_logging.WARNING):
    batches = _train(dataset, 3, batch_size=23, prefetch=1)
  order = [batch["index"].tolist() for batch in batches]
  assert [len(step) for step in order] == [23] * 3
  assert not {3, 11} & set(_indices(batches))
  assert data.corrupt_count() - before >= 6
  assert "photo 3" in caplog.text
  assert "photo 11" in caplog.text
  _assert_same(batches, _train(dataset, 3, batch_size=23))  # the replacements are a function of the seed, too


def test_a_stream_of_only_corrupt_images_fails_with_their_names():
  dataset = _dataset(3, corrupt=(0, 1, 2))
  with pytest.raises(image_decoding.CorruptImageError, match="photo") as raised:
    _train(dataset, 1)
  assert not getattr(raised.value, "__notes__", [])  # Grain would add one about its traceback


def test_evaluation_marks_a_corrupt_image_and_names_it(caplog):
  with caplog.at_level(std_logging.WARNING):
    (batch,) = _eval(_dataset(8, corrupt=(3,)))
  assert batch["index"].tolist() == list(range(8))
  assert batch["valid"].tolist() == [index != 3 for index in range(8)]
  assert "photo 3" in caplog.text


def test_an_error_of_the_source_is_not_reported_as_a_corrupt_image():
  class Missing(Images):
    def __getitem__(self, index):
      raise FileNotFoundError("gone")

  with pytest.raises(FileNotFoundError, match="gone"):
    _train(_dataset(kind=Missing), 1)


def test_errors_name_the_values_and_the_choices():
  with pytest.raises(ValueError, match=r"batch_size=9.*2 processes"):
    _train(_dataset(), 1, (0, 2), batch_size=9)
  with pytest.raises(ValueError, match="'numbers' is empty"):
    _train(data.Dataset("numbers", 0, None, Images(0)), 1)
  with pytest.raises(ValueError, match=r"crop 'middle'.*random_resized, pad, none"):
    _train(_dataset(), 1, crop="middle")
  with pytest.raises(ValueError, match=r"interpolation 'sinc'.*bicubic"):
    _eval(_dataset(), interpolation="sinc")
  with pytest.raises(ValueError, match=r"resize=6.*image_size=8"):
    _eval(_dataset(), resize=6)


def _recording(kind, count):
  """Return a data set, and the set of indices that are opened."""
  opened = set()

  class Recording(kind):
    def __getitem__(self, index):
      opened.add(index)
      return super().__getitem__(index)

  return _dataset(count, kind=Recording), opened


@pytest.mark.parametrize("kind", [Images, StreamedImages])
@pytest.mark.parametrize("start", [0, 5 * 8])
def test_a_process_opens_only_its_own_examples(kind, start):
  """This includes what is read in advance, also after a resume. 400 examples are more than it reads."""
  parts = []
  for process in range(2):
    dataset, opened = _recording(kind, 400)
    batches = _train(dataset, 3, (process, 2), start=start, prefetch=1)
    assert set(_indices(batches)) <= opened
    assert len(opened) < 200
    parts.append((batches, opened))
  (first, first_opened), (second, second_opened) = parts
  assert not first_opened & second_opened
  if kind is Images:  # the order of a Stream depends on the number of processes
    together = [[*a["index"], *b["index"]] for a, b in zip(first, second, strict=True)]
    assert together == [batch["index"].tolist() for batch in _train(_dataset(400), 3, start=start)]


@pytest.mark.parametrize("kind", [Images, StreamedImages])
def test_a_process_opens_only_its_own_examples_in_evaluation(kind):
  every = []
  for process in range(2):
    dataset, opened = _recording(kind, 23)
    batches = _eval(dataset, (process, 2))
    assert opened == {index for index in _indices(batches) if index >= 0}
    every += opened
  assert sorted(every) == list(range(23))
