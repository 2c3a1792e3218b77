"""Durations and schedules equal NumPy's. The optimiser equals a NumPy twin of torch's AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import config_dict

from dtm_jax.models.vit import (
  classifier as vit_classifier,
)
from dtm_jax.models.vit import (
  config as vit_config,
)
from dtm_jax.models.vit import (
  model as vit,
)
from dtm_jax.models.vit import (
  weights as vit_weights,
)
from dtm_jax.training import mesh as meshes
from dtm_jax.training import optim, schedules

PER_EPOCH = {"steps_per_epoch": 100, "batch_size": 32}


def small_params(seed=0, layers=2):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  return {
    "patch_embed": {"kernel": normal(4, 6), "bias": normal(6)},
    "cls_token": normal(1, 1, 6),
    "blocks": {"attn": {"kernel": normal(layers, 6, 6), "q_bias": normal(layers, 6)}},
    "head": {"kernel": normal(6, 3), "bias": normal(3)},
  }


def run(optimizer, params, grads):
  def step(carry, grad):
    params, state = carry
    updates, state = optimizer.update(grad, state, params)
    return (optax.apply_updates(params, updates), state), None

  steps = jax.jit(lambda params, grads: jax.lax.scan(step, (params, optimizer.init(params)), grads)[0][0])
  return steps(params, jax.tree.map(lambda *each: np.stack(each), *grads))


# Durations.


@pytest.mark.parametrize(
  ("config", "steps"),
  [
    ({"warmup_steps": 7, "warmup_examples": 3200, "warmup_epochs": 5}, 7),
    ({"warmup_examples": 3200, "warmup_epochs": 5}, 100),
    ({"warmup_epochs": 5}, 500),
    ({"warmup_epochs": 0.5}, 50),
    ({"warmup_steps": None, "warmup_epochs": 2}, 200),
    ({"warmup_steps": 0, "warmup_epochs": 2}, 0),
    ({"warmup_examples": 3}, 1),
    ({"every_steps": 3}, 11),
  ],
)
def test_the_finest_duration_wins(config, steps):
  assert schedules.duration("warmup", config, default=11, **PER_EPOCH) == steps


def test_duration_of_a_config_with_placeholders():
  config = config_dict.create(total_steps=config_dict.placeholder(int), total_epochs=3)
  assert schedules.duration("total", config, **PER_EPOCH) == 300
  config.total_steps = 5
  assert schedules.duration("total", config, **PER_EPOCH) == 5


def test_duration_errors():
  with pytest.raises(ValueError, match="'total': set total_steps or total_examples or total_epochs"):
    schedules.duration("total", {}, **PER_EPOCH)
  with pytest.raises(ValueError, match="total_steps must not be negative, got -1"):
    schedules.duration("total", {"total_steps": -1}, **PER_EPOCH)
  with pytest.raises(ValueError, match="total_epochs=2 needs a data set of known size"):
    schedules.duration("total", {"total_epochs": 2}, steps_per_epoch=None, batch_size=32)


# Schedules.


def schedule_twin(peak, total, warmup, final):
  cosine = np.arange(total - warmup)
  cosine = final + 0.5 * (peak - final) * (1 + np.cos(np.pi * cosine / len(cosine)))
  return np.concatenate([np.linspace(0, peak, warmup), cosine])


@pytest.mark.parametrize(("total", "warmup"), [(1000, 100), (1000, 1), (300, 0), (2, 1), (100_000, 3000)])
def test_schedule_equals_its_transcription(total, warmup):
  schedule = schedules.make_schedule(peak=1.5e-3, total_steps=total, warmup_steps=warmup, final=1e-5)
  rates = jax.jit(schedule)(np.array([*range(total), total, 3 * total]))
  assert rates.dtype == jnp.float32
  rates, after = np.array(rates[:-2]), np.array(rates[-2:])
  np.testing.assert_allclose(rates, schedule_twin(1.5e-3, total, warmup, 1e-5), rtol=1e-6, atol=0)
  if warmup > 1:
    assert rates[0] == 0
    assert rates[warmup - 1] == rates[warmup] == np.float32(1.5e-3)
  np.testing.assert_allclose(after, 1e-5, rtol=1e-6)


def test_warmup_longer_than_the_run_is_cut():
  schedule = schedules.make_schedule(peak=1.0, total_steps=10, warmup_steps=101, final=0.0)
  np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(np.arange(10)), np.arange(10) / 100, rtol=1e-6)


def test_scale_by_batch():
  assert schedules.scale_by_batch(1.0, 512) == 0.5
  assert schedules.scale_by_batch(1.0, 512, "linear") == 2.0
  assert schedules.scale_by_batch(1.0, 512, "none") == 1.0
  with pytest.raises(ValueError, match=r"'cubic'\. Available: none, sqrt, linear"):
    schedules.scale_by_batch(1.0, 512, "cubic")


# The optimiser.


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("blocks/attn/qkv/kernel", True),
    ("blocks/attn/q_bias", False),
    ("blocks/norm1/scale", False),
    ("blocks/layer_scale1", False),
    ("blocks/attn/rel_pos_bias/table", True),
    ("rel_pos_bias/table", True),
    ("mask_token", True),
    ("cls_token", False),
    ("pos_embed", False),
    ("head/kernel", True),
    ("head/bias", False),
    ("visual/class_embedding", False),
    ("logit_scale", False),
  ],
)
def test_decay_goes_by_name(name, expected):
  assert optim.decayed(name) == expected


MODELS = {
  "student": lambda: vit.build("B", out_dim=512, abs_pos_emb=True),
  "classifier": lambda: vit_classifier.build("B", num_classes=1000),
}


@pytest.mark.parametrize("model", MODELS)
def test_decay_of_every_parameter_of_a_base_model(model):
  """In the authors' names: no decay for at most one axis, biases, the class token and positions."""
  shapes = vit_config.param_shapes(MODELS[model](), (14, 14))
  decay = jax.tree_util.tree_map_with_path(
    lambda path, x: np.broadcast_to(
      optim.decayed(jax.tree_util.keystr(path, simple=True, separator="/")), x.shape
    ),
    shapes,
  )
  found = vit_weights.to_authors(decay)
  assert len(found) == 12 * 16 + {"student": 10, "classifier": 7}[model]
  for name, values in found.items():
    expected = not (values.ndim <= 1 or name.endswith(".bias") or name in ("cls_token", "pos_embed"))
    assert (values == expected).all(), name


