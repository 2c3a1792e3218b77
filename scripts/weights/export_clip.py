"""Export the CLIP of a contrastive run as a folder that `dtm_jax/teachers/clip.py` and transformers read.

    python scripts/export_clip.py --config=configs/tiny_clip_cifar10.py --workdir=runs/tiny_clip_cifar10 \\
      --to=assets/tiny_clip_cifar10

The folder gets the weights, their configuration and checksum, the tokenizer and the metrics of the training.
"""

import hashlib
import itertools
from collections.abc import Sequence

from dtm_jax import plugins
from dtm_jax.checkpoints.contents import load_params
from dtm_jax.models.clip import prompts
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.clip.tokenizer import word_tokenizer
from dtm_jax.normalizations import mean_and_std
from dtm_jax.options.command_line import parse_with_config, run_script, script_parser
from dtm_jax.storage import paths, writing
from dtm_jax.tasks import contrastive


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  parser = script_parser(__doc__)
  parser.add_argument("--workdir", required=True, help="workdir of the run, which was trained with --config")
  parser.add_argument("--to", required=True, help="the folder to write")
  config, args = parse_with_config(parser, argv)
  workdir = paths.resolve(args.workdir)
  dataset = plugins.build("datasets", config.data.dataset, split=config.data.split)
  captions_GP = prompts.captions(dataset.class_names, config.text.prompts)
  tokenizer = word_tokenizer(itertools.chain(*captions_GP), config.text.context_length)
  params = load_params(str(workdir / "checkpoints"))
  mean, std = mean_and_std(config.augment.normalization)
  with writing.local_folder_for(args.to) as folder:
    clip_weights.save(
      folder, contrastive.clip_config(config, tokenizer), params, dtype="float16", mean=mean, std=std
    )
    tokenizer.save(folder)
    (folder / "metrics.jsonl").write_text((workdir / "metrics.jsonl").read_text())
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  model.safetensors\n")


if __name__ == "__main__":
  run_script(main)
