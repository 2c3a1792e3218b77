"""The contract of all teachers, the properties of each teacher, and a student that learns from each."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from dtm_jax import plugins
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.errors import OptionError, UserError
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.files import weight_formats, weight_names
from dtm_jax.models.frozen_vit import model as frozen_vit
from dtm_jax.models.frozen_vit import weights as frozen_vit_weights
from dtm_jax.models.vit import config as vit_config
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import transfer as vit_transfer
from dtm_jax.models.vit import weights as vit_weights
from dtm_jax.normalizations import NORMALIZATIONS
from dtm_jax.tasks import Run, pretrain
from dtm_jax.teachers import Teacher

CONFIG = clip.CLIPConfig(clip.ImageConfig(clip.Tower(32, 2, 4, 64), 32, 8), text=None, embed_dim=16)
build = plugins.load("teachers", "clip").build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clip")
  tower = clip.ImageTower(CONFIG.image, CONFIG.embed_dim)
  params = jax.jit(tower.init)(jax.random.key(0), image(32))["params"]
  clip_weights.save(folder, CONFIG, {"image": params}, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
  return folder


def image(size):
  return jnp.asarray(np.random.default_rng(2).standard_normal((2, size, size, 3), np.float32))


@pytest.fixture(scope="module")
def tower_output(folder):
  """Return what the tower in `folder` makes of two images."""
  tower, params = clip.ImageTower(CONFIG.image, CONFIG.embed_dim), clip_weights.load(folder)[1]["image"]
  apply = lambda params, x: tower.apply({"params": params}, x, mutable="intermediates")
  output, sown = jax.jit(apply)(params, image(32))
  (of_blocks,) = sown["intermediates"]["blocks"]["output"]
  return output | {"first_block": np.asarray(of_blocks[0])}


@pytest.mark.parametrize(
  ("tokens", "name", "width"), [("projected", "patch_embeddings", 16), ("normalized", "patch_tokens", 32)]
)
def test_tokens_match_the_tower(folder, tower_output, tokens, name, width):
  teacher = build(str(folder), tokens=tokens)
  assert isinstance(teacher, Teacher)
  assert (teacher.image_size, teacher.patch_size, teacher.grid, teacher.width) == (32, 8, (4, 4), width)
  assert all(
    isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(teacher.params)
  )
  token_BNC = jax.jit(teacher.apply)(teacher.params, image(32))
  assert token_BNC.shape == (2, 16, width)
  assert token_BNC.dtype == jnp.float32
  np.testing.assert_allclose(token_BNC, tower_output[name], atol=1e-6)


def test_another_image_size_resizes_the_positions(folder):
  teacher = build(str(folder), image_size=48)
  assert (teacher.image_size, teacher.grid) == (48, (6, 6))
  assert jax.eval_shape(teacher.apply, teacher.params, image(48)).shape == (2, 36, 16)
  with pytest.raises(ValueError, match=r"50x50 .*patch size 8"):
    build(str(folder), image_size=50)


def test_normalisations(folder, tmp_path):
  own = build(str(folder))
  assert (own.mean, own.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
  imagenet = build(str(folder), normalization="imagenet")
  assert (imagenet.mean, imagenet.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
  assert build(str(folder), normalization="inception").mean == (0.5, 0.5, 0.5)
  given = build(str(folder), normalization=([0.0, 0.1, 0.2], [1.0, 1.1, 1.2]))
  assert (given.mean, given.std) == ((0.0, 0.1, 0.2), (1.0, 1.1, 1.2))
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  without_preprocessor = build(str(tmp_path))
  assert (without_preprocessor.mean, without_preprocessor.std) == NORMALIZATIONS["clip"]


def test_half_precision_tokens_stay_near(folder, tower_output):
  teacher, exact = build(str(folder), dtype="bfloat16"), tower_output["patch_embeddings"]
  rough = jax.jit(teacher.apply)(teacher.params, image(32))
  assert rough.dtype == jnp.float32
  assert 1e-6 < np.abs(exact - rough).max() / np.abs(exact).max() < 0.03


def test_wrong_options_are_named(folder, tmp_path):
  with pytest.raises(ValueError, match=r"'raw'.*projected, normalized"):
    build(str(folder), tokens="raw")
  with pytest.raises(ValueError, match=r"'zero'.*imagenet, clip, inception"):
    build(str(folder), normalization="zero")
  image_params = clip_weights.load(folder)[1]["image"]
  del image_params["projection"]
  clip_weights.save(tmp_path, clip.CLIPConfig(CONFIG.image, None, None), {"image": image_params})
  assert "CLIPVisionModel" in json.loads((tmp_path / "config.json").read_text())["architectures"]
  with pytest.raises(ValueError, match="no projection"):
    build(str(tmp_path))
  assert build(str(tmp_path), tokens="normalized").width == 32


# The contract of all teachers -----------------------------------------------------------------------------

STUDENT = vit.VisionTransformer(patch_size=8, width=32, depth=2, num_heads=4, out_dim=10)
SIZES = {
  "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
  "image_size": 32, "patch_size": 8,
}  # fmt: skip


def random_like(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)


def write_frozen_vit(folder, **content):
  """Save a random tower under transformers' names."""
  content = SIZES | content
  config, rules = frozen_vit_weights.FAMILIES[content["model_type"]].from_transformers(content)
  tensors = weight_names.to_theirs(random_like(frozen_vit.param_shapes(config)), rules)
  weight_formats.write_safetensors(folder / "model.safetensors", tensors)
  (folder / "config.json").write_text(json.dumps(content))


