"""Texts to the token ids of CLIP's text tower, through the `tokenizers` library.

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

# The order gives the ids. <end> must not be 2: `transformers` takes that id for its old, wrong default.
PAD, UNKNOWN, START, END = SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")


@dataclass(frozen=True)
class Tokenizer:
  """Texts -> ids int32 [B, T] with start and end tokens, padded and truncated to T = context_length."""

  encoder: tokenizers.Tokenizer
  context_length: int

  def __call__(self, texts: Iterable[str]) -> Int[np.ndarray, "B T"]:
    return np.array([encoding.ids for encoding in self.encoder.encode_batch(list(texts))], np.int32)

  def save(self, folder: str | Path) -> None:
    """Writes tokenizer.json; `load_tokenizer` also needs the config.json of the model beside it."""
    self.encoder.save(str(Path(folder) / FILE))


def load_tokenizer(folder: str | Path, config: clip.CLIPConfig | None = None) -> Tokenizer:
  """Return the tokenizer of a folder with tokenizer.json.

  Args:
    config: of the model, for a folder without config.json.

  Raises:
    NotThereError: there is no tokenizer.json.
    UnreadableFileError: the model has no text tower, or a file is damaged.
  """
  folder = Path(folder)
  if not (folder / FILE).exists():
    raise NotThereError(f"No {FILE} in {folder}; the folder of a CLIP with a text tower has one.")
  config_file = folder / "config.json"
  text = (config if config and not config_file.exists() else clip_config.read(config_file)).text
  if text is None:
    raise UnreadableFileError(f"The CLIP in {folder} has no text tower.")
  read_json(folder / FILE)
  with blaming(folder / FILE, " is damaged"):
    encoder = tokenizers.Tokenizer.from_file(str(folder / FILE))
  return _fixed_length(encoder, text.context_length, text.pad_token_id)


def word_tokenizer(captions: Iterable[str], context_length: int) -> Tokenizer:
  """A token for each lower-case word and punctuation mark of the captions; all others are <unk>.

  `special_ids` gives what the configuration of the text tower must know of it.
  """
  encoder = tokenizers.Tokenizer(models.WordLevel(unk_token=UNKNOWN))
  encoder.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
  encoder.pre_tokenizer = pre_tokenizers.Whitespace()
  encoder.train_from_iterator(
    captions, trainers.WordLevelTrainer(special_tokens=list(SPECIAL), show_progress=False)
  )
  ends = [(token, encoder.token_to_id(token)) for token in (START, END)]
  encoder.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
  return _fixed_length(encoder, context_length, encoder.token_to_id(PAD))


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
  """The fields of `clip.TextConfig` that a `word_tokenizer` decides."""
  return {
    "vocab_size": tokenizer.encoder.get_vocab_size(),
    "context_length": tokenizer.context_length,
    **{
      field: tokenizer.encoder.token_to_id(token)
      for field, token in (("pad_token_id", PAD), ("bos_token_id", START), ("eos_token_id", END))
    },
  }


def _fixed_length(encoder: tokenizers.Tokenizer, length: int, pad_id: int) -> Tokenizer:
  encoder.enable_truncation(length)
  encoder.enable_padding(length=length, pad_id=pad_id, pad_token=encoder.id_to_token(pad_id))
  return Tokenizer(encoder, length)
