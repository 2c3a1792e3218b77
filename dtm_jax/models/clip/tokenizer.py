"""Convert texts to the token ids of CLIP's text tower with the library `tokenizers`.

tokenizer = load_tokenizer(folder)                           # from its tokenizer.json
tokenizer = word_tokenizer(captions, context_length=16)      # one token for each word of the captions
token_BT = tokenizer(["a photo of a cat"])
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from dtm_jax.arrays import Int
from dtm_jax.errors import NotThereError
from dtm_jax.models.clip import config as clip_config
from dtm_jax.models.clip import model as clip
from dtm_jax.models.files.file_checks import UnreadableFileError, blaming, read_json

FILE = "tokenizer.json"

# The ids follow this order. <end> must not be 2, which `transformers` takes for its old, wrong default.
PAD, UNKNOWN, START, END = SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")


@dataclass(frozen=True)
class Tokenizer:
  """A function from B texts to ids int32 [B, T], which pads and truncates them to T = context_length."""

  encoder: tokenizers.Tokenizer
  context_length: int

  def __call__(self, texts: Iterable[str]) -> Int[np.ndarray, "B T"]:
    """Return the token ids of the texts with start and end tokens."""
    return np.array([encoding.ids for encoding in self.encoder.encode_batch(list(texts))], np.int32)

  def save(self, folder: str | Path) -> None:
    """Write tokenizer.json. `load_tokenizer` also needs the config.json of the model beside it."""
    self.encoder.save(str(Path(folder) / FILE))


def load_tokenizer(folder: str | Path, config: clip.CLIPConfig | None = None) -> Tokenizer:
  """Return the tokenizer in the tokenizer.json of a model's folder.

  Args:
    config: the model's configuration, for a folder without config.json.

  Raises:
    NotThereError: the folder has no tokenizer.json.
    UnreadableFileError: the model has no text tower, or a file is damaged.
  """
  folder = Path(folder)
  if not (folder / FILE).exists():
    raise NotThereError(f"No {FILE} in {folder}. The folder of a CLIP with a text tower needs one.")
  config_file = folder / "config.json"
  text = (config if config and not config_file.exists() else clip_config.read(config_file)).text
  if text is None:
    raise UnreadableFileError(f"The CLIP in {folder} has no text tower.")
  read_json(folder / FILE)
  with blaming(folder / FILE, " is damaged"):
    encoder = tokenizers.Tokenizer.from_file(str(folder / FILE))
  return _fixed_length(encoder, text.context_length, text.pad_token_id)


def word_tokenizer(captions: Iterable[str], context_length: int) -> Tokenizer:
  """Return a tokenizer with one token for each lower-case word and punctuation mark of the captions.

  Other words become <unk>. `special_ids` returns the fields of `clip.TextConfig` that this tokenizer sets.
  """
  encoder = tokenizers.Tokenizer(models.WordLevel(unk_token=UNKNOWN))
  encoder.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
  encoder.pre_tokenizer = pre_tokenizers.Whitespace()
  encoder.train_from_iterator(
    captions, trainers.WordLevelTrainer(special_tokens=list(SPECIAL), show_progress=False)
  )
  ends = [(token, _id_of(encoder, token)) for token in (START, END)]
  encoder.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
  return _fixed_length(encoder, context_length, _id_of(encoder, PAD))


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
  """Return the fields of `clip.TextConfig` that a `word_tokenizer` sets."""
  return {
    "vocab_size": tokenizer.encoder.get_vocab_size(),
    "context_length": tokenizer.context_length,
    "pad_token_id": _id_of(tokenizer.encoder, PAD),
    "bos_token_id": _id_of(tokenizer.encoder, START),
    "eos_token_id": _id_of(tokenizer.encoder, END),
  }


def _id_of(encoder: tokenizers.Tokenizer, token: str) -> int:
  number = encoder.token_to_id(token)
  if number is None:
    raise ValueError(f"The tokenizer has no token {token!r}.")
  return number


def _fixed_length(encoder: tokenizers.Tokenizer, length: int, pad_id: int) -> Tokenizer:
  encoder.enable_truncation(length)
  encoder.enable_padding(length=length, pad_id=pad_id, pad_token=encoder.id_to_token(pad_id))
  return Tokenizer(encoder, length)