def write_run(folder):
  """Write the workdir of a pre-training run."""
  config = {
    "augment": {"normalization": "imagenet"},
    "data": {"image_size": 32},
    "student": {"variant": "Ti", "width": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "drop_path": 0.1},
  }
  (folder / "config.json").write_text(json.dumps(config))
  saved = Checkpoints(str(folder / "checkpoints"))
  for step in (1, 2):
    saved.save(step, {"params": random_like(vit_config.param_shapes(STUDENT, (4, 4)), step)}, {})
  saved.close()


def write_clip(folder):
  shapes = jax.eval_shape(clip.ImageTower(CONFIG.image, 16).init, jax.random.key(0), image(32))["params"]
  clip_weights.save(folder, CONFIG, {"image": random_like(shapes)})


def write_beit(folder):
  vit_weights.save(folder, random_like(vit_config.param_shapes(STUDENT, (4, 4))), "transformers")


WRITERS = {
  "beit": write_beit,
  "checkpoint": write_run,
  "clip": write_clip,
  "dinov2": lambda folder: write_frozen_vit(
    folder, model_type="dinov2_with_registers", num_register_tokens=3
  ),
  "mae": lambda folder: write_frozen_vit(folder, model_type="vit_mae"),
  "siglip": lambda folder: write_frozen_vit(folder, model_type="siglip_vision_model"),
}
"""Writers of small random weights with a 4x4 grid, one for each teacher. A new teacher needs an entry."""


@pytest.fixture(scope="module", params=plugins.available("teachers"))
def weights(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  WRITERS[request.param](folder)
  return {"name": request.param, "path": str(folder)}


@pytest.fixture(scope="module")
def teacher(weights):
  return plugins.build("teachers", weights)


@pytest.fixture(scope="module")
def tokens(teacher):
  return jax.jit(teacher.apply)


def test_teacher_contract(weights, teacher, tokens):
  assert isinstance(teacher, Teacher)
  assert weights["path"] in teacher.name
  assert (teacher.image_size, teacher.patch_size, teacher.grid) == (32, 8, (4, 4))
  assert len(teacher.mean) == len(teacher.std) == 3
  leaves = jax.tree.leaves(teacher.params)
  assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in leaves)

  token_BNC = tokens(teacher.params, image(32))
  assert token_BNC.shape == (2, 16, teacher.width)
  assert token_BNC.dtype == jnp.float32
  assert np.isfinite(token_BNC).all()
  np.testing.assert_allclose(tokens(teacher.params, image(32)[::-1]), token_BNC[::-1], atol=1e-5)
  shifted = jax.tree.map(lambda leaf: leaf + 0.1, teacher.params)
  assert np.abs(tokens(shifted, image(32)) - token_BNC).max() > 1e-3  # the argument counts, not a copy
  with pytest.raises(ValueError, match="36x36"):
    tokens(teacher.params, image(36))


