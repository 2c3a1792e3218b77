"""The bytes of every collective, in a text with a known answer and in the step on eight devices."""

import jax
import pytest
import small_world

from dtm_jax.errors import OptionError
from scripts.studies import collectives, communication

HLO = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state = (s32[], f32[4]{0}) parameter(0)
  ROOT %permute = f32[4]{0} collective-permute(%state), source_target_pairs={{0,1},{1,0}}
}

%body (carry: (s32[], f32[16])) -> (s32[], f32[16]) {
  %carry = (s32[], f32[16]{0}) parameter(0)
  %shard = f32[2,8]{1,0:T(2,128)} constant({...})
  %start = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%shard), replica_groups=[1,8]<=[8], dimensions={0}
  %gathered = f32[16,8]{1,0} all-gather-done(%start)
  %twice = (s32[], f32[4]{0}) while(%carry), condition=%counted, body=%inner
}

%counted (carry: (s32[], f32[16])) -> pred[] {
  %end = s32[]{:T(128)} constant(5)
  %carry = (s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%asking (carry: pred[]) -> pred[] {
  %carry = pred[] parameter(0)
  ROOT %any = pred[] all-reduce(%carry), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

ENTRY %main (p: f32[16]) -> f32[16] {
  %p = bf16[16]{0} parameter(0)
  %both = (f32[100]{0}, /*index=1*/bf16[2,5]{1,0}) all-reduce(%p, %p), replica_groups={{0,1,2,3},{4,5,6,7}}, \
to_apply=%add, metadata={op_name="jit(step)/gradient" stack_frame_id=1}
  %alone = f32[100]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %scattered = bf16[4]{0} reduce-scatter(%p), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
  %loop = (s32[], f32[16]{0}) while(%p), condition=%counted, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %send = (f32[27,8]{1,0}, u32[], token[]) send(%p, %p), channel_id=4, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}"}
  %sent = token[] send-done(%send), channel_id=4, is_host_transfer=true
  %debug = (f32[9]{0}, u32[], token[]) send(%p, %p), channel_id=5, is_host_transfer=true
  %wait = pred[] while(%p), condition=%asking, body=%add
}
"""


def test_a_text_with_a_known_answer():
  found = collectives.collectives(HLO)
  summary = [(each.kind, each.size, each.group, each.times) for each in found]
  assert summary == [
    ("all-reduce", 420, 4, 1),
    ("reduce-scatter", 32, 4, 1),
    ("all-gather", 512, 8, 3),
    ("collective-permute", 16, 8, 15),
    ("to other slices", 864, 2, 1),
    ("all-reduce", 1, 8, None),
  ]
  assert found[0].source == "jit(step)/gradient"
  assert found[0].arrays == ("f32[100]", "bf16[2,5]")
  expected = [420 * 2 * 3 / 4, 32 * 3 / 4, 3 * 512 * 7 / 8, 15 * 16, 864, 2 * 7 / 8]
  assert [each.sent_per_step for each in found] == pytest.approx(expected)
  assert collectives.total(found) == pytest.approx(sum(expected))


@pytest.mark.parametrize("text", ["nothing", "data=x", "fsdp=2,", "model=2"])
def test_a_mesh_of_another_form_is_refused(text):
  with pytest.raises(OptionError, match=f"--mesh={text}: must be data, fsdp"):
    communication.make_mesh(text, jax.devices())


def test_a_mesh_that_gives_an_axis_twice_is_refused():
  with pytest.raises(OptionError, match="--mesh=data=2,data=3 gives data twice: 2 and 3"):
    communication.make_mesh("data=2,data=3", jax.devices())


def test_a_text_without_entry_is_refused():
  with pytest.raises(ValueError, match="No ENTRY"):
    collectives.collectives("HloModule empty")


@pytest.fixture(scope="module")
def config(world):
  config = small_world.debug_config(world)
  del config.morphers["tokens"]  # it has no parameters
  return config


def bytes_of(tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled(config, mesh: str):
  step, state, frozen = communication.compile_step(config, communication.make_mesh(mesh, jax.devices()))
  return collectives.collectives(step.as_text()), state, frozen


@pytest.mark.slow
def test_data_parallel_steps_exchange_gradients_and_nothing_else(config):
  """Every gradient is sent once. Relative position tables are sent as biases [heads, T, T]."""
  found, state, _ = compiled(config, "data")
  assert {each.kind for each in found} == {"all-reduce"}
  assert None not in {each.times for each in found}
  student = config.student
  tokens = 1 + (config.data.image_size // student.patch_size) ** 2
  biases = student.depth * student.num_heads * tokens**2 * 4
  tables = bytes_of(state["params"]["blocks"]["attn"]["rel_pos_bias"])
  tables += bytes_of(state["params"]["rel_pos_bias"])
  gradients = bytes_of(state["params"]) - tables + biases
  assert sum(each.size * each.times for each in found) == pytest.approx(gradients, rel=0.01)


@pytest.mark.slow
def test_fsdp_gathers_parameters_and_no_activations(config):
  """All split parameters, also the teacher's, are gathered once. Gradients are reduced as before."""
  found, state, frozen = compiled(config, "fsdp")
  assert {each.kind for each in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
  split = bytes_of([
    x for x in jax.tree.leaves([state["params"], frozen]) if "fsdp" in str(x.sharding.spec)
  ])  # fmt: skip
  gathered = sum(each.size * each.times for each in found if each.kind == "all-gather")
  assert gathered == pytest.approx(split, rel=0.03)