@pytest.mark.parametrize("model", MODELS)
def test_layer_decay_of_every_parameter_of_a_base_model(model):
  """ld^(L+1-i): i = 0 for tokens, positions and patch embedding, b+1 in block b of L = 12, else L+1."""
  shapes = vit_config.param_shapes(MODELS[model](), (14, 14))
  scales = optim.layer_decay_scales(shapes, 0.65)
  assert scales["blocks"]["mlp"]["fc1"]["kernel"].shape == (12, 1, 1)
  found = vit_weights.to_authors(jax.tree.map(lambda s, x: np.broadcast_to(s, x.shape), scales, shapes))
  for name, values in found.items():
    if name.startswith("patch_embed.") or name in ("cls_token", "mask_token", "pos_embed"):
      layer = 0
    elif name.startswith("blocks."):
      layer = int(name.split(".")[1]) + 1
    else:
      layer = 13
    assert (values == values.flat[0]).all(), name
    np.testing.assert_allclose(values.flat[0], 0.65 ** (13 - layer), rtol=1e-6, err_msg=name)
  groups = {(float(values.flat[0]), values.ndim > 1 and name not in ("cls_token", "pos_embed"))
            for name, values in found.items()}  # fmt: skip
  assert len({scale for scale, _ in groups}) == 14
  assert len(groups) == 28


