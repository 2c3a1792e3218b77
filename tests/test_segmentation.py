"""The segmentation task and its evaluator: the step's parts, exact counts, and runs that stop and resume."""

import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import portpicker
import pytest
import small_world
from small_world import environment
from test_loop import ROOT

from dtm_jax import data, loop, rngs
from dtm_jax.augment import normalize, to_float
from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.data.label_maps import IGNORE
from dtm_jax.datasets import shapes
from dtm_jax.evaluators import Context
from dtm_jax.evaluators import _sliding_windows as segmentation
from dtm_jax.evaluators import segmentation as evaluator
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import segmenter
from dtm_jax.models.vit import weights as vit_weights
from dtm_jax.normalizations import NORMALIZATIONS
from dtm_jax.tasks import Run, segment
from dtm_jax.training import mesh as meshes
from dtm_jax.training import schedules

TINY = dict(width=16, depth=2, num_heads=2, channels=8, auxiliary_channels=4)


def tiny_config(**sections):
  """configs/seg_debug.py at toy size."""
  config = importlib.import_module("configs.seg_debug").get_config()
  shapes_32 = dict(name="shapes", side=32, num_examples=40, border=3)
  config.data.dataset = config.evals.val.dataset = shapes_32
  config.batch_size, config.total_steps = 8, 6
  config.data.image_size = 32
  config.model.update(**TINY, head="linear")
  config.evals.val.update(dict(image_size=32, crop=32, stride=21, windows=1, at_start=False))
  config.optim.warmup_steps = 0
  config.log.log_steps = 2
  for section, options in sections.items():
    config[section].update(options)
  return config


def make_task(config):
  return segment.build(config, Run(config.total_steps, 5.0, config.batch_size, shapes.CLASS_NAMES))


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(1)
  label_map = rng.integers(0, 4, (8, 32, 32)).astype(np.uint8)
  label_map[rng.random(label_map.shape) < 0.2] = IGNORE
  return {"image": rng.integers(0, 256, (8, 32, 32, 3), np.uint8), "map": label_map}


def cross_entropy(logits, label_map):
  """Over labelled pixels, in float64; upsampled by the matrices that test_upsampling holds to PyTorch's."""
  rows, columns = (segmentation.bilinear_matrix(old, 32) for old in logits.shape[1:3])
  scores = np.einsum("ya,xb,nabg->nyxg", rows, columns, np.asarray(logits, np.float64))
  log_softmax = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
  valid = label_map != IGNORE
  label = np.where(valid, label_map, 0)
  return -np.take_along_axis(log_softmax, label[..., None].astype(int), axis=-1)[..., 0][valid].mean()


@pytest.mark.parametrize(("head", "flip"), [("linear", 0.0), ("upernet", 1.0)])
def test_the_step_is_its_parts(batch, head, flip):
  """The heads' losses by NumPy, of images and maps that are mirrored together."""
  config = tiny_config(augment=dict(flip=flip), model=dict(dropout=0.0, head=head))
  task = make_task(config)
  state = jax.jit(task.init)(jax.random.key(0))
  after, measurements = jax.jit(task.train_step)(state, {}, batch, jax.random.key(0))
  way = slice(None, None, -1 if flip else 1)
  image = normalize(to_float(batch["image"][:, :, way]), *NORMALIZATIONS["imagenet"])
  model = segmenter.build(**config.model, num_classes=4)
  variables = {"params": state["params"], "batch_stats": state["batch_stats"]}
  keys = {"drop_path": jax.random.key(0), "dropout": jax.random.key(0)}
  forward = jax.jit(lambda x: model.apply(variables, x, train=True, mutable=["batch_stats"], rngs=keys))
  outputs, updated = forward(image)
  label_map = batch["map"][:, :, way]
  expected = cross_entropy(outputs["logits"], label_map)
  if head == "upernet":
    expected += 0.4 * cross_entropy(outputs["auxiliary"], label_map)
  np.testing.assert_allclose(measurements["loss"], expected, rtol=1e-5)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), after["batch_stats"],
    updated["batch_stats"],
  )  # fmt: skip


def test_flips_are_drawn_image_by_image(batch):
  keys = rngs.per_example(rngs.stream(jax.random.key(0), "flip", 0), 8)
  image, label_map = segment.flip_together(keys, to_float(batch["image"]), jnp.asarray(batch["map"]), 0.5)
  mirrored = [np.array_equal(new, old[:, ::-1]) for new, old in zip(label_map, batch["map"], strict=True)]
  assert 0 < sum(mirrored) < 8
  for place, flipped in enumerate(mirrored):
    way = slice(None, None, -1 if flipped else 1)
    np.testing.assert_allclose(image[place], batch["image"][place][:, way] / 255.0, atol=1e-6)


