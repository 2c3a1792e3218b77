"""The table of a profile: each kernel has its part of the model and its kind, and the times add up."""

import importlib
import json

import jax
import jax.numpy as jnp
import pytest
import small_world

from scripts.studies import kernel_times, profile_step


@pytest.mark.slow
def test_the_profile_of_a_step_adds_up_and_names_its_parts(world, one_device, tmp_path, capsys):
  profile_step.main(
    ["--config=configs/debug.py", "--config.batch_size=8", f"--config.teacher.path={world / 'clip'}",
     f"--config.data.dataset.data_dir={world}", f"--config.evals.knn.dataset.data_dir={world}",
     "--steps=2", f"--trace={tmp_path / 'trace'}", f"--json={tmp_path / 'p.json'}"]
  )  # fmt: skip
  record = json.loads((tmp_path / "p.json").read_text())
  sums = [sum(row.values()) for row in record["ms"].values()]
  assert sum(sums) == pytest.approx(record["total_ms"])
  assert sums == sorted(sums, reverse=True)
  parts = set(record["ms"])
  assert parts >= {"teacher", "student", "student, backward", "matching", "optimiser"}
  assert parts <= {*kernel_times.PARTS.values(), kernel_times.BACKWARD, kernel_times.OTHER}
  assert set(record["ms"]["matching"]) <= {"matching", "communication"}
  assert record["ms"]["teacher"]["products"] > 0
  assert record["ms"]["student, backward"]["attention"] > 0
  named = sum(row for part, row in zip(record["ms"], sums, strict=True) if part != kernel_times.OTHER)
  assert named > 0.5 * record["total_ms"]
  assert list((tmp_path / "trace").rglob("*.trace.json.gz"))  # it stays for xprof
  text = capsys.readouterr().out
  assert "| sum |" in text
  assert "| matching |" in text


def test_instructions_have_scopes_and_kinds():
  def function(x, w):
    with jax.named_scope("predict"):
      with jax.named_scope("attn"):
        logits = x @ w
        with jax.named_scope("proj"):
          x = jax.nn.softmax(logits) @ w
      return jnp.tanh(x).sum()

  text = jax.jit(jax.grad(function)).lower(jnp.ones((64, 64)), jnp.ones((64, 64))).compile().as_text()
  found = kernel_times.instructions(text)
  backward = [each for each in found.values() if each.backward]
  assert backward
  assert all("predict" in each.scopes for each in backward)
  kinds = {
    (*kernel_times._part_and_kind(each, ""), "proj" in each.scopes)
    for each in found.values() if each.opcodes & kernel_times.PRODUCTS
  }  # fmt: skip
  assert ("student", "attention", False) in kinds
  assert ("student", "products", True) in kinds
  assert ("student, backward", "products", True) in kinds


LINES = """
HloModule jit_step

%fused_computation.1 (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %i = s32[] constant(1)
  %add.9 = s32[] add(%i, %i)
  ROOT %slice.2 = f32[8,8]{1,0} dynamic-slice(%p, %add.9), dynamic_slice_sizes={8,8}
}

ENTRY %main (a: f32[8,8], /*index=1*/b: f32[8]) -> (f32[8,8]) {
  %fusion.1 = f32[8,8]{1,0} fusion(%a), kind=kLoop, calls=%fused_computation.1, metadata={op_name="jit(step)/teach/x"}
  %gemm.2 = (f32[8,8]{1,0}, s8[64]{0}) custom-call(%a), custom_call_target="__cublas$gemm", metadata={op_name="jit(step)/transpose(jvp(predict))/mlp/fc1/dot_general"}
  %kernel.3 = f32[8]{0} custom-call(%a), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/group/match_rounds"}
  %all-reduce.4 = f32[8]{0} all-reduce(%a), metadata={op_name="jit(step)/optimiser/add"}
  %tanh.5 = f32[8]{0} tanh(%a), metadata={op_name="jit(step)/predict/attn/out/add"}
}
"""  # noqa: E501


@pytest.mark.parametrize(
  ("name", "kernel", "part", "kind"),
  [
    ("fusion.1", "loop_dynamic_slice_fusion", "teacher", "copies"),
    ("gemm.2", "nvjet_hsh_192x128", "student, backward", "products"),
    ("kernel.3", "match_rounds", "matching", "matching"),
    ("all-reduce.4", "ncclDevKernel", "optimiser", "communication"),
    ("tanh.5", "input_tanh_fusion", "student", "elementwise"),
  ],
)
def test_names_of_a_gpu(name, kernel, part, kind):
  """The names are those of a GPU's program. No GPU has checked that they are all there."""
  assert kernel_times._part_and_kind(kernel_times.instructions(LINES)[name], kernel) == (part, kind)


def test_the_time_of_an_event_does_not_count_the_events_inside_it(monkeypatch):
  event = lambda name, start, duration: kernel_times._Event(name, name, "", start, duration)
  line = [event("b", 10, 20), event("a", 0, 100), event("c", 15, 5), event("d", 100, 7)]
  monkeypatch.setattr(kernel_times, "_device_lines", lambda profile: [type("L", (), {"events": line})])
  monkeypatch.setattr(kernel_times, "_event", lambda event: event)
  own = {event.instruction: seconds for event, seconds in kernel_times._own_times(None)}
  assert own == {"a": 80, "b": 15, "c": 5, "d": 7}


def test_a_profile_without_steps_is_refused(world):
  with pytest.raises(ValueError, match="--steps=0 must be at least 1"):
    profile_step.main([*small_world.arguments(world, "unused")[:1], "--steps=0"])


def test_a_folder_without_a_profile_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="has no profile"):
    kernel_times.kernels(tmp_path, "")


def test_the_boxes_of_the_step_are_the_scopes_of_the_table():
  """A box that is renamed must not vanish from the table."""
  pretrain = importlib.import_module("dtm_jax.tasks.pretrain").Pretraining
  boxes = [name for name in kernel_times.PARTS if name not in ("probe", "optimiser")]
  assert all(hasattr(pretrain, name) for name in boxes)
