"""Any file of a CLIP into the folder that `dtm_jax.models.clip.model.weights.save` writes; needs no PyTorch.

    python scripts/convert_clip.py --source=ViT-B-16.pt --to=clip_b16

The source is a file, a folder or a repository of the hub: transformers' (safetensors, pytorch_model.bin,
flax_model.msgpack), OpenAI's TorchScript, or open_clip's. Its normalisation and tokenizer.json go with it.
"""

import argparse
import hashlib
import shutil
from pathlib import Path

from dtm_jax.models.clip import config as clip_config
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.files import weight_files
from dtm_jax.models.layers import ACTIVATIONS
from dtm_jax.storage import writing
from dtm_jax.teachers.clip import mean_and_std_of

OPTIONS = {"heads": "--heads IMAGE TEXT", "activation": "--activation NAME"}


def convert(
  source: str,
  folder: str | Path,
  *,
  dtype: str = "float32",
  heads: tuple[int, int] | None = None,
  activation: str | None = None,
) -> None:
  """Writes `folder` from `source`; see the module's docstring.

  Raises:
    NotThereError: there is no such source.
    UnreadableFileError: it is damaged, or its names or shapes do not match.
    OptionError: neither the source nor the arguments tell heads or activation.
  """
  found = weight_files.find(source)
  config, params = clip_weights.load(found, heads=heads, activation=activation)
  clip_config.check_known(config, str(found.file), text=True, options=OPTIONS)
  mean, std = mean_and_std_of("clip", found)
  with writing.local_folder_for(folder) as local:
    clip_weights.save(local, config, params, dtype=dtype, mean=mean, std=std)
    if tokenizer := found.beside(weight_files.TOKENIZER):
      shutil.copy(tokenizer, local / weight_files.TOKENIZER)
    digest = hashlib.sha256((local / "model.safetensors").read_bytes()).hexdigest()
    (local / "SHA256SUMS").write_text(f"{digest}  model.safetensors\n")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--source", required=True, help="a file, a folder or a repository")
  parser.add_argument("--to", required=True, help="the folder to write")
  parser.add_argument(
    "--dtype", default="float32", choices=["float32", "float16"], help="of the stored tensors"
  )
  parser.add_argument(
    "--heads", type=int, nargs=2, help="of the image and the text tower, where the source does not tell them"
  )
  parser.add_argument("--activation", choices=list(ACTIVATIONS), help="likewise")
  args = parser.parse_args()
  convert(args.source, args.to, dtype=args.dtype, heads=args.heads, activation=args.activation)


if __name__ == "__main__":
  main()
