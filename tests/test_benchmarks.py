"""The benchmarks at toy size: the tests check reports and counts, never times."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import without_clu
import xla_flags

from benchmarks import measuring, memory, operations, prefixes, recompiles, remat, versions, workload
from dtm_jax import morphing, partitions
from dtm_jax.models.vit import model as vit

ROOT = Path(__file__).parents[1]


def test_rounds_are_interleaved_and_see_their_number():
  seen = []
  calls = {name: lambda i, name=name: seen.append((name, i)) for name in "abc"}
  times, first = measuring.interleaved(calls, rounds=4)
  assert [len(each) for each in times.values()] == [4, 4, 4]
  assert first.keys() == times.keys()
  assert seen[:3] == [("a", 0), ("b", 0), ("c", 0)]  # the first call of each, which compiles
  assert seen[3::2] == seen[4::2]  # once untimed, once timed
  timed = seen[4::2]
  orders = [[name for name, _ in timed[3 * r : 3 * r + 3]] for r in range(4)]
  assert all(sorted(order) == list("abc") for order in orders)
  assert len({tuple(order) for order in orders}) > 1
  assert [i for _, i in timed] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_report_is_a_table_and_json_of_the_same(tmp_path):
  values = measuring.quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
  assert values == {"median": 3.0, "low": 2.0, "high": 4.0}
  body = measuring.table(["what", "value"], [["x", measuring.spread(values, ".1f")]])
  text = measuring.report(tmp_path, "r", title="T", module="m", body=body, record={"x": values}, note="Busy.")
  assert (tmp_path / "r.md").read_text() == text
  assert "| x | 3.0 (2.0-4.0) |" in text
  record = json.loads((tmp_path / "r.json").read_text())
  assert record["x"] == values
  assert record["note"] == "Busy."
  assert jax.__version__ in record["machine"]


def test_the_command_names_what_the_environment_sets(monkeypatch):
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  monkeypatch.setenv("XLA_FLAGS", "--a --b")
  monkeypatch.setattr(sys, "argv", ["step.py", "--batch=8"])
  assert measuring.command("benchmarks.step") == "XLA_FLAGS='--a --b' python -m benchmarks.step --batch=8"


def test_a_step_of_vit_b_takes_141_gflop_an_image():
  """The number is that of the project's plan. XLA counts the same for one block without scan."""
  student = operations.student_forward(vit.build("B", out_dim=512), (14, 14))
  teacher = operations.tower(197, 768, 12, 3072) + operations.embedding(196, 16, 768) + 2 * 196 * 768 * 512
  assert round((3 * student + teacher) / 1e9) == 141

  def products(x, wide, narrow):
    logits = jnp.einsum("td,sd->ts", x, x)
    mixed = logits @ x
    for _ in range(4):
      mixed = mixed @ jnp.zeros((48, 48))
    return (mixed @ wide) @ narrow

  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((20, 48), (48, 192), (192, 48))]
  cost = jax.jit(products).lower(*shapes).cost_analysis()
  assert cost["flops"] == pytest.approx(operations.tower(20, 48, 1, 192), rel=0.01)


PARTS = """
from benchmarks import cold_start, input, morphers, morphing, peer, recompiles, remat, step, workload
from scripts.studies import profile_step
require_same, seen = step.require_same, []
step.require_same = lambda *run: seen.extend(run) or require_same(*run)
step.main(sys.argv[1:])
args, overrides = step.parse(sys.argv[1:])
config = workload.config_from(args.config, overrides)
config.batch_size, config.mask.num_masked = args.batch, 10
try:
  require_same(seen[0], step.prefixes_on(seen[0], workload.task_of(config)))
except AssertionError:
  print("Another mask gives another loss.")
"""


@pytest.mark.slow
@pytest.mark.long  # test_sharded_step.py trains without CLU and TensorFlow
def test_the_parts_are_those_of_the_step_without_clu_and_tensorflow(world, tmp_path):
  """`require_same` compares loss and gradient with the step. The end of PARTS shows that it can fail."""
  argv = ["--config=configs/debug.py", "--batch=8", "--repeats=1", "--matmul=64", f"--out={tmp_path}",
          f"--config.teacher.path={world / 'clip'}", "--config.loss.schedules=1"]  # fmt: skip
  output = without_clu.run(PARTS, *argv, XLA_FLAGS=xla_flags.QUICK)  # one device
  assert output.endswith("Another mask gives another loss.\n")
  record = json.loads((tmp_path / "step.json").read_text())
  assert set(record["parts_s"]) == set(prefixes.PARTS)
  shares = record["parts_share"]
  assert {"median", "low", "high"} == set(shares["teacher"])
  assert record["memory"]["planned in all"] > 0
  assert math.isfinite(record["mfu"]["median"])
  text = (tmp_path / "step.md").read_text()
  assert all(f"| {part} |" in text for part in prefixes.PARTS)


@pytest.mark.slow
@pytest.mark.long  # test_vit.py compares the gradients of every choice
def test_what_remat_keeps_falls_from_none_to_block(world, tmp_path, monkeypatch, one_device):
  options = ["--config.loss.schedules=1", f"--config.teacher.path={world / 'clip'}"]
  config = workload.config_from("configs/debug.py", options, "bfloat16")
  config.batch_size = 8
  kept = []
  for config.student.remat in ("none", "attention", "elementwise", "block"):
    kept.append(memory.kept_for_backward(config))
  assert kept == sorted(kept, reverse=True)
  assert len(set(kept)) == 4

  monkeypatch.setattr(memory, "kept_for_backward", lambda config: float(config.batch_size))
  monkeypatch.setattr(remat.vit, "REMATS", ("none", "block"))
  remat.main(
    ["--config=configs/debug.py", "--batch=8", "--plan=16", "--repeats=1", f"--out={tmp_path}", *options]
  )
  rows = json.loads((tmp_path / "remat.json").read_text())["remat"]
  assert [rows[name]["kept_gib"] for name in ("none", "block")] == [16, 16]
  assert "| block |" in (tmp_path / "remat.md").read_text()


