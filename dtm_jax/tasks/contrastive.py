"""Contrastive language-image training (CLIP, arXiv 2103.00020) on a labelled set.

A caption is a prompt template with the name of the image's class: the labels supervise in the form of text.
So images of one class are not negatives of each other. Every image and caption of a batch that share the
class are a positive pair (UniCL, arXiv 2204.03610).
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dtm_jax import augment
from dtm_jax.arrays import Array, Batch, Float, Int, PyTree, RandomKey
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import prompts
from dtm_jax.models.clip.tokenizer import Tokenizer, special_ids, word_tokenizer
from dtm_jax.normalizations import Triple, mean_and_std
from dtm_jax.tasks import Labels, Learner, Output, Pixels, Run, Scalars, State, StepKeys, Task, build_learner


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Contrastive(Task):
  """The boxes of a step: `augment`, `caption`, `predict`, `compare`.

  Attributes:
    image_size: pixels of a side.
    flip, color_jitter: the options of `augment.augment`.
    normalization: mean and standard deviation of the image tower's input.
    tokens_GPT: T tokens of each of P captions of each of G classes.
  """

  model: clip.CLIP
  image_size: int
  flip: float
  color_jitter: float
  normalization: tuple[Triple, Triple]
  tokens_GPT: Int[np.ndarray, "G P T"]
  learner: Learner

  def init(self, key: RandomKey, params: PyTree | None = None) -> State:
    tokens_BT = jnp.asarray(self.tokens_GPT[0, :1])
    return self.learner.init(
      _init_params(self.model, key, self.image_size, tokens_BT) if params is None else params
    )

  def train_step(self, state: State, frozen: PyTree, batch: Batch, key: RandomKey) -> tuple[State, Scalars]:
    """Make one update: augment, draw captions, embed both, compare all pairs."""
    label_B = batch["label"]
    keys = StepKeys(key, state["step"], len(label_B))
    image, tokens_BT = self.augment(batch["image"], keys), self.caption(label_B, keys)

    def loss_fn(params: PyTree) -> tuple[Array, Array]:
      logits_BB = self.predict(params, image, tokens_BT, keys)
      return self.compare(logits_BB, label_B), logits_BB

    after, measurements, logits_BB = self.learner.update(state, loss_fn)
    accuracy = jnp.mean(label_B[jnp.argmax(logits_BB, axis=1)] == label_B)
    scale = after["params"]["logit_scale"]
    return after, measurements | {"batch_accuracy": accuracy, "logit_scale": scale}

  def augment(self, image: Pixels, keys: StepKeys) -> Float[Array, "B H W 3"]:
    """Return the flipped, jittered and normalised images."""
    image = augment.augment(
      keys.per_example("augment"), image, flip=self.flip, color_jitter=self.color_jitter
    )
    return augment.normalize(image, *self.normalization)

  def caption(self, label_B: Labels, keys: StepKeys) -> Int[Array, "B T"]:
    """Return the tokens of one random caption for each label."""
    shape, num_prompts = label_B.shape, self.tokens_GPT.shape[1]
    prompt_B = jax.random.randint(keys.stream("prompt"), shape, 0, num_prompts)
    return jnp.asarray(self.tokens_GPT)[label_B, prompt_B]

  def predict(
    self, params: PyTree, image: Float[Array, "B H W 3"], tokens_BT: Int[Array, "B T"], keys: StepKeys
  ) -> Float[Array, "B B"]:
    """Return the scaled cosine similarity of every image (row) to every caption (column)."""
    image_BP, text_BP, logit_scale = self.model.apply(
      {"params": params}, image, tokens_BT, train=True, rngs={"patch_dropout": keys.stream("patch_dropout")}
    )
    return jnp.exp(logit_scale) * unit_norm(image_BP) @ unit_norm(text_BP).T

  def compare(self, logits_BB: Float[Array, "B B"], label_B: Labels) -> Float[Array, ""]:
    """Return the loss of all pairs."""
    return unicl_loss(logits_BB, label_B)

  @property
  def outputs(self) -> dict[str, Output]:
    return {"image": self.image, "text": self.text}

  def image(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B P"]:
    """Return the embedding of each image."""
    pixels = augment.normalize(augment.to_float(batch["image"]), *self.normalization)
    return self.model.apply({"params": state["params"]}, pixels, method="encode_image")

  def text(self, state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B P"]:
    """Return the embedding of each caption."""
    return self.model.apply({"params": state["params"]}, batch["tokens"], method="encode_text")


def build(config: Any, run: Run) -> Contrastive:
  """Build the task from the sections data, augment, clip, text and optim.

  Raises:
    OptionError: the data set has no class names, or the prompts do not fit them.
  """
  dataset = f"data set {config.data.dataset.name!r}"
  captions_GP = prompts.captions(run.class_names, config.text.prompts, dataset=dataset)
  tokenize = word_tokenizer(itertools.chain(*captions_GP), config.text.context_length)
  tokens_GPT = np.stack([tokenize(captions_P) for captions_P in captions_GP])
  model = clip.CLIP(
    clip_config(config, tokenize), dtype=config.clip.dtype, patch_dropout=config.clip.patch_dropout
  )
  image_size = config.data.image_size
  shapes = jax.eval_shape(
    lambda key: _init_params(model, key, image_size, jnp.asarray(tokens_GPT[0, :1])), jax.random.key(0)
  )
  return Contrastive(
    tokenize=tokenize,
    needs_labels=True,
    model=model,
    image_size=image_size,
    flip=config.augment.flip,
    color_jitter=config.augment.color_jitter,
    normalization=mean_and_std(config.augment.normalization),
    tokens_GPT=tokens_GPT,
    learner=build_learner(config.optim, shapes, run),
  )


def _init_params(model: clip.CLIP, key: RandomKey, image_size: int, tokens_BT: Array) -> PyTree:
  return model.init(key, jnp.zeros((1, image_size, image_size, 3)), tokens_BT)["params"]


def unicl_loss(logits_BB: Float[Array, "B B"], label_B: Labels) -> Float[Array, ""]:
  """Return ½ (CE(rows) + CE(columns)) of images against captions.

  The target of a row is spread evenly over all pairs of its class. If all labels differ, this is CLIP's loss.
  """
  same_BB = (label_B[:, None] == label_B[None, :]).astype(logits_BB.dtype)
  target_BB = same_BB / same_BB.sum(axis=1, keepdims=True)
  by_image = optax.softmax_cross_entropy(logits_BB, target_BB).mean()
  by_text = optax.softmax_cross_entropy(logits_BB.T, target_BB).mean()
  return (by_image + by_text) / 2


def unit_norm(x_BP: Float[Array, "B P"]) -> Float[Array, "B P"]:
  """Scale every row to length one."""
  return x_BP / jnp.linalg.norm(x_BP, axis=-1, keepdims=True)


def clip_config(config: Any, tokenize: Tokenizer) -> clip.CLIPConfig:
  """Return the architecture of the config's sections. The words of the captions decide the vocabulary."""
  return clip.CLIPConfig(
    image=clip.ImageConfig(clip.Tower(**config.clip.image), config.data.image_size, config.clip.patch_size),
    text=clip.TextConfig(clip.Tower(**config.clip.text), **special_ids(tokenize)),
    embed_dim=config.clip.embed_dim,
  )