def adamw_twin(params, grads, rates, decays, *, clip, betas, eps=1e-8):
  """Make a step of torch's AdamW on float64 arrays, each with a rate and a decay, after clip_grad_norm_."""
  params = {k: np.array(p, np.float64) for k, p in params.items()}
  m = {k: np.zeros_like(p) for k, p in params.items()}
  v = {k: np.zeros_like(p) for k, p in params.items()}
  for t, grad in enumerate(grads, start=1):
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in grad.values()))
    coefficient = min(1.0, clip / (norm + 1e-6))
    for k, p in params.items():
      g = np.asarray(grad[k], np.float64) * coefficient
      p *= 1 - rates[k][t - 1] * decays[k]
      m[k] = betas[0] * m[k] + (1 - betas[0]) * g
      v[k] = betas[1] * v[k] + (1 - betas[1]) * g * g
      mhat, vhat = m[k] / (1 - betas[0] ** t), v[k] / (1 - betas[1] ** t)
      p -= rates[k][t - 1] * mhat / (np.sqrt(vhat) + eps)
  return params


def flat(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


@pytest.mark.parametrize("layer_decay", [None, 0.65])
def test_adamw_equals_the_twin(layer_decay):
  params = small_params()
  sizes = (1.0, 0.01, 3.0, 0.1, 1.0)  # one gradient is clipped and one is not
  grads = [
    jax.tree.map(lambda x, size=size: np.float32(size) * x, small_params(i))
    for i, size in enumerate(sizes, 1)
  ]
  optimizer, rate = optim.make_optimizer(
    params, lr=0.02, final_lr=1e-3, total_steps=5, warmup_steps=2, batch_size=512, betas=(0.9, 0.98),
    weight_decay=0.3, clip_norm=3.0, layer_decay=layer_decay,
  )  # fmt: skip
  schedule = schedule_twin(0.02 * 0.5, 5, 2, 1e-3)
  np.testing.assert_allclose(jax.jit(jax.vmap(rate))(np.arange(5)), schedule, rtol=1e-6)
  scales = {"patch_embed/kernel": 3, "patch_embed/bias": 3, "cls_token": 3, "head/kernel": 0, "head/bias": 0}
  scale = lambda k: (layer_decay or 1.0) ** (scales[k] if k in scales else np.array([2, 1]))
  shaped = lambda k, x: np.reshape(scale(k), (-1,) + (1,) * (x.ndim - 1)) if np.ndim(scale(k)) else scale(k)
  rates = {k: [s * shaped(k, x) for s in schedule] for k, x in flat(params).items()}
  decays = {k: 0.3 if k.endswith("kernel") else 0.0 for k in flat(params)}
  expected = adamw_twin(flat(params), [flat(g) for g in grads], rates, decays, clip=3.0, betas=(0.9, 0.98))
  found = flat(run(optimizer, params, grads))
  for k, x in expected.items():
    np.testing.assert_allclose(found[k], x, atol=1e-6, rtol=1e-6, err_msg=k)


def test_the_twin_is_torch():
  torch = pytest.importorskip("torch")
  params = {k: np.asarray(x, np.float64) for k, x in flat(small_params()).items()}
  grads = [{k: np.asarray(x) for k, x in flat(small_params(i)).items()} for i in range(1, 4)]
  ours = adamw_twin(
    params, grads, {k: [0.01] * 3 for k in params}, {k: 0.3 for k in params}, clip=3.0, betas=(0.9, 0.98)
  )
  theirs = {k: torch.nn.Parameter(torch.tensor(x)) for k, x in params.items()}
  optimizer = torch.optim.AdamW(theirs.values(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.3)
  for grad in grads:
    for k, p in theirs.items():
      p.grad = torch.tensor(grad[k], dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_(theirs.values(), 3.0)
    optimizer.step()
  for k, p in theirs.items():
    np.testing.assert_allclose(ours[k], p.detach().numpy(), atol=1e-9, err_msg=k)


def test_accumulation_equals_one_big_batch():
  params = small_params()
  micro = [small_params(i) for i in range(1, 13)]
  options = {"lr": 0.01, "clip_norm": 3.0, "lr_scaling": "sqrt"}
  small, rate = optim.make_optimizer(
    params, total_steps=12, warmup_steps=4, batch_size=128, accumulate=4, **options
  )
  big, big_rate = optim.make_optimizer(params, total_steps=3, warmup_steps=1, batch_size=512, **options)
  mean = lambda trees: jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)
  expected = run(big, params, [mean(micro[i : i + 4]) for i in (0, 4, 8)])
  found = run(small, params, micro)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
  steps = np.arange(12)
  np.testing.assert_array_equal(jax.jit(jax.vmap(rate))(steps), jax.jit(jax.vmap(big_rate))(steps // 4))
  unmoved = run(small, params, micro[:7])  # one update so far, in warm-up's first step of rate zero
  jax.tree.map(np.testing.assert_array_equal, unmoved, params)


def test_fixed_parameters_stay_and_have_no_moments():
  params = small_params()
  optimizer, _ = optim.make_optimizer(
    params, total_steps=10, warmup_steps=0, batch_size=8, fixed=("blocks/.*", "cls_token"), layer_decay=0.9
  )
  found = run(optimizer, params, [small_params(1)] * 2)
  jax.tree.map(np.testing.assert_array_equal, found["blocks"], params["blocks"])
  assert not np.allclose(found["head"]["bias"], params["head"]["bias"])
  assert not [name for name in flat(optimizer.init(params)) if "blocks" in name]
  with pytest.raises(ValueError, match=r"optim\.fixed, \['blcks/.*'\]. Parameters: .*blocks/attn/kernel"):
    optim.make_optimizer(params, total_steps=10, warmup_steps=0, batch_size=8, fixed=("blcks/.*",))


def test_unknown_optimizer():
  with pytest.raises(ValueError, match=r"'lamb'\. Available: adamw, muon, sgd"):
    optim.make_optimizer(small_params(), name="lamb", total_steps=1, warmup_steps=0, batch_size=8)


@pytest.mark.parametrize(("name", "lr"), [("adamw", 0.1), ("muon", 0.5), ("sgd", 0.02)])
def test_every_optimizer_descends_and_keeps_shardings(name, lr):
  target = small_params(1)
  loss = jax.jit(lambda params: optax.tree.norm(optax.tree.sub(params, target), squared=True))
  optimizer, _ = optim.make_optimizer(
    target, name=name, total_steps=60, warmup_steps=5, batch_size=8, lr=lr,
    final_lr=0.0, lr_scaling="none", weight_decay=0.0, clip_norm=None,
  )  # fmt: skip

  def init():
    params = small_params()
    return {"params": params, "opt_state": optimizer.init(params)}

  @jax.jit
  def step(state):
    updates, opt_state = optimizer.update(
      jax.grad(loss)(state["params"]), state["opt_state"], state["params"]
    )
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

  mesh = meshes.make_mesh(4, 2)
  shardings = meshes.param_shardings(mesh, jax.eval_shape(init), [(".*", "fsdp")], min_size=1)
  state = jax.jit(init, out_shardings=shardings)()
  before = loss(state["params"])
  for _ in range(60):
    state = jax.block_until_ready(step(state))  # collectives of several steps at once can lock one another
  assert loss(state["params"]) < 0.05 * before
  kernels = {k: x for k, x in flat(state).items() if k.endswith("blocks/attn/kernel")}
  assert len(kernels) == (3 if name == "adamw" else 2)
  for k, x in kernels.items():
    assert x.sharding.is_equivalent_to(jax.NamedSharding(mesh, P(None, None, "fsdp")), 3), k


def test_muon_moves_along_an_orthogonal_matrix_in_every_layer():
  zeros, rng = lambda *shape: np.zeros(shape, np.float32), np.random.default_rng(0)
  params = {"blocks": {"kernel": zeros(3, 8, 16)}, "head": {"kernel": zeros(8, 4)}}
  grads = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), params)
  optimizer, _ = optim.make_optimizer(
    params, name="muon", total_steps=100, warmup_steps=0, batch_size=2048, lr=1.0
  )
  found = run(optimizer, params, [grads])
  values = np.linalg.svd(found["blocks"]["kernel"], compute_uv=False) / (0.2 * 16**0.5)
  assert np.all((values > 0.6) & (values < 1.3))  # what five Newton-Schulz iterations promise
  np.testing.assert_allclose(found["head"]["kernel"], -np.sign(grads["head"]["kernel"]), atol=1e-5)  # Adam