def test_a_batch_without_labelled_pixels_has_a_loss_of_zero():
  loss, accuracy = segment.cross_entropy(jnp.ones((2, 4, 4, 3)), jnp.full((2, 8, 8), IGNORE, jnp.uint8))
  assert float(loss) == float(accuracy) == 0.0


def test_a_linear_rate_goes_straight_down():
  schedule = schedules.make_schedule(peak=2.0, total_steps=30, warmup_steps=10, final=0.5, decay="linear")
  rates = np.array([schedule(step) for step in range(40)])
  np.testing.assert_allclose(rates[10:30], 0.5 + 1.5 * (1 - np.arange(20) / 20), rtol=1e-6)
  np.testing.assert_allclose(rates[30:], 0.5)
  np.testing.assert_allclose(rates[:10], np.arange(10) / 9 * 2.0, rtol=1e-6)
  with pytest.raises(ValueError, match=r"decay 'poly'.*cosine, linear"):
    schedules.make_schedule(peak=1.0, total_steps=3, warmup_steps=0, final=0.0, decay="poly")


class TestWindows:
  def test_windows_cover_the_image_as_mmseg_places_them(self):
    image = np.zeros((100, 230, 3), np.uint8)
    squares, plan = segmentation.Sliding(shorter=50, crop=50, stride=33).windows(image)
    assert plan.size == (50, 115)
    assert plan.starts == ((0,), (0, 33, 65))
    assert [square.shape for square in squares] == [(50, 50, 3)] * 3

  def test_an_image_within_the_crop_is_one_window_and_grey_around(self):
    squares, plan = segmentation.Sliding(shorter=8, longer=12, crop=12, stride=8).windows(
      np.zeros((4, 8, 3), np.uint8)
    )
    assert (plan.size, plan.starts) == ((6, 12), ((0,), (0,)))
    assert (squares[0][6:] == (124, 116, 104)).all()
    assert not squares[0][:6].any()

  def test_gaps_between_windows_are_refused(self):
    with pytest.raises(ValueError, match=r"stride=9.*crop=8"):
      segmentation.Sliding(shorter=8, crop=8, stride=9)

  @pytest.mark.parametrize("shape", [(40, 70), (33, 20), (16, 16), (90, 31)])
  def test_scores_are_put_together_as_pytorch_does(self, shape):
    """Upsample each window, add and count on a canvas, resize the canvas: by torch, step by step."""
    torch = pytest.importorskip("torch")
    resize = lambda x, size: torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
    rng = np.random.default_rng(0)
    squares, plan = segmentation.Sliding(shorter=24, crop=24, stride=10).windows(
      np.zeros((*shape, 3), np.uint8)
    )
    logits = [rng.normal(size=(6, 6, 5)).astype(np.float32) for _ in squares]
    canvas, count = torch.zeros(1, 5, *plan.size), torch.zeros(1, 1, *plan.size)
    places = [(y, x) for y in plan.starts[0] for x in plan.starts[1]]
    for (y, x), each in zip(places, logits, strict=True):
      up = resize(torch.from_numpy(each.transpose(2, 0, 1))[None], (24, 24))
      height, width = min(24, plan.size[0] - y), min(24, plan.size[1] - x)
      canvas[:, :, y : y + height, x : x + width] += up[:, :, :height, :width]
      count[:, :, y : y + height, x : x + width] += 1
    expected = resize(canvas / count, shape)[0].argmax(0).numpy()
    assert count.min() == 1
    assert np.mean(plan.classes(logits) == expected) > 0.999  # but for near ties

  def test_scores_that_are_no_numbers_are_refused(self):
    _, plan = segmentation.Sliding(shorter=8, crop=8, stride=8).windows(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(FloatingPointError):
      plan.classes([np.full((2, 2, 3), np.nan, np.float32)])


class TestScores:
  def test_by_hand(self):
    label = np.array([[0, 0, 1, IGNORE], [1, 1, 2, IGNORE]], np.uint8)
    predicted = np.array([[0, 1, 1, 0], [1, 0, 2, 3]])
    confusion = segmentation.confusion(label, predicted, 5)
    assert confusion[:3, :3].tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 1]]
    assert confusion.sum() == 6
    scores = segmentation.scores(confusion)  # classes 3 and 4 occur nowhere
    assert scores["miou"] == pytest.approx((1 / 3 + 2 / 4 + 1) / 3)
    assert scores["pixel_accuracy"] == 4 / 6
    assert scores["mean_accuracy"] == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)

  def test_a_class_that_is_only_predicted_counts_as_wrong(self):
    confusion = segmentation.confusion(np.zeros((1, 4), np.uint8), np.array([[0, 0, 0, 1]]), 3)
    scores = segmentation.scores(confusion)
    assert scores == {"miou": (3 / 4 + 0) / 2, "pixel_accuracy": 3 / 4, "mean_accuracy": 3 / 4}

  def test_without_a_labelled_pixel_there_is_no_score(self):
    with pytest.raises(ValueError, match="No pixel of the set is labelled"):
      segmentation.scores(np.zeros((3, 3), np.int64))


