"""The benchmarks of morphing and of input run at toy size. Groups and counts are asserted, times are not."""

import json

import numpy as np
import pytest

from benchmarks import input as input_benchmark
from benchmarks import morphing as morphing_benchmark
from benchmarks import photos


def test_every_variant_finds_the_groups_of_the_oracle():
  for name in morphing_benchmark.variants():
    count = morphing_benchmark.differences(name, 2, 4, 32, 24, 4, common=1.5)
    assert count["images"] == 8, name
    assert count["decidable"] >= 7, name
    assert count["decidable_differ"] == 0, name


def test_the_table_of_morphing(tmp_path):
  few = ["--batch=2", "--tokens=16", "--width=8", "--max_rounds=2", "--repeats=2", "--draws=1"]
  morphing_benchmark.main([*few, f"--out={tmp_path}"])
  record = json.loads((tmp_path / "morphing.json").read_text())
  assert set(record["variants"]) == {*morphing_benchmark.variants(), "morphing and loss"}
  for name, row in record["variants"].items():
    assert row["ms_per_image"]["median"] > 0
    assert row["compilations"] in (1, None), name
    assert f"| {name} |" in (tmp_path / "morphing.md").read_text()


def test_the_readers_of_input_make_whole_batches(tmp_path):
  assert photos.write_photos(tmp_path, 3) > 5000
  args = input_benchmark.parse(["--batch=4", "--image_size=32", "--threads=2"])
  for name in ("pipeline", "decode_alone", "decode_and_crop"):
    batches = input_benchmark.READERS[name](tmp_path, args)
    assert [next(batches) for _ in range(3)] == [4, 4, 4]


def test_the_growth_of_memory_is_that_of_the_later_part():
  memory = [(100 * i, 500.0 if i < 4 else 900.0 + 2 * i) for i in range(12)]
  grown = input_benchmark.growth(memory)
  assert grown["images"] == 1100
  np.testing.assert_allclose([grown["end_mb"], grown["mb_per_10000_images"]], [922.0, 200.0])


def test_the_wait_is_read_from_a_run_without_its_first_stretch(tmp_path):
  lines = [{"step": 1, "input_wait": 0.9}, {"step": 1, "knn": 0.1}, {"step": 2, "input_wait": 0.02}]
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
  np.testing.assert_array_equal(input_benchmark.waits(tmp_path), [0.02])
  (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]))
  with pytest.raises(ValueError, match="input_wait"):
    input_benchmark.waits(tmp_path)