def silence(params, layer):
  """Return the parameters with a block that adds nothing to the residual stream."""
  blocks = jax.tree.map(np.copy, params["blocks"])
  last = (blocks["attn"].get("out") or blocks["attn"]["proj"], blocks["mlp"]["fc2"])
  for leaf in jax.tree.leaves(last):
    leaf[layer - 1] = 0.0
  return params | {"blocks": blocks}


def test_the_tokens_of_an_earlier_block(weights, teacher, tokens):
  """They are those of the whole tower if the later block adds nothing."""
  cut = plugins.build("teachers", weights, layer=1)
  expected = tokens(silence(teacher.params, 2), image(32))
  np.testing.assert_allclose(jax.jit(cut.apply)(cut.params, image(32)), expected, atol=1e-5)
  assert {leaf.shape[0] for leaf in jax.tree.leaves(cut.params["blocks"])} == {1}
  assert plugins.build("teachers", weights, layer=-2).resized(32).params.keys() == cut.params.keys()
  for layer in (2, -1):
    same = plugins.build("teachers", weights, layer=layer)
    assert jax.tree.all(jax.tree.map(np.array_equal, same.params, teacher.params))
  for layer in (0, 3, -3):
    with pytest.raises(OptionError, match=rf"no block {layer} .*2 blocks: .*1 to 2, or from -2 to -1"):
      plugins.build("teachers", weights, layer=layer)


def test_an_earlier_block_of_clip_is_the_towers_own_output(folder, tower_output):
  teacher = build(str(folder), tokens="normalized", layer=1)
  first = tower_output["first_block"].astype(np.float64)[:, 1:]
  mean, var = first.mean(-1, keepdims=True), first.var(-1, keepdims=True)
  norm = teacher.params["ln_post"]
  expected = (first - mean) / np.sqrt(var + CONFIG.image.tower.eps) * norm["scale"] + norm["bias"]
  np.testing.assert_allclose(jax.jit(teacher.apply)(teacher.params, image(32)), expected, atol=1e-5)


def test_every_teacher_takes_half_precision(weights, teacher, tokens):
  half = plugins.build("teachers", weights, dtype="bfloat16")
  exact, rough = (each(teacher.params, image(32)) for each in (tokens, jax.jit(half.apply)))
  assert rough.dtype == jnp.float32
  assert 1e-6 < np.abs(exact - rough).max() / np.abs(exact).max() < 0.1


def pretrain_task(world, teacher, patch_size):
  config = small_world.debug_config(world, batch_size=4, student__patch_size=patch_size, mask__num_masked=6)
  config.teacher = ConfigDict(teacher)
  return pretrain.build(config, Run(10, 1.0, 4))


def test_a_grid_other_than_the_students_is_refused(weights, tmp_path):
  if "image_size" not in plugins.options_of("teachers", weights["name"]):
    pytest.skip("this teacher has one size")
  with pytest.raises(OptionError, match=r"\(8, 8\).*image 32, patch 4.*\(4, 4\).*image 32, patch 8"):
    pretrain_task(tmp_path, weights | {"image_size": 32}, patch_size=4)


def test_a_student_learns_from_the_teacher_and_sets_its_image_size(weights, tmp_path, monkeypatch):
  """The weights are read once. The pre-training step is traced and not computed."""
  module = plugins.load("teachers", weights["name"])
  builds, build = [], module.build
  monkeypatch.setattr(module, "build", lambda **options: builds.append(options) or build(**options))
  task = pretrain_task(tmp_path, weights, patch_size=4)
  assert len(builds) == 1
  batch = {"image": jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8)}
  tokens = jax.eval_shape(task.outputs["teacher_tokens"], {}, task.frozen, batch)
  assert tokens.shape[1] == 64  # 8 x 8 patches of 8 pixels, of images of 64
  state = jax.eval_shape(task.init, jax.random.key(0))
  _, measurements = jax.eval_shape(task.train_step, state, task.frozen, batch, jax.random.key(0))
  assert measurements["loss"].shape == ()