def red_and_green(state, batch):
  """Scores pixel by pixel that depend on the colours there alone: in every window the same."""
  pixel = batch["image"].astype(jnp.float32)
  return jnp.stack([pixel[..., 0], pixel[..., 1], pixel[..., 2], jnp.full(pixel.shape[:3], 120.0)], axis=-1)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("windows", [1, 3])
def test_every_labelled_pixel_counts_once(devices, windows):
  """At the images' own sizes nothing is interpolated: the answer is known pixel by pixel."""
  options = dict(name="shapes", side=32, num_examples=11, border=3)
  mesh = meshes.make_mesh(devices=jax.devices()[:devices])
  dataset = shapes.build("val", side=32, num_examples=11, border=3)
  expected = np.zeros((4, 4), np.int64)
  examples = [dataset.source[i] for i in range(11)]
  for example in examples:
    scores = np.concatenate([example["image"], np.full((*example["map"].shape, 1), 120)], axis=2)
    valid = example["map"] != IGNORE
    np.add.at(expected, (example["map"][valid], scores.argmax(2)[valid]), 1)
  own = lambda state, batch: red_and_green(state, batch)  # a cache of compilations of its own
  jitted = jax.jit(own, out_shardings=meshes.replicated(mesh))
  context = Context({"logits": jitted}, mesh)
  each = evaluator.Evaluator(context, dataset=options, image_size=24, stride=10, windows=windows)
  each._sliding = OwnSize(shorter=24, crop=24, stride=10)
  scores = dict(each.run({}))
  assert scores == segmentation.scores(expected)
  assert scores["pixel_accuracy"] == expected.trace() / sum((e["map"] != IGNORE).sum() for e in examples)
  assert jitted._cache_size() == 1


class OwnSize(segmentation.Sliding):
  """Of every image at its own size."""

  def windows(self, image):
    own = segmentation.Sliding(min(image.shape[:2]), self.crop, self.stride)
    return own.windows(image)


def test_a_model_with_other_classes_names_both_numbers():
  mesh = meshes.make_mesh(devices=jax.devices()[:1])
  context = Context({"logits": lambda state, batch: jnp.zeros((1, 2, 2, 7))}, mesh)
  each = evaluator.Evaluator(context, dataset=dict(name="shapes"), image_size=32)
  with pytest.raises(ValueError, match=r"scores 7 classes, data set 'shapes/val' has 4"):
    dict(each.run({}))


def test_counts_beyond_32_bits_survive_the_way_between_processes(monkeypatch):
  counts = np.array([[2**40 + 3, 5], [2**33, 0]], np.int64)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    evaluator.multihost_utils, "process_allgather", lambda x: np.asarray(jnp.stack([jnp.asarray(x)] * 2))
  )
  np.testing.assert_array_equal(evaluator._sum_over_processes(counts), 2 * counts)


