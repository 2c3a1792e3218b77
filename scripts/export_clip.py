"""Writes the CLIP of a contrastive run as a folder that `teachers/clip.py` and transformers read.

    python scripts/export_clip.py --config=configs/tiny_clip_cifar10.py --workdir=runs/tiny_clip_cifar10 \
      --to=assets/tiny_clip_cifar10

Besides weights, config and tokenizer it copies the training log and writes a checksum of the weights.
"""

import hashlib
import itertools

from absl import flags

from dtm_jax import plugins
from dtm_jax.checkpoints.contents import load_params
from dtm_jax.models.clip import prompts
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.clip.tokenizer import word_tokenizer
from dtm_jax.normalizations import mean_and_std
from dtm_jax.options import command_line
from dtm_jax.storage import paths, writing
from dtm_jax.tasks import contrastive

_WORKDIR = flags.DEFINE_string("workdir", None, "The run.", required=True)
_TO = flags.DEFINE_string("to", None, "The folder to write.", required=True)


def main(config) -> None:
  """Export the run of `--workdir`, which was trained with `config`."""
  workdir = paths.resolve(_WORKDIR.value)
  dataset = plugins.build("datasets", config.data.dataset, split=config.data.split)
  captions_GP = prompts.captions(dataset.class_names, config.text.prompts)
  tokenizer = word_tokenizer(itertools.chain(*captions_GP), config.text.context_length)
  params = load_params(str(workdir / "checkpoints"))
  mean, std = mean_and_std(config.augment.normalization)
  with writing.local_folder_for(_TO.value) as folder:
    clip_weights.save(
      folder, contrastive.clip_config(config, tokenizer), params, dtype="float16", mean=mean, std=std
    )
    tokenizer.save(folder)
    (folder / "metrics.jsonl").write_text((workdir / "metrics.jsonl").read_text())
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  model.safetensors\n")


if __name__ == "__main__":
  command_line.run_script(main)