def test_a_resized_teacher_matches_one_built_at_that_size(weights, teacher):
  """A second resize also starts from the positions that were read."""
  resized = teacher.resized(16).resized(48)
  built = plugins.build("teachers", {**weights, "image_size": 48})
  assert (resized.image_size, resized.grid) == (built.image_size, built.grid) == (48, (6, 6))
  jax.tree.map(np.testing.assert_array_equal, resized.params, built.params)
  tokens = [jax.jit(each.apply)(each.params, image(48)) for each in (resized, built)]
  np.testing.assert_array_equal(*tokens)


# Each teacher ---------------------------------------------------------------------------------------------


def test_teacher_input_is_resized_to_the_same_grid(tmp_path):
  """The teacher sees the student's pixels resized to the teacher's image size."""
  write_frozen_vit(tmp_path, model_type="dinov2")
  task = pretrain_task(tmp_path, {"name": "dinov2", "path": str(tmp_path), "image_size": 64}, patch_size=4)
  batch = {"image": jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8)}
  assert jax.eval_shape(task.outputs["teacher_tokens"], {}, task.frozen, batch).shape[1] == 64


@pytest.mark.parametrize(("name", "model_type", "mean"), [
  ("siglip", "siglip_vision_model", 0.5), ("dinov2", "dinov2", 0.485),
  ("mae", "vit_mae", 0.485), ("mae", "vit", 0.485),
])  # fmt: skip
def test_frozen_vits_take_the_normalisation_of_their_files(tmp_path, name, model_type, mean):
  write_frozen_vit(tmp_path, model_type=model_type)
  build = lambda **options: plugins.build("teachers", {"name": name, "path": str(tmp_path), **options})
  assert build().mean[0] == mean
  assert build(normalization="clip").mean == NORMALIZATIONS["clip"][0]
  own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
  assert (build().mean, build().std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
  larger = build(image_size=48)
  assert (larger.grid, larger.image_size) == ((6, 6), 48)
  assert jax.eval_shape(larger.apply, larger.params, image(48)).shape == (2, 36, 32)
  with pytest.raises(ValueError, match=r"50x50 .*patch size 8"):
    build(image_size=50)
  with pytest.raises(ValueError, match=rf"'{model_type}' .*none of: clip"):
    frozen_vit_weights.load(tmp_path, ["clip"])


def test_mismatched_names_are_listed(tmp_path):
  write_frozen_vit(tmp_path, model_type="dinov2")
  tensors = load_file(tmp_path / "model.safetensors")
  del tensors["layernorm.bias"], tensors["encoder.layer.1.layer_scale1.lambda1"]
  tensors["encoder.layer.0.attention.gate.weight"] = np.zeros(3, np.float32)
  tensors["embeddings.mask_token"] = np.zeros((1, 32), np.float32)  # known, and not used
  save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match="does not match") as error:
    plugins.load("teachers", "dinov2").build(str(tmp_path))
  assert sorted(str(error.value).splitlines()[1:]) == [
    "  missing: encoder.layer.1.layer_scale1.lambda1 (32,)",
    "  missing: layernorm.bias (32,)",
    "  unexpected: encoder.layer.0.attention.gate.weight (3,)",
  ]


def test_unsupported_models_are_refused(tmp_path):
  for changes, message in (
    ({"qkv_bias": False}, "dinov2 without biases"),
    ({"image_size": [32, 64]}, r"square .*\(32, 64\)"),
    ({"hidden_act": "relu"}, "'relu'.*gelu"),
  ):
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "model_type": "dinov2", **changes}))
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
      plugins.load("teachers", "dinov2").build(str(tmp_path))


def beit_models():
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("torch")
  options = {**SIZES, "use_mean_pooling": False, "layer_norm_eps": vit.EPS}
  shared = {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True}
  beit = transformers.BeitConfig(**options, **shared)
  data2vec = transformers.Data2VecVisionConfig(**options, use_relative_position_bias=True)
  return {
    "BeitModel": (transformers.BeitModel, beit),
    "BeitForImageClassification": (transformers.BeitForImageClassification, beit),
    "Data2VecVisionModel": (transformers.Data2VecVisionModel, data2vec),
  }


