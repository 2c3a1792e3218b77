"""The embeddings of classes by the text tower of a CLIP, for direct use."""

import jax
import numpy as np

from dtm_jax.arrays import Float
from dtm_jax.models.clip import model as clip
from dtm_jax.models.clip import prompts as prompt_sets
from dtm_jax.models.clip import shapes as clip_shapes
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.clip.tokenizer import load_tokenizer
from dtm_jax.models.files import weight_files


def class_embeddings(path: str, class_names: list[str], prompts: str = "plain") -> Float[np.ndarray, "G E"]:
  """Return a unit-norm embedding for each of the G classes: the mean over the captions of its name.

  The class of an image, or of a token of the teacher "clip", is the class with the highest cosine similarity.

  >>> class_GE = class_embeddings("assets/tiny_clip_cifar10", ["cat", "ship"], prompts="cifar10")
  >>> class_GE.shape
  (2, 64)

  Args:
    path: a file, a folder or a repository of the hub, as for `dtm_jax.load_teacher`.
    class_names: the words to place in the templates.
    prompts: the name of a set of templates ("plain", "cifar10" ...; see `clip.prompts`), or a file with one
      template on each line.

  Raises:
    UserError: there are no such weights, they have no text tower, or the captions cannot be made.
  """
  found = weight_files.find(path)
  config, params = clip_weights.load(found)
  clip_shapes.check_known(config, str(found.file), text=True, options=clip_shapes.flags("clip"))
  tokenize, model = load_tokenizer(found.folder, config), clip.CLIP(config)
  embed = jax.jit(lambda token_BT: model.apply({"params": params}, token_BT, method="encode_text"))
  text_GPE = np.stack(
    [np.asarray(embed(tokenize(captions))) for captions in prompt_sets.captions(class_names, prompts)]
  )
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  return unit(unit(text_GPE).mean(axis=1))