@pytest.mark.slow
@pytest.mark.long  # test_pretrain.py counts the traces of a hundred steps
def test_draws_compile_once(one_device):
  """Many schedules need one trace, in the bare matching at 196 tokens and in the small step."""
  matching = recompiles.count(recompiles.matching_and_loss(196, 8, 14), draws=30)
  whole = recompiles.count(recompiles.train_step(recompiles.small_config("configs/debug.py")), draws=25)
  for result in (matching, whole):
    assert result["first"]["compilations"] >= 1
    assert result["first"]["traces"] >= 1
    assert result["later"] == {"traces": 0, "compilations": 0}
    assert result["distinct"] > 10


def test_the_count_sees_a_recompilation():
  sizes = iter((3, 3, 4))
  double = jax.jit(lambda x: 2 * x)
  result = recompiles.count(lambda i: (int(double(np.ones(next(sizes))).sum()), 0), draws=3)
  assert result["later"]["compilations"] >= 1
  assert result["later"]["traces"] >= 1


def test_the_peer_merges_as_we_do():
  """PyTorch's variable shapes and our fixed shapes give the same groups and the same loss."""
  torch = pytest.importorskip("torch")
  from benchmarks import peer_torch

  rng = np.random.default_rng(0)
  target, student = rng.normal(size=(2, 3, 20, 8)).astype(np.float32)
  for merges in ([4, 3, 5], [10], [0, 2], [12, 3, 3], [1] * 6):
    ours = morphing.bipartite_match(jnp.asarray(target), jnp.asarray(merges))
    place, groups = peer_torch.merge(torch.tensor(target), merges, shuffle=False)
    theirs = partitions.canonical_labels(jnp.asarray(place.numpy()))
    np.testing.assert_array_equal(ours, theirs)
    assert groups == int(partitions.num_groups(ours)[0])
    loss = peer_torch.morphed_loss(torch.tensor(student), torch.tensor(target), place, groups)
    expected = morphing.dtm_loss(jnp.asarray(student), jnp.asarray(target), ours[None])
    np.testing.assert_allclose(float(loss), float(expected), rtol=1e-5)


def test_the_peer_draws_the_papers_schedule():
  pytest.importorskip("torch")
  from benchmarks import peer_torch

  for seed in range(50):
    merges = peer_torch.draw_schedule(np.random.default_rng(seed), 196, 14)
    assert 1 <= len(merges) <= 14
    assert 0 <= sum(merges) <= 195
    expected = morphing.paper_merges(196 - sum(merges), len(merges), 196, 14)
    np.testing.assert_array_equal(expected, merges + [0] * (14 - len(merges)))


def test_two_versions_are_compared_round_by_round():
  found = {versions.STEP: {
    "old": [(1.0, 1.5, "0x1.0p+0"), (2.0, 3.0, "0x1.1p+0")],
    "new": [(0.5, 1.5, "0x1.0p+0"), (1.0, 3.0, "0x1.2p+0")],
  }}  # fmt: skip
  rows, record = versions.summarize(found, {versions.STEP: 10})
  assert record[versions.STEP]["new_to_old"]["median"] == 0.5
  assert record[versions.STEP]["ms_per_image"]["old"]["median"] == pytest.approx(150)
  assert rows == [
    [
      "train step",
      "150.00 (125.00-175.00)",
      "75.00 (62.50-87.50)",
      "0.500 (0.500-0.500)",
      "1.000 (1.000-1.000)",
      "1 of 2",
    ]
  ]


FOLDER = """
import jax
from dtm_jax.training import startup
startup.keep_compiled_programs()
print(jax.config.jax_compilation_cache_dir)
"""
SECOND_START = """
import jax
from dtm_jax.records.compilations import CompilationCounter
from dtm_jax.training import startup
startup.keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
counter = CompilationCounter()
step = jax.jit(lambda x: (x @ x).sum())
x = jax.numpy.ones((8, 8))
events.clear()
for _ in range(3):
  with counter:
    step(x)
hits = events.count("/jax/compilation_cache/cache_hits")
print(counter.count, hits, jax.config.jax_compilation_cache_dir, startup.kind_of_processor())
"""


@pytest.mark.slow
def test_a_program_from_the_cache_counts_as_one_compilation(tmp_path):
  environment = {
    k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
  } | {"DTM_JAX_CACHE": str(tmp_path)}

  def run(script: str, **more: str) -> list[str]:
    done = subprocess.run(
      [sys.executable, "-c", script], cwd=ROOT, env=environment | more, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()

  *first, processor = run(SECOND_START)
  folder = str(tmp_path / "xla" / processor)
  assert first == ["1", "0", folder]
  assert run(SECOND_START) == ["1", "1", folder, processor]
  assert run(FOLDER, JAX_ENABLE_COMPILATION_CACHE="false") == ["None"]
  elsewhere = str(tmp_path / "elsewhere")
  assert run(FOLDER, JAX_COMPILATION_CACHE_DIR=elsewhere) == [elsewhere]