@pytest.mark.parametrize("kind", ["BeitModel", "BeitForImageClassification", "Data2VecVisionModel"])
def test_beit_tokens_match_transformers(tmp_path, kind):
  torch = pytest.importorskip("torch")
  make, config = beit_models()[kind]
  torch.manual_seed(0)
  model = make(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(0.0, 0.3)
    trunk = getattr(model, "beit", model)
    pixels = torch.from_numpy(np.array(image(32))).permute(0, 3, 1, 2)
    theirs = trunk(pixel_values=pixels).last_hidden_state[:, 1:].numpy()
  model.save_pretrained(tmp_path)
  teacher = plugins.load("teachers", "beit").build(str(tmp_path))
  ours = jax.jit(teacher.apply)(teacher.params, image(32))
  difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
  print(f"\n{kind}: {difference:.1e}")
  assert difference < 1e-4


def test_a_beit_without_a_final_norm_is_refused(tmp_path):
  write_beit(tmp_path)
  tensors = load_file(tmp_path / "model.safetensors")
  for leaf in ("weight", "bias"):
    tensors[f"pooler.layernorm.{leaf}"] = tensors.pop(f"layernorm.{leaf}")
  save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match="mean pooling"):
    plugins.load("teachers", "beit").build(str(tmp_path))
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
  with pytest.raises(ValueError, match=r"'bert'.*beit, data2vec-vision"):
    plugins.load("teachers", "beit").build(str(tmp_path))


def test_a_run_as_teacher_uses_its_last_checkpoint(tmp_path):
  write_run(tmp_path)
  build = plugins.load("teachers", "checkpoint").build
  teachers = {2: build(str(tmp_path)), 1: build(str(tmp_path), step=1)}
  apply, expected = jax.jit(teachers[2].apply), jax.jit(STUDENT.apply)
  for step, teacher in teachers.items():
    params = random_like(vit_config.param_shapes(STUDENT, (4, 4)), step)
    theirs = expected({"params": params}, image(32))["patches"]
    np.testing.assert_allclose(apply(teacher.params, image(32)), theirs, atol=1e-5)
    assert "head" not in teacher.params
  assert (teacher.mean, teacher.std) == NORMALIZATIONS["imagenet"]
  with pytest.raises(ValueError, match="32x32, not 40x40"):
    teacher.apply(teacher.params, image(40))
  with pytest.raises(FileNotFoundError, match=r"Steps: \[1, 2\]"):
    build(str(tmp_path), step=3)
  with pytest.raises(FileNotFoundError, match="not the workdir"):
    build(str(tmp_path / "nowhere"))


# The files beside the weights ---------------------------------------------------------------------------

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
OWN = {"image_mean": MEAN, "image_std": STD}
SAID = {
  "preprocessor_config.json": OWN,
  "processor_config.json": {"image_processor": OWN, "processor_class": "CLIPProcessor"},
  "processor_config.json, flat": OWN,
  "open_clip_config.json": {"preprocess_cfg": {"mean": MEAN, "std": STD}},
}


@pytest.mark.parametrize("file", SAID)
def test_every_teacher_reads_every_file_with_a_normalisation(weights, file, tmp_path):
  if weights["name"] == "checkpoint":
    pytest.skip("a run has its own configuration")
  copy = shutil.copytree(weights["path"], tmp_path / "copy")
  (copy / "preprocessor_config.json").unlink(missing_ok=True)
  (copy / file.partition(",")[0]).write_text(json.dumps(SAID[file]))
  teacher = plugins.build("teachers", {**weights, "path": str(copy)})
  assert (list(teacher.mean), list(teacher.std)) == (MEAN, STD)


