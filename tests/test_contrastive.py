"""The contrastive task: its loss equals sums written out, and steps teach three colours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import tiny_clip_cifar10
from dtm_jax.tasks import Run, contrastive

NAMES = ("cat", "dog", "owl")


def cross_entropy(logits, target):
  """Return -Σ_j target_j log softmax(logits)_j, averaged over rows, in NumPy."""
  logits = logits - logits.max(axis=1, keepdims=True)
  log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  return -(target * log_softmax).sum(axis=1).mean()


@pytest.mark.parametrize("label", [[0, 1, 2, 3], [0, 1, 0, 2], [1, 1, 1, 1]])
def test_unicl_loss(label):
  logits_BB = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
  target = np.zeros((4, 4))
  for row in range(4):
    friends = [column for column in range(4) if label[column] == label[row]]
    target[row, friends] = 1 / len(friends)
  expected = (cross_entropy(logits_BB, target) + cross_entropy(logits_BB.T, target)) / 2
  loss = contrastive.unicl_loss(jnp.asarray(logits_BB), jnp.asarray(label))
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_with_every_label_its_own_it_is_clips_loss():
  logits_BB = jax.random.normal(jax.random.key(0), (5, 5))
  one = optax.softmax_cross_entropy_with_integer_labels
  clip_loss = (one(logits_BB, jnp.arange(5)).mean() + one(logits_BB.T, jnp.arange(5)).mean()) / 2
  loss = contrastive.unicl_loss(logits_BB, jnp.array([4, 2, 0, 1, 3]))
  np.testing.assert_allclose(loss, clip_loss, rtol=1e-6)


@pytest.fixture(scope="module")
def task():
  config = tiny_clip_cifar10.get_config()
  config.clip.image.update(width=16, depth=1, num_heads=2, mlp_width=32)
  config.clip.text.update(width=16, depth=1, num_heads=2, mlp_width=32)
  config.clip.update(embed_dim=8, patch_dropout=0.5)
  config.optim.update(warmup_steps=1, lr=1e-2)
  return contrastive.build(config, Run(50, 5.0, 12, NAMES))


def test_learns_three_colours(task):
  """Red, green and blue images named cat, dog and owl: the right captions win after some steps."""
  label = np.arange(12) % 3
  image = np.zeros((12, 32, 32, 3), np.uint8)
  image[np.arange(12), :, :, label] = 200
  state = jax.jit(task.init)(jax.random.key(0))
  step = jax.jit(task.train_step)
  losses = []
  for _ in range(50):
    state, measurements = step(state, task.frozen, {"image": image, "label": label}, jax.random.key(0))
    losses.append(float(measurements["loss"]))
  least = np.log(4)  # four right answers for each image
  assert losses[-1] - least < (losses[0] - least) / 4
  assert int(state["step"]) == 50
  assert measurements["batch_accuracy"] == 1

  tokens = jnp.asarray(task.tokenize([f"a photo of a {name}." for name in NAMES]))
  image_BP = jax.jit(task.outputs["image"])(state, {}, {"image": image})
  text_GP = jax.jit(task.outputs["text"])(state, {}, {"tokens": tokens})
  cosine = contrastive.unit_norm(image_BP) @ contrastive.unit_norm(text_GP).T
  np.testing.assert_array_equal(jnp.argmax(cosine, axis=1), label)


def test_a_data_set_without_class_names_is_refused():
  with pytest.raises(ValueError, match="class names"):
    contrastive.build(tiny_clip_cifar10.get_config(), Run(20, 5.0, 12, None))
