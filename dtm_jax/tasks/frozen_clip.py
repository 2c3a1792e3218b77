"""A trained CLIP as it is, for evaluators that need both towers, such as zero-shot. Nothing is learned."""

from dtm_jax.arrays import Array, Batch, Float, PyTree
from dtm_jax.augment import normalize, to_float
from dtm_jax.models.clip import config as clip_configs
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import tokenizer as clip_tokenizer
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.files import weight_files
from dtm_jax.tasks import Run, State, Task
from dtm_jax.tasks.frozen import untrained
from dtm_jax.teachers.clip import mean_and_std_of


def build(config, run: Run) -> Task:
  """Section read: clip, with path, revision, normalization, dtype, heads, activation and weights.

  They are those of the CLIP teacher; `heads` is a pair here, of the image and the text tower.

  Raises:
    OptionError: the run has steps to train, or the CLIP has no text tower.
  """
  options = config.clip
  found = weight_files.find(options.path, revision=options.revision, weights=options.get("weights"))
  clip_config, frozen = clip_weights.load(
    found, heads=options.get("heads"), activation=options.get("activation")
  )
  clip_configs.check_known(clip_config, str(found.file), text=True, options=clip_configs.flags("clip"))
  tokenize = clip_tokenizer.load_tokenizer(found.folder, clip_config)
  model = clip.CLIP(clip_config, dtype=config.clip.dtype)
  mean, std = mean_and_std_of(config.clip.normalization, found)

  def image(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B P"]:
    pixels = normalize(to_float(batch["image"]), mean, std)
    return model.apply({"params": frozen}, pixels, method="encode_image")

  def patches(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B N P"]:
    pixels = normalize(to_float(batch["image"]), mean, std)
    return model.apply({"params": frozen}, pixels, method="encode_patches")

  def text(state: State, frozen: PyTree, batch: Batch) -> Float[Array, "B P"]:
    return model.apply({"params": frozen}, batch["tokens"], method="encode_text")

  predict = {"image": image, "patches": patches, "text": text}
  return untrained(run, f"CLIP {config.clip.path}", frozen, predict, tokenize)