def test_bad_values_of_a_normalisation_are_refused(folder, tmp_path, caplog):
  copy = shutil.copytree(folder, tmp_path / "copy")
  file = copy / "preprocessor_config.json"

  def said(**content):
    file.write_text(json.dumps(content))
    caplog.clear()
    teacher = build(str(copy))
    return teacher.mean, teacher.std

  assert said(image_std=STD) == (NORMALIZATIONS["clip"][0], tuple(STD))
  assert [record.getMessage() for record in caplog.records] == [
    f"{file} has no image_mean. Using that of 'clip'."
  ]
  assert said(image_mean=0.5, image_std=0.25) == ((0.5,) * 3, (0.25,) * 3)
  assert said(do_normalize=False) == ((0.0,) * 3, (1.0,) * 3)
  np.testing.assert_allclose(said(image_mean=[127.5] * 3, image_std=[127.5] * 3, do_rescale=False), 0.5)
  with caplog.at_level("INFO"):
    assert said(size=224) == NORMALIZATIONS["clip"]
  for content, message in (
    ({"image_mean": [0.5, 0.5], "image_std": STD}, r"image_mean is \[0\.5, 0\.5\], not three numbers"),
    ({"image_mean": "0.5", "image_std": STD}, "image_mean is '0.5'"),
    ({"image_mean": [0.5, None, 1], "image_std": STD}, "image_mean is"),
    ({"image_mean": MEAN, "image_std": [0.5, 0, 1]}, "image_std is .* above 0"),
    ({"image_mean": MEAN, "image_std": STD, "rescale_factor": "1"}, "rescale_factor is '1'"),
  ):
    with pytest.raises(UserError, match=rf"preprocessor_config\.json: {message}"):
      said(**content)


def test_two_different_files_are_ranked_as_in_transformers(folder, tmp_path, caplog):
  copy = shutil.copytree(folder, tmp_path / "copy")  # its preprocessor_config.json says (0.1, 0.2, 0.3)
  other = {"image_processor": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}}
  (copy / "processor_config.json").write_text(json.dumps(other))
  assert build(str(copy)).mean == (0.5, 0.5, 0.5)
  assert "processor_config.json, 'image_processor', not ((0.1, 0.2, 0.3)" in caplog.text


# Another image size -------------------------------------------------------------------------------------


# Each teacher has tests of its weights above, and resizes in the same way. So each positions stay once.
@pytest.mark.parametrize(("name", "positions"), [
  ("beit", "absolute"), ("checkpoint", "own and shared tables"),
  pytest.param("checkpoint", "absolute", marks=pytest.mark.long),
  pytest.param("beit", "own and shared tables", marks=pytest.mark.long),
])  # fmt: skip
def test_a_resized_student_teacher_matches_a_transferred_student(tmp_path, name, positions):
  """`init_from` transfers the same parameters to a student of that size."""
  tables = positions != "absolute"
  options = {"abs_pos_emb": not tables, "rel_pos_bias": tables, "shared_rel_pos_bias": tables}
  student = STUDENT.clone(out_dim=None, **options)
  params = random_like(vit_config.param_shapes(student, (4, 4)))
  if name == "beit":
    vit_weights.save(tmp_path, params, "transformers", num_heads=4)
  else:
    config = {
      "augment": {"normalization": "imagenet"},
      "data": {"image_size": 32},
      "student": {"variant": "Ti", "width": 32, "depth": 2, "num_heads": 4, "patch_size": 8, **options},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    saved = Checkpoints(str(tmp_path / "checkpoints"))
    saved.save(1, {"params": params}, {})
    saved.close()
  for size, grid in ((48, (6, 6)), (24, (3, 3))):
    teacher = plugins.build("teachers", {"name": name, "path": str(tmp_path), "image_size": size})
    assert (teacher.image_size, teacher.grid) == (size, grid)
    fresh = random_like(vit_config.param_shapes(student, grid), seed=1)
    moved = vit_transfer.to_student(params, fresh, grid=grid)
    expected = jax.jit(student.apply)({"params": moved}, image(size))["patches"]
    np.testing.assert_allclose(jax.jit(teacher.apply)(teacher.params, image(size)), expected, atol=1e-5)
    with pytest.raises(ValueError, match=f"{size}x{size}, not 32x32"):
      teacher.apply(teacher.params, image(32))
  with pytest.raises(ValueError, match=r"50x50 .*patch size 8"):
    plugins.build("teachers", {"name": name, "path": str(tmp_path), "image_size": 50})
