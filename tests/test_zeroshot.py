"""The zero-shot evaluator against answers that are known, with any batch size and number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_world
from coloured_images import mean_colour, write_cifar10

from configs import zeroshot_cifar10
from dtm_jax import loop, plugins
from dtm_jax.datasets import cifar10
from dtm_jax.evaluators import Context, zeroshot
from dtm_jax.evaluators._class_embeddings import ClassEmbeddings
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import prompts
from dtm_jax.models.clip import tokenizer as clip_tokenizer
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.normalizations import NORMALIZATIONS
from dtm_jax.tasks import Run, frozen_clip
from dtm_jax.training import mesh as meshes


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
  return write_cifar10(tmp_path_factory.mktemp("colours"))


@pytest.mark.parametrize("batch_size", [8, 16])
def test_every_image_counts_once(colours, batch_size):
  """The text of class g is the colour g, with any template."""
  names = ("airplane", "automobile", "bird")
  tokenize = lambda captions: np.array(
    [[next((i for i, name in enumerate(names) if name in caption), 3)] for caption in captions]
  )
  predict = {
    "image": mean_colour,
    "text": lambda state, batch: jnp.eye(4, 3)[batch["tokens"][:, 0]] + jnp.array([[0.0, 0.0, 1e-3]]),
  }
  context = Context(predict, meshes.make_mesh(8, 1), tokenize=tokenize)
  evaluator = zeroshot.Evaluator(
    context, dataset=colours, prompts="cifar10", image_size=32, batch_size=batch_size
  )
  # Three of the ten wrong labels say 0 for a blue image. Classes 2 to 9 are all nearer to it.
  assert dict(evaluator.run({})) == {"accuracy": 40 / 50, "top5": 47 / 50}


def test_captions_are_embedded_in_batches_of_one_shape(colours):
  """180 captions, 16 at a time on eight devices, need one compilation."""
  shapes = []

  def text(state, batch):
    shapes.append(batch["tokens"].shape)
    return jnp.eye(10)[batch["tokens"][:, 0]]

  names = cifar10.CLASS_NAMES
  tokenize = lambda captions: np.array([[names.index(text.split()[-1][:-1])] for text in captions])
  context = Context({"text": text}, meshes.make_mesh(8, 1), tokenize=tokenize)
  dataset = plugins.build("datasets", colours, split="test")
  make = lambda size: ClassEmbeddings(context, dataset, "cifar10", batch_size=size)
  np.testing.assert_array_equal(make(15)({}), np.eye(10))
  assert shapes == [(16, 1)] * 12
  np.testing.assert_array_equal(make(1000)({}), np.eye(10))
  assert shapes[12:] == [(184, 1)]


def test_a_task_without_a_tokenizer_is_refused(colours):
  context = Context({"image": mean_colour, "text": mean_colour}, meshes.make_mesh(8, 1))
  with pytest.raises(ValueError, match="prompts='cifar10' need a text tower, and this task has none"):
    zeroshot.Evaluator(context, dataset=colours, prompts="cifar10", image_size=32)


def test_a_frozen_clip_is_evaluated_through_the_loop(tmp_path):
  """Runs zero steps of configs/zeroshot_cifar10.py on the CLIP of this repository and 32 random images."""
  small_world.write_cifar10(tmp_path)
  config = zeroshot_cifar10.get_config()
  config.data.dataset.data_dir = config.evals.zeroshot.dataset.data_dir = str(tmp_path)
  loop.train(config, str(tmp_path / "run"))
  (line,) = small_world.metrics(tmp_path / "run")

  clip_config, params = clip_weights.load(config.clip.path)
  tokenize, model = clip_tokenizer.load_tokenizer(config.clip.path), clip.CLIP(clip_config)
  image = np.load(tmp_path / "cifar10" / "arrays" / "test_images.npy") / np.float32(255)
  pixels = (image - np.float32(NORMALIZATIONS["clip"][0])) / np.float32(NORMALIZATIONS["clip"][1])
  encode = lambda method: jax.jit(lambda x: model.apply({"params": params}, x, method=method))
  encode_image, encode_text = encode("encode_image"), encode("encode_text")
  image_BP = np.asarray(encode_image(jnp.asarray(pixels)))
  class_GP = []
  for captions in prompts.captions(cifar10.CLASS_NAMES, "cifar10"):
    text = np.asarray(encode_text(jnp.asarray(tokenize(captions))))
    mean = np.mean([row / np.linalg.norm(row) for row in text], axis=0)
    class_GP.append(mean / np.linalg.norm(mean))
  order = np.argsort(-image_BP @ np.transpose(class_GP), axis=1)
  right = [order[i, :count].tolist().count(i % 10) for count in (1, 5) for i in range(len(order))]
  accuracy, top5 = np.reshape(right, (2, -1)).mean(axis=1)
  assert line == {"step": 0, "zeroshot/accuracy": accuracy, "zeroshot/top5": top5}


def test_a_frozen_clip_is_not_trained():
  with pytest.raises(ValueError, match=r"total_steps must be 0, not 3"):
    frozen_clip.build(zeroshot_cifar10.get_config(), Run(3, 1.0, 8))
