"""The segmenter against PyTorch: its pieces, and all of it against transformers' port of BEiT's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import segmenter, upernet
from dtm_jax.models.vit import transfer as vit_transfer
from dtm_jax.models.vit import weights as vit_weights
from dtm_jax.training import mesh as meshes

torch = pytest.importorskip("torch")
SIZES = dict(width=24, depth=4, num_heads=2, patch_size=4)
NUM_CLASSES = 5


def to_torch(x):
  return torch.from_numpy(np.array(x).transpose(0, 3, 1, 2))


def from_torch(x):
  return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("scale", upernet.POOL_SCALES)
@pytest.mark.parametrize("size", [(16, 16), (5, 7), (2, 3)])
def test_adaptive_means_are_torchs(size, scale):
  x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
  expected = torch.nn.functional.adaptive_avg_pool2d(to_torch(x), scale)
  np.testing.assert_allclose(upernet.adaptive_mean(jnp.asarray(x), scale), from_torch(expected), atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [((3, 5), (12, 20)), ((1, 1), (4, 3)), ((8, 6), (5, 11))])
def test_upsampling_is_torchs(old, new):
  x = np.random.default_rng(0).normal(size=(2, *old, 3)).astype(np.float32)
  expected = torch.nn.functional.interpolate(to_torch(x), new, mode="bilinear", align_corners=False)
  np.testing.assert_allclose(upernet.upsample(jnp.asarray(x), new), from_torch(expected), atol=1e-5)


def tiny(head="upernet", **changes):
  options = SIZES | dict(num_classes=NUM_CLASSES, head=head, channels=24, auxiliary_channels=8) | changes
  return segmenter.build("Ti", **options)


@functools.cache
def variables_of(model, image_size=32, seed=0):
  """Parameters and statistics, all of them random: zero biases and unit variances would hide mistakes."""
  image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), image)
  rng = np.random.default_rng(seed)

  def draw(path, x):
    noise = rng.normal(size=x.shape).astype(np.float32)
    if path[-1].key in ("scale", "var"):
      return np.exp(0.3 * noise)
    return noise * np.float32(np.prod(x.shape[-4:-1]) ** -0.5 if path[-1].key == "kernel" else 0.1)

  return jax.tree_util.tree_map_with_path(draw, shapes)


CONVS = {  # ours below decoder/, transformers' below decode_head.
  **{f"pool{scale}": f"psp_modules.blocks.{i}.conv" for i, scale in enumerate(upernet.POOL_SCALES)},
  "pool_fuse": "psp_bottleneck",
  **{f"lateral{i}": f"lateral_convs.{i}" for i in range(3)},
  **{f"level{i}": f"fpn_convs.{i}" for i in range(3)},
  "fuse": "fpn_bottleneck",
}


def conv_tensors(params, statistics, name):
  kernel = np.asarray(params["conv"]["kernel"]).transpose(3, 2, 0, 1)
  return {f"{name}.convolution.weight": kernel, **norm_tensors(params, statistics, f"{name}.normalization")}


def norm_tensors(params, statistics, name):
  return {
    f"{name}.weight": params["bn"]["scale"], f"{name}.bias": params["bn"]["bias"],
    f"{name}.running_mean": statistics["bn"]["mean"], f"{name}.running_var": statistics["bn"]["var"],
    f"{name}.num_batches_tracked": np.int64(0),
  }  # fmt: skip


def linear_tensors(params, name):
  return {f"{name}.weight": np.asarray(params["kernel"]).T[:, :, None, None], f"{name}.bias": params["bias"]}


def up_tensors(params, name):
  """A transposed convolution of ours goes through its kernel backwards."""
  kernel = np.asarray(params["kernel"])[::-1, ::-1].transpose(2, 3, 0, 1)
  return {f"{name}.weight": kernel.copy(), f"{name}.bias": params["bias"]}


def student_of(params):
  """The trunk with what a student has besides."""
  width = params["cls_token"].shape[0]
  norm = {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}
  trunk = {name: params[name] for name in ("patch_embed", "cls_token", "blocks")}
  return trunk | {"norm": norm, "mask_token": np.zeros(width, np.float32)}


def head_tensors(variables):
  params, statistics = variables["params"], variables["batch_stats"]
  decoder, tensors = (params["decoder"], statistics["decoder"]), {}
  for ours, theirs in CONVS.items():
    tensors |= conv_tensors(decoder[0][ours], decoder[1][ours], f"decode_head.{theirs}")
  tensors |= linear_tensors(decoder[0]["classes"], "decode_head.classifier")
  auxiliary = params["auxiliary"]
  tensors |= conv_tensors(auxiliary["conv"], statistics["auxiliary"]["conv"], "auxiliary_head.convs.0")
  tensors |= linear_tensors(auxiliary["classes"], "auxiliary_head.classifier")
  pyramid = params["pyramid"]
  tensors |= norm_tensors(pyramid, statistics["pyramid"], "fpn.fpn1.normalization")
  for ours, theirs in {"up1": "fpn1.conv_transpose1", "up2": "fpn1.conv_transpose2", "up": "fpn2"}.items():
    tensors |= up_tensors(pyramid[ours], f"fpn.{theirs}")
  return {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}


def test_the_whole_is_transformers_beit_for_semantic_segmentation(tmp_path):
  transformers = pytest.importorskip("transformers")
  # transformers takes no tap behind the last block: its indices count the embeddings too.
  model = tiny(depth=5, taps=(1, 2, 3, 4))
  variables = variables_of(model)
  config = transformers.BeitConfig(
    hidden_size=24, num_hidden_layers=5, num_attention_heads=2, intermediate_size=96, image_size=32,
    patch_size=4, use_relative_position_bias=True, use_mask_token=True, use_mean_pooling=False,
    layer_norm_eps=1e-6, out_indices=[2, 3, 4, 5], num_labels=NUM_CLASSES,
    auxiliary_channels=8, hidden_dropout_prob=0.0,
  )  # fmt: skip
  twin = transformers.BeitForSemanticSegmentation(config).eval()
  vit_weights.save(tmp_path, student_of(variables["params"]), "transformers")
  trunk = transformers.BeitModel.from_pretrained(tmp_path, add_pooling_layer=False)
  twin.beit.load_state_dict(trunk.state_dict())
  missing, unexpected = twin.load_state_dict(head_tensors(variables), strict=False)
  assert not unexpected
  assert all(name.startswith("beit.") for name in missing), missing
  image = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)

  seen = {}
  for name, module in (("logits", twin.decode_head), ("auxiliary", twin.auxiliary_head)):
    module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
  with torch.no_grad():
    twin(to_torch(image))
  outputs = jax.jit(model.apply)(variables, image)
  assert outputs["logits"].shape == (2, 32, 32, NUM_CLASSES)
  assert outputs["auxiliary"].shape == (2, 8, 8, NUM_CLASSES)
  for name, ours in outputs.items():
    theirs = from_torch(seen[name])
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max(), name


def test_the_linear_head_is_its_parts_and_its_trunk_the_students():
  model = tiny("linear")
  variables = variables_of(model)
  params, statistics = variables["params"], variables["batch_stats"]["decoder"]["bn"]
  image = jnp.asarray(np.random.default_rng(1).normal(size=(2, 32, 32, 3)), jnp.float32)
  student = vit.build("Ti", **SIZES, shared_rel_pos_bias=False)
  trunk = {name: params[name] for name in ("patch_embed", "cls_token", "blocks", "norm")}
  tokens = student.apply({"params": trunk | {"mask_token": np.zeros(24, np.float32)}}, image)["patches"]
  tokens = np.asarray(tokens)
  bn, classes = params["decoder"]["bn"], params["decoder"]["classes"]
  x = (tokens - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5) * bn["scale"] + bn["bias"]
  expected = (x @ classes["kernel"] + classes["bias"]).reshape(2, 8, 8, NUM_CLASSES)
  logits = model.apply(variables, image)["logits"]
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_taps_are_the_stream_of_shallower_trunks_and_the_student_does_not_pay_for_them():
  model = vit.build("Ti", **SIZES)
  params = variables_of(model)["params"]
  image = jnp.asarray(np.random.default_rng(1).normal(size=(2, 32, 32, 3)), jnp.float32)

  trunk = {name: params[name] for name in ("patch_embed", "cls_token", "rel_pos_bias", "blocks")}
  taps = Taps(**SIZES).apply({"params": trunk}, image)
  for depth in range(1, 5):
    shallow = vit.build("Ti", **SIZES | {"depth": depth})
    cut = params | {"blocks": jax.tree.map(lambda x, depth=depth: x[:depth], params["blocks"])}
    expected = shallow.apply({"params": cut}, image)["tokens"]
    np.testing.assert_allclose(taps[depth - 1], expected, rtol=1e-5, atol=1e-5)
  jaxpr = jax.make_jaxpr(lambda p: model.apply({"params": p}, image))(params)
  scans = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
  assert [(eqn.params["num_carry"], len(eqn.outvars)) for eqn in scans] == [(1, 1)]


class Taps(vit.Trunk):
  """The stream after every block."""

  @nn.compact
  def __call__(self, image):
    return self.encode(self.embed(image), (8, 8), False, every_block=True)


@pytest.mark.parametrize(
  ("depth", "taps"), [(12, (4, 6, 8, 12)), (24, (8, 12, 16, 24)), (4, (1, 2, 3, 4)), (1, (1, 1, 1, 1))]
)
def test_taps_are_beits_in_proportion(depth, taps):
  assert segmenter.default_taps(depth) == taps


def test_statistics_are_of_the_whole_batch_on_one_device_and_on_eight():
  head = upernet.FCNHead(NUM_CLASSES, 8, 0.0, "float32")
  x = np.random.default_rng(1).normal(size=(8, 6, 6, 3)).astype(np.float32)
  x *= np.arange(1, 9, dtype=np.float32)[:, None, None, None]  # every device's part is another world
  variables = head.init(jax.random.key(0), jnp.asarray(x), False)
  step = lambda variables, x: head.apply(variables, x, True, mutable=["batch_stats"])
  results = []
  for count in (1, 8):
    mesh = meshes.make_mesh(devices=jax.devices()[:count])
    shardings = (meshes.replicated(mesh), meshes.batch_sharding(mesh))
    jitted = jax.jit(step, in_shardings=shardings, out_shardings=meshes.replicated(mesh))
    results.append(jax.device_get(jitted(variables, x)))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), *results)
  bn = results[0][1]["batch_stats"]["conv"]["bn"]
  convolved = nn.Conv(8, (3, 3), use_bias=False).apply({"params": variables["params"]["conv"]["conv"]}, x)
  np.testing.assert_allclose(bn["mean"], 0.1 * convolved.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(bn["var"], 0.9 + 0.1 * convolved.var((0, 1, 2)), rtol=1e-4)


def test_a_student_of_another_grid_becomes_a_segmenter_whose_trunk_is_its():
  student = vit.build("Ti", **SIZES, out_dim=8)
  given = variables_of(student, 16, seed=3)["params"]
  fresh = variables_of(tiny(), 32)["params"]
  params = vit_transfer.to_finetune(given, fresh, grid=(8, 8))
  for name in ("patch_embed", "cls_token"):
    jax.tree.map(np.testing.assert_array_equal, params[name], given[name])
  np.testing.assert_array_equal(
    params["blocks"]["mlp"]["fc1"]["kernel"], given["blocks"]["mlp"]["fc1"]["kernel"]
  )
  assert params["blocks"]["attn"]["rel_pos_bias"]["table"].shape == (4, 15 * 15 + 3, 2)
  jax.tree.map(np.testing.assert_array_equal, params["decoder"], fresh["decoder"])
  again = vit_transfer.to_finetune(params, variables_of(tiny(), 32, seed=1)["params"], grid=(8, 8))
  jax.tree.map(np.testing.assert_array_equal, again, params)  # a segmenter goes on with its head


def test_unknown_heads_and_taps_are_refused():
  with pytest.raises(ValueError, match=r"head 'fcn'.*linear, upernet"):
    tiny("fcn")
  with pytest.raises(ValueError, match=r"taps=\(1, 2, 3, 5\).*1\.\.4"):
    tiny(taps=(1, 2, 3, 5))