def test_a_run_stops_and_resumes_to_the_bit(tmp_path, monkeypatch):
  config = tiny_config(mesh=dict(data=4, fsdp=2))
  uninterrupted = loop.train(config, str(tmp_path / "whole"))
  monkeypatch.setattr(Checkpoints, "reached_preemption", lambda self, step: step == 3)
  assert int(loop.train(config, str(tmp_path / "parts"))["step"]) == 3
  monkeypatch.undo()
  resumed = loop.train(config, str(tmp_path / "parts"))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(uninterrupted))
  whole, parts = (small_world.metrics(tmp_path / name) for name in ("whole", "parts"))
  assert small_world.timeless(whole[-1]) == small_world.timeless(parts[-1])
  assert {"val/miou", "val/pixel_accuracy", "val/mean_accuracy"} < whole[-1].keys()
  assert all(line.get("compilations", 1) == 1 for line in whole)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A file of a random student that has seen 64 pixels, and its parameters."""
  folder = tmp_path_factory.mktemp("student")
  student = vit.build("Ti", width=16, depth=2, num_heads=2, patch_size=8, out_dim=8)
  params = jax.jit(lambda key: vit.init(student, key, 64))(jax.random.key(3))
  vit_weights.save(folder, jax.device_get(params), "authors")
  return folder, params


class TestStart:
  def test_from_a_student_of_another_grid(self, weights):
    folder, given = weights
    task = make_task(tiny_config(init_from=dict(path=str(folder)), model=dict(head="upernet")))
    params = task.pretrained(jax.random.key(0))
    np.testing.assert_array_equal(params["cls_token"], given["cls_token"])
    assert params["blocks"]["attn"]["rel_pos_bias"]["table"].shape == (2, 7 * 7 + 3, 2)
    assert set(jax.eval_shape(task.init, jax.random.key(0), params)) == {
      "params",
      "opt_state",
      "batch_stats",
      "step",
    }

  def test_weights_of_another_width_name_both(self, weights):
    config = tiny_config(init_from=dict(path=str(weights[0])), model=dict(width=32))
    with pytest.raises(ValueError, match=r"cls_token: \(16,\), the segmenter wants \(32,\)"):
      make_task(config).pretrained(jax.random.key(0))

  def test_a_linear_probe_moves_its_head_alone(self, batch):
    config = tiny_config()
    config.optim.frozen = ("patch_embed/.*", "blocks/.*", "cls_token", "norm/.*")
    task = make_task(config)
    state = jax.jit(task.init)(jax.random.key(0))
    after, _ = jax.jit(task.train_step)(state, {}, batch, jax.random.key(0))
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), state["params"], after["params"])
    assert {name for name, part in moved.items() if any(jax.tree.leaves(part))} == {"decoder"}

  def test_data_that_do_not_fit_are_refused(self, tmp_path):
    config = tiny_config()
    with pytest.raises(ValueError, match=r"'shapes' has no class names"):
      segment.build(config, Run(1, 1.0, 8, None))
    config.data.view.crop = "random_resized"
    with pytest.raises(ValueError, match=r"data\.view\.crop='random_resized'.*'joint'"):
      make_task(config)
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    small_world.write_cifar10(tmp_path)
    photos = dict(name="cifar10", data_dir=str(tmp_path))
    context = Context({"logits": lambda state, batch: None}, mesh)
    with pytest.raises(ValueError, match="'cifar10' has no label maps"):
      evaluator.Evaluator(context, dataset=photos, split="test", image_size=32)


@pytest.mark.slow
def test_the_command_gives_one_number_on_1_device_on_8_and_in_2_processes(tmp_path):
  port = portpicker.pick_unused_port()
  cluster = dict(JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2")
  environments = {"1": environment(1), "8": environment(8)} | {
    f"2x4/{index}": environment(4, **cluster, JAX_PROCESS_ID=str(index)) for index in range(2)
  }
  options = {
    "total_steps": 0, "evals.val.dataset.num_examples": 9, "evals.val.image_size": 32, "evals.val.crop": 32,
    "evals.val.stride": 13, "data.image_size": 32, "model.patch_size": 4, "model.width": 32,
  }  # fmt: skip
  runs = [
    subprocess.Popen(
      [
        sys.executable, "-m", "dtm_jax.main", "--config=configs/seg_debug.py",
        f"--workdir={tmp_path / name.split('/')[0]}", *(f"--config.{k}={v}" for k, v in options.items()),
      ],
      cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    for name, env in environments.items()
  ]  # fmt: skip
  outputs = [run.communicate(timeout=300)[0].decode() for run in runs]
  assert [run.returncode for run in runs] == [0] * len(runs), "\n".join(out[-2000:] for out in outputs)
  one, eight, two = (small_world.metrics(tmp_path / name) for name in ("1", "8", "2x4"))
  assert one == eight == two
  dataset = shapes.build("val", num_examples=9)
  labelled = sum(label_map.size for _, label_map in data.whole_examples(dataset))
  accuracy = one[0]["val/pixel_accuracy"]  # metrics.jsonl has six digits; a pixel is worth more
  assert labelled < 100_000
  assert round(round(accuracy * labelled) / labelled, 6) == accuracy
