"""Convert a CLIP checkpoint to the safetensors folder that this project and transformers read.

    python scripts/convert_clip.py --source=ViT-B-16.pt --to=clip_b16

The source is a file, a folder or a repository of the hub, in one of these formats: transformers (safetensors,
pytorch_model.bin, flax_model.msgpack), OpenAI's TorchScript archive, or open_clip. The normalisation of the
images and tokenizer.json are copied with the weights. PyTorch is not needed.
"""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from dtm_jax.models.clip import shapes as clip_shapes
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.files import weight_files
from dtm_jax.models.layers import ACTIVATIONS
from dtm_jax.options.command_line import run_script, script_parser
from dtm_jax.storage import writing
from dtm_jax.teachers.clip import clip_mean_and_std

OPTIONS = {"heads": "--heads IMAGE TEXT", "activation": "--activation NAME"}


def convert(
  source: str,
  folder: str | Path,
  *,
  dtype: str = "float32",
  heads: tuple[int, int] | None = None,
  activation: str | None = None,
) -> None:
  """Write the CLIP `source` to `folder`: model.safetensors, config.json, tokenizer.json and SHA256SUMS.

  Args:
    source: a file, a folder or a repository of the hub.
    folder: a local folder or one in a bucket.
    dtype: "float32" or "float16", the type of the stored tensors.
    heads: number of attention heads of the image and of the text tower, if the source does not contain them.
    activation: name of the activation function, if the source does not contain it.

  Raises:
    NotThereError: there is no such source.
    UnreadableFileError: the source is damaged, or its names or shapes do not match.
    OptionError: neither the source nor the arguments give heads or activation.
  """
  found = weight_files.find(source)
  config, params = clip_weights.load(found, heads=heads, activation=activation)
  clip_shapes.check_known(config, str(found.file), text=True, options=OPTIONS)
  mean, std = clip_mean_and_std("clip", found)
  with writing.local_folder_for(folder) as local:
    clip_weights.save(local, config, params, dtype=dtype, mean=mean, std=std)
    if tokenizer := found.beside(weight_files.TOKENIZER):
      shutil.copy(tokenizer, local / weight_files.TOKENIZER)
    digest = hashlib.sha256((local / "model.safetensors").read_bytes()).hexdigest()
    (local / "SHA256SUMS").write_text(f"{digest}  model.safetensors\n")


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  parser = script_parser(__doc__)
  parser.add_argument("--source", required=True, help="a file, a folder or a repository of the hub")
  parser.add_argument("--to", required=True, help="the folder to write")
  parser.add_argument(
    "--dtype", default="float32", choices=["float32", "float16"], help="type of the stored tensors"
  )
  parser.add_argument(
    "--heads", type=int, nargs=2, metavar=("IMAGE", "TEXT"),
    help="number of attention heads of each tower, if the source does not contain it",
  )  # fmt: skip
  parser.add_argument(
    "--activation", choices=list(ACTIVATIONS), help="activation function, if the source does not contain it"
  )
  args = parser.parse_args(argv)
  convert(args.source, args.to, dtype=args.dtype, heads=args.heads, activation=args.activation)


if __name__ == "__main__":
  run_script(main)
