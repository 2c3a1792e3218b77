"""Five steps of scripts/replay_steps.py equal a PyTorch twin: student, matching, loss, clipping and AdamW.

The twin is written from the equations and the rules of docs/method.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_world import write_clip

from dtm_jax.models.vit import config as vit_config
from dtm_jax.models.vit import model as vit
from dtm_jax.models.vit import weights as vit_weights
from scripts.studies import replay_steps as script

torch = pytest.importorskip("torch")
F = torch.nn.functional

STEPS, BATCH, SIDE, PATCH, GRID = 5, 3, 20, 4, 5
HEADS, DEPTH, WIDTH, TARGET = 3, 2, 24, 16
OPTIONS = {"betas": (0.9, 0.98), "eps": 1e-8, "clip_norm": 0.05}


@pytest.fixture(scope="module")
def inputs():
  model = vit.VisionTransformer(patch_size=PATCH, width=WIDTH, depth=DEPTH, num_heads=HEADS, out_dim=TARGET)
  rng = np.random.default_rng(0)
  shapes = vit_config.param_shapes(model, (GRID, GRID))
  params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)
  weights = {f"param/{name}": np.array(x) for name, x in vit_weights.to_authors(params).items()}
  tokens = GRID * GRID
  # The targets share a part, so that morphing leaves something to learn.
  targets = rng.standard_normal((STEPS, BATCH, tokens, TARGET)) + 3 * rng.standard_normal(TARGET)
  return weights | {
    "images": rng.standard_normal((STEPS, BATCH, SIDE, SIDE, 3), np.float32),
    "masks": rng.random((STEPS, BATCH, tokens)) < 0.4,
    "targets": targets.astype(np.float32),
    "n": np.array([[7, 20], [25, 3], [0, 24], [12, 12], [1, 18]]),
    "k": np.array([[3, 2], [14, 1], [5, 4], [1, 14], [6, 7]]),
    "lr": np.array([0.0, 1e-3, 2e-3, 1.5e-3, 1e-3], np.float32),
    "weight_decay": np.array([0.05, 0.05, 0.3, 0.2, 0.1], np.float32),
  }


# The twin in PyTorch.


def bias(table):
  """Return the biases [heads, T, T] of a relative position table, with the class token first."""
  y, x = np.divmod(np.arange(GRID**2), GRID)
  row = (y[:, None] - y[None] + GRID - 1) * (2 * GRID - 1) + x[:, None] - x[None] + GRID - 1
  index = np.full((1 + GRID**2,) * 2, len(table) - 1)
  index[1:, 1:] = row
  index[0, 1:] = len(table) - 3
  index[1:, 0] = len(table) - 2
  return table[torch.from_numpy(index)].permute(2, 0, 1)


def student(p, pixels, mask):
  """Return the prediction [B, N, C] for images [B, 3, H, W]."""
  normed = lambda x, name: F.layer_norm(x, (WIDTH,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)
  linear = lambda x, name: F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])
  x = F.conv2d(pixels, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=PATCH)
  x = x.flatten(2).transpose(1, 2)
  m = mask[..., None].to(x.dtype)
  x = x * (1 - m) + p["mask_token"] * m
  x = torch.cat([p["cls_token"].expand(len(x), 1, WIDTH), x], dim=1)
  shared = bias(p["rel_pos_bias.relative_position_bias_table"])
  heads = lambda t: t.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)
  for layer in range(DEPTH):
    block = f"blocks.{layer}"
    q, k, v = (normed(x, f"{block}.norm1") @ p[f"{block}.attn.qkv.weight"].T).chunk(3, dim=-1)
    q, k, v = heads(q + p[f"{block}.attn.q_bias"]), heads(k), heads(v + p[f"{block}.attn.v_bias"])
    logits = (q * (WIDTH // HEADS) ** -0.5) @ k.transpose(-2, -1)
    logits = logits + bias(p[f"{block}.attn.relative_position_bias_table"]) + shared
    mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + p[f"{block}.gamma_1"] * linear(mixed, f"{block}.attn.proj")
    hidden = F.gelu(linear(normed(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
    x = x + p[f"{block}.gamma_2"] * linear(hidden, f"{block}.mlp.fc2")
  return linear(normed(x, "norm")[:, 1:], "lm_head")


def groups(target, rate, rounds):
  """Return M [G, N] of one image after `rounds` rounds of `rate` merges, without the first patch."""
  feature, size, member = target.double(), torch.ones(len(target)).double(), torch.eye(len(target)).double()
  for _ in range(rounds):
    t = len(feature)
    merges = min(rate, (t - 1) // 2)
    if merges <= 0:
      break
    unit = feature / feature.norm(dim=1, keepdim=True)
    score = unit[0::2] @ unit[1::2].T
    score[0] = -torch.inf
    value, best = score.max(dim=1)
    order = value.argsort(descending=True)
    sources, left = order[:merges], order[merges:].sort().values
    total, number, members = size[1::2, None] * feature[1::2], size[1::2].clone(), member[1::2].clone()
    for source in sources.tolist():
      destination = best[source]
      total[destination] += size[2 * source] * feature[2 * source]
      number[destination] += size[2 * source]
      members[destination] += member[2 * source]
    feature = torch.cat([feature[0::2][left], total / number[:, None]])
    size, member = torch.cat([size[0::2][left], number]), torch.cat([member[0::2][left], members])
  return member.float()


def morphed(x, member):
  mean = member / (member.sum(dim=1, keepdim=True) + 1e-6)
  return member.T @ (mean @ x)


def rate_of(n, k):
  rounded_up = -(-n // k)
  return n // k if rounded_up * k > GRID**2 else rounded_up


def twin(inputs, images):
  p = {
    name.removeprefix("param/"): torch.nn.Parameter(torch.tensor(x))
    for name, x in inputs.items()
    if name.startswith("param/")
  }
  plain = lambda name, x: x.ndim <= 1 or name.endswith(".bias") or name in ("pos_embed", "cls_token")
  decayed = {"params": [x for name, x in p.items() if not plain(name, x)], "decay": True}
  others = {"params": [x for name, x in p.items() if plain(name, x)], "decay": False}
  optimizer = torch.optim.AdamW([decayed, others], betas=OPTIONS["betas"], eps=OPTIONS["eps"])
  losses, norms = [], []
  for step in range(STEPS):
    for group in optimizer.param_groups:
      group["lr"] = float(inputs["lr"][step])
      group["weight_decay"] = float(inputs["weight_decay"][step]) if group["decay"] else 0.0
    target = torch.from_numpy(inputs["targets"][step])
    prediction = student(p, torch.from_numpy(images[step]), torch.from_numpy(inputs["masks"][step]))
    loss = 0.0
    for n, k in zip(inputs["n"][step].tolist(), inputs["k"][step].tolist(), strict=True):
      parts = []
      for u, v in zip(prediction, target, strict=True):
        member = groups(v, rate_of(n, k), k)
        parts.append(F.smooth_l1_loss(morphed(u, member), morphed(v, member), beta=2.0))
      loss = loss + torch.stack(parts).mean() / inputs["n"].shape[1]
    optimizer.zero_grad()
    loss.backward()
    norms.append(float(torch.nn.utils.clip_grad_norm_(p.values(), OPTIONS["clip_norm"])))
    optimizer.step()
    losses.append(float(loss.detach()))
  return np.array(losses), np.array(norms), {name: x.detach().numpy() for name, x in p.items()}


@pytest.fixture(scope="module")
def outputs(inputs):
  return script.replay(inputs, **OPTIONS)


def test_five_steps_equal_those_of_pytorch(inputs, outputs):
  losses, norms, final = twin(inputs, np.ascontiguousarray(np.moveaxis(inputs["images"], -1, 2)))
  print(
    "loss", np.abs(outputs["loss"] / losses - 1).max(), "norm", np.abs(outputs["grad_norm"] / norms - 1).max()
  )
  print("parameters", max(np.abs(outputs[f"param/{name}"] - x).max() for name, x in final.items()))
  np.testing.assert_allclose(outputs["loss"], losses, rtol=2e-5)
  np.testing.assert_allclose(outputs["grad_norm"], norms, rtol=1e-4)
  assert (norms > OPTIONS["clip_norm"]).any()  # some gradients were clipped
  for name, x in final.items():
    np.testing.assert_allclose(outputs[f"param/{name}"], x, atol=5e-5, err_msg=name)
  moved = {name: np.abs(x - inputs[f"param/{name}"]).max() for name, x in final.items()}
  assert min(moved.values()) > 1e-4


def test_the_groups_follow_the_description(inputs, outputs):
  for step in range(STEPS):
    for s, (n, k) in enumerate(zip(inputs["n"][step], inputs["k"][step], strict=True)):
      for b in range(BATCH):
        member = groups(torch.from_numpy(inputs["targets"][step, b]), rate_of(int(n), int(k)), int(k)).numpy()
        smallest = member.argmax(axis=1)
        np.testing.assert_array_equal(outputs["labels"][step, s, b], smallest[member.argmax(axis=0)])


def test_the_first_rate_of_zero_moves_nothing(inputs):
  first = {name: x if name.startswith("param/") else x[:1] for name, x in inputs.items()}
  outputs = script.replay(first, **OPTIONS)
  for name, x in inputs.items():
    if name.startswith("param/"):
      np.testing.assert_array_equal(outputs[name], x)


def test_other_forms_of_the_inputs(inputs, outputs):
  """The inputs may have images with channels first, and rates instead of tokens to merge."""
  other = {name: x for name, x in inputs.items() if name not in ("images", "n")}
  other["images_chw"] = np.moveaxis(inputs["images"], -1, 2)
  other["r"] = np.vectorize(rate_of)(inputs["n"], inputs["k"])
  for name, x in script.replay(other, **OPTIONS).items():
    np.testing.assert_array_equal(x, outputs[name])


def test_missing_inputs_are_named(inputs):
  incomplete = {name: x for name, x in inputs.items() if name not in ("masks", "n", "targets")}
  with pytest.raises(ValueError, match=r"lack masks, r or n, targets\."):
    script.replay(incomplete)


def test_the_command_with_a_clip_as_teacher(inputs, outputs, tmp_path, capsys):
  folder = write_clip(tmp_path / "clip")
  first = {name: x if name.startswith("param/") else x[:1] for name, x in inputs.items() if name != "targets"}
  np.savez(tmp_path / "in.npz", **first)
  files = [str(tmp_path / name) for name in ("in.npz", "out.npz")]
  with pytest.raises(SystemExit):
    script.main([*files, "--betas=0.9,0.98,0.99"])
  script.main([*files, f"--clip={folder}", "--betas=0.9,0.98"])
  teacher = script.clip.build(str(folder))
  targets = np.asarray(teacher.apply(teacher.params, jnp.asarray(inputs["images"][0])))[None]
  expected = script.replay({**first, "targets": targets}, betas=(0.9, 0.98))
  with np.load(tmp_path / "out.npz") as found:
    assert set(found) == set(outputs)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
  assert f"step 1: loss {expected['loss'][0]:.4f}" in capsys.readouterr().out
