"""Files of weights and side files: good ones are read, others are refused with the reason and the remedy."""

import io
import json
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from dtm_jax.errors import NotThereError, OptionError, UserError
from dtm_jax.models.clip import weights as clip_weights
from dtm_jax.models.files import checkpoint_contents, weight_files
from dtm_jax.models.files.file_checks import UnreadableFileError
from dtm_jax.models.vit import weights as vit_weights

TINY = Path(__file__).parents[1] / "assets" / "tiny_clip_cifar10"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 598641023\n"
PAGE = b"\n<!DOCTYPE html><html>Access to this model is restricted.</html>"


def archive(kind):
  stream = io.BytesIO()
  if kind == "zip":
    with zipfile.ZipFile(stream, "w") as file:
      file.writestr("clip/config.json", "{}")
  else:
    with tarfile.open(fileobj=stream, mode=f"w:{kind.removeprefix('tar').lstrip('.')}") as file:
      file.addfile(tarfile.TarInfo("clip/config.json"))
  return stream.getvalue()


INTRUDERS = {
  "pointer": (POINTER, "Git LFS pointer.*git lfs pull"),
  "page": (PAGE, r"web page \(HTML\)"),
  "error": (b'{"error": "Repository not found"}', "error message of a server"),
  "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML text"),
  "empty": (b"", r"damaged or cut short: it is empty\. Download it again"),
  "zip": (archive("zip"), "zip archive"),
  "tar": (archive("tar"), "tar archive"),
  "tar.gz": (archive("tar.gz"), "gzip archive"),
}
FORMATS = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "a.pt", "a.pth", "a.npz")


@pytest.mark.parametrize("intruder", INTRUDERS)
@pytest.mark.parametrize("name", FORMATS)
def test_wrong_files_named_as_weights_are_recognised(tmp_path, name, intruder):
  content, message = INTRUDERS[intruder]
  (tmp_path / name).write_bytes(content)
  if intruder == "zip" and name == "a.npz":
    message = "damaged"  # such a file is a zip archive, but of arrays
  with pytest.raises(UnreadableFileError, match=rf"(?s){name}.*({message})"):
    weight_files.read(weight_files.find(tmp_path / name))


SIDE_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
              "open_clip_config.json", "model.safetensors.index.json")  # fmt: skip


@pytest.mark.parametrize("intruder", INTRUDERS)
@pytest.mark.parametrize("name", SIDE_FILES)
def test_wrong_files_named_as_side_files_are_recognised(tmp_path, name, intruder):
  content, message = INTRUDERS[intruder]
  (tmp_path / name).write_bytes(content)
  (tmp_path / "model.safetensors").touch()
  found = weight_files.find(tmp_path / "model.safetensors")
  with pytest.raises(UnreadableFileError, match=rf"(?s){name}.*({message})"):
    found.json(name)


@pytest.mark.parametrize("content", ["[1, 2]", "3", "null", "{", '{"a": }', "[" * 100_000, "config"])
def test_a_configuration_without_a_json_object_is_refused(tmp_path, content):
  (tmp_path / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes())
  (tmp_path / "config.json").write_text(content)
  with pytest.raises(UnreadableFileError, match=r"config\.json (is not JSON|holds a JSON)"):
    clip_weights.load(tmp_path)


@pytest.mark.parametrize(
  "changes",
  [{"vision_config": "large"}, {"vision_config": {"hidden_size": "wide"}}, {"projection_dim": None},
   {"vision_config": {"patch_size": 0}}, {"vision_config": {"num_attention_heads": 0}},
   {"vision_config": {"num_hidden_layers": 10**9}}, {"vision_config": {"hidden_act": "x"}}],
)  # fmt: skip
def test_bad_values_of_a_configuration_name_the_file(tmp_path, changes):
  (tmp_path / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes())
  content = json.loads((TINY / "config.json").read_text())
  for key, value in changes.items():
    content[key] = content[key] | value if isinstance(value, dict) else value
  (tmp_path / "config.json").write_text(json.dumps(content))
  with pytest.raises(UserError, match=re.escape(str(tmp_path))):
    clip_weights.load(tmp_path)


def test_broken_links_and_files_of_other_names_are_named(tmp_path):
  (tmp_path / "link").symlink_to(tmp_path / "away")
  with pytest.raises(NotThereError, match=r"is a link to .*away, which does not exist"):
    weight_files.find(tmp_path / "link")
  (tmp_path / "dinov2.pth").touch()
  with pytest.raises(NotThereError, match=r"It has dinov2\.pth: give the path"):
    weight_files.find(tmp_path)


# Names ----------------------------------------------------------------------------------------------------


def write_safetensors(path, tensors):
  save_file({name: np.array(tensor, order="C") for name, tensor in tensors.items()}, path)


def write_torch(path, tensors):
  torch = pytest.importorskip("torch")
  torch.save({name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}, path)


def write_msgpack(path, tensors):
  path.write_bytes(msgpack_serialize(unflatten_dict({tuple(n.split(".")): t for n, t in tensors.items()})))


def write_shards(path, tensors):
  """Write two shards, only one of which has the anchor of the model."""
  names = sorted(tensors)
  files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
  for file, part in files.items():
    write_safetensors(path.parent / file, {name: tensors[name] for name in part})
  index = {name: file for file, part in files.items() for name in part}
  path.write_text(json.dumps({"weight_map": index}))


WRITERS = {
  "a.safetensors": write_safetensors, "a.pth": write_torch, "a.msgpack": write_msgpack,
  "a.npz": lambda path, tensors: np.savez(path, **tensors), "model.safetensors.index.json": write_shards,
}  # fmt: skip
MODELS = {
  "CLIP of transformers": ("vision_model.embeddings.class_embedding", "logit_scale"),
  "CLIPVisionModel": ("embeddings.class_embedding", "encoder.layers.0.mlp.fc1.weight"),
  "OpenAI": ("visual.class_embedding", "transformer.resblocks.0.ln_1.weight"),
  "OpenAI's image tower": ("class_embedding", "transformer.resblocks.0.ln_1.weight"),
  "authors": ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "encoder.x"),
  "BEiT": ("beit.embeddings.patch_embeddings.projection.weight", "lm_head.weight"),
  "DINOv2": ("embeddings.patch_embeddings.projection.weight", "encoder.layer.0.norm1.weight"),
  "SigLIP": ("vision_model.embeddings.patch_embedding.weight", "text_model.embeddings.x"),
}
PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.", "encoder.",
            "backbone.", "student.backbone.", "state_dict.", "state_dict.module.", "model_state.model.",
            "state_dict_ema.", "model_ema.module.", "model.state_dict.", "base.network.")  # fmt: skip


def numbered(names):
  return {name: np.full((2,), number, np.float32) for number, name in enumerate(names)}


def read(path):
  tensors = weight_files.read(weight_files.find(path))
  return {name.replace("/", "."): float(tensor[0]) for name, tensor in tensors.items()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("file", WRITERS)
def test_prefixes_of_names_are_removed(tmp_path, file, model):
  plain = numbered(MODELS[model])
  expected = {name: float(tensor[0]) for name, tensor in plain.items()}
  for prefix in ("", *PREFIXES):
    WRITERS[file](tmp_path / file, {prefix + name: tensor for name, tensor in plain.items()})
    assert read(tmp_path / file) == expected, prefix


@pytest.mark.parametrize("file", WRITERS)
def test_averaged_weights_are_preferred_and_logged(tmp_path, file, caplog):
  plain, averaged = numbered(MODELS["authors"]), numbered(MODELS["authors"][::-1])
  WRITERS[file](tmp_path / file, {
    **{f"state_dict.module.{name}": tensor for name, tensor in plain.items()},
    **{f"state_dict_ema.{name}": tensor for name, tensor in averaged.items()},
    **{f"optimizer.{name}": tensor for name, tensor in plain.items()},
  })  # fmt: skip
  values = lambda tensors: {name: float(tensor[0]) for name, tensor in tensors.items()}
  with caplog.at_level("INFO"):
    assert read(tmp_path / file) == values(averaged)
  assert "EMA" in caplog.text
  assert "Reading the EMA weights 'state_dict_ema'" in caplog.text
  found = weight_files.find(tmp_path / file, weights="state_dict")
  assert {name.replace("/", "."): float(t[0]) for name, t in weight_files.read(found).items()} == values(
    plain
  )
  with pytest.raises(OptionError, match=r"weights='other' .*Available: state_dict, state_dict_ema"):
    weight_files.read(weight_files.find(tmp_path / file, weights="other"))


def test_several_models_need_a_choice(tmp_path):
  both = {
    f"{part}.{name}": t for part in ("student", "teacher") for name, t in numbered(MODELS["authors"]).items()
  }
  write_safetensors(tmp_path / "a.safetensors", both)
  with pytest.raises(OptionError, match=r"several models: student, teacher.*`weights`"):
    read(tmp_path / "a.safetensors")


def test_names_that_differ_only_in_wrappers_are_refused(tmp_path):
  write_safetensors(tmp_path / "a.safetensors", numbered(["module.a", "a"]))
  with pytest.raises(UnreadableFileError, match="two tensors are called a"):
    read(tmp_path / "a.safetensors")


def test_other_modules_of_a_checkpoint_are_ignored(caplog):
  names = ["teacher.backbone.patch_embed.proj.weight", "teacher.backbone.norm.bias", "teacher.dino_head.w"]
  with caplog.at_level("INFO"):
    kept = checkpoint_contents.pick(numbered(names), source="a.pth")
  assert list(kept) == ["patch_embed.proj.weight", "norm.bias"]
  assert "Ignoring 1 other tensors: teacher.dino_head.w" in caplog.text


# Values ---------------------------------------------------------------------------------------------------


def tiny_with(folder, **tensors):
  """Write the tiny CLIP with some tensors replaced."""
  (folder / "config.json").write_bytes((TINY / "config.json").read_bytes())
  save_file(load_file(TINY / "model.safetensors") | tensors, folder / "model.safetensors")
  return folder


FC1 = "vision_model.encoder.layers.0.mlp.fc1.bias"


@pytest.mark.parametrize(("change", "message"), [
  (lambda bias: bias.astype(np.int32), "type int32, but weights must be floating-point"),
  (lambda bias: bias > 0, "type bool"),
  (lambda bias: np.where(np.arange(bias.size) == 3, np.nan, bias), r"1 of \d+ values that are NaN"),
  (lambda bias: np.full_like(bias, np.inf), "NaN or infinite"),
  (lambda bias: np.full(bias.shape, 1e300), "infinite as float32"),
])  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_bad_values_name_tensor_and_file(tmp_path, change, message):
  bias = load_file(TINY / "model.safetensors")[FC1].astype(np.float32)
  tiny_with(tmp_path, **{FC1: change(bias)})
  with pytest.raises(
    UnreadableFileError, match=rf"(?s){tmp_path}.*model\.safetensors.*{FC1} has .*{message}"
  ):
    clip_weights.load(tmp_path)


def test_wider_and_narrower_floats_become_float32(tmp_path):
  import ml_dtypes

  for dtype in (np.float64, np.float16, ml_dtypes.bfloat16):
    bias = np.arange(load_file(TINY / "model.safetensors")[FC1].size).astype(dtype) / 256
    tiny_with(tmp_path, **{FC1: bias.astype(dtype)})
    loaded = clip_weights.load(tmp_path)[1]["image"]["blocks"]["mlp"]["fc1"]["bias"][0]
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, bias.astype(dtype).astype(np.float32))


def test_eight_bit_floats_are_refused_by_name(tmp_path):
  header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
  (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
  with pytest.raises(UnreadableFileError, match=r"a\.safetensors: tensor a has the type F8_E4M3.*Convert"):
    weight_files.read(weight_files.find(tmp_path / "a.safetensors"))


# Hostile files -----------------------------------------------------------------------------------------


def index_of(folder, places):
  (folder / "config.json").write_text("{}")
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
  return weight_files.find(folder)


@pytest.mark.parametrize("name", ["..", ".", "", "../model.safetensors", "/etc/hostname", "sub/a.safetensors",
                                  "a\\b.safetensors", "model.safetensors.index.json", "link.safetensors",
                                  "code.bin", "a\0.safetensors"])  # fmt: skip
def test_an_index_reads_nothing_outside_its_folder(tmp_path, name):
  write_safetensors(tmp_path / "model.safetensors", numbered(["secret"]))
  folder = tmp_path / "folder"
  folder.mkdir()
  (folder / "link.safetensors").symlink_to(tmp_path / "model.safetensors")
  with pytest.raises(UnreadableFileError, match=r"index\.json names"):
    weight_files.read(index_of(folder, {"a": name}))


def test_links_of_the_hubs_cache_are_followed(tmp_path):
  snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
  blobs = tmp_path / "models--a--b" / "blobs"
  snapshot.mkdir(parents=True)
  blobs.mkdir()
  write_safetensors(blobs / "0123", numbered(["a"]))
  (snapshot / "model-1.safetensors").symlink_to("../../blobs/0123")
  assert weight_files.read(index_of(snapshot, {"a": "model-1.safetensors"})).keys() == {"a"}


@pytest.mark.parametrize("places", [None, [], {}, {"a": 3}, {"a": ["x.safetensors"]}])
def test_an_index_without_a_map_is_refused(tmp_path, places):
  with pytest.raises(UnreadableFileError, match="weight_map"):
    weight_files.read(index_of(tmp_path, places))


def npz_bomb(path):
  """Write 3 MiB that unfold to 3 GiB of zeros.

  Zeros are compressed once and repeated. The checksum is wrong; the file has to be refused before its end.
  """
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (3 << 28,)})
  packer = zlib.compressobj(9, wbits=-15)
  start = packer.compress(header.getvalue()) + packer.flush(zlib.Z_FULL_FLUSH)
  zeros = packer.compress(bytes(1 << 26)) + packer.flush(zlib.Z_FULL_FLUSH)
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("a.npy", start + (3 << 4) * zeros + packer.flush())
    (entry,) = file.infolist()
    entry.compress_type, entry.file_size = zipfile.ZIP_DEFLATED, len(header.getvalue()) + (3 << 30)


def test_an_archive_that_unfolds_to_gigabytes_is_refused_early(tmp_path):
  import resource

  npz_bomb(tmp_path / "a.npz")
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(UnreadableFileError, match=r"3\.\d MiB would unfold to 30\d\d MiB"):
    weight_files.read(weight_files.find(tmp_path / "a.npz"))
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def lying_npz(path):
  """Write an array whose header claims more data than the file has."""
  stream = io.BytesIO()
  np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("a.npy", stream.getvalue() + bytes(16))


def objects_npz(path):
  np.savez(path, a=np.array([Evil()], dtype=object))


class Evil:
  def __reduce__(self):
    return (Path("/tmp/evil_was_run").touch, ())


def torch_zip(path, pickled, **entries):
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("top/data.pkl", pickled)
    for name, content in entries.items():
      file.writestr(f"top/{name}", content)


def nested(depth, width):
  """Return a pickle of nested dictionaries, each of which contains the next one `width` times."""
  inner = {}
  for _ in range(depth):
    inner = {str(key): inner for key in range(width)}
  return pickle.dumps(inner, 2)


def itself():
  content = {}
  content["a"] = content
  return pickle.dumps(content, 2)


def expanded(path):
  """Write a tensor of 2**40 elements that are all the same element of the storage."""
  torch = pytest.importorskip("torch")
  torch.save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)


HOSTILE = {
  "code in a pickle": ("a.bin", lambda path: path.write_bytes(pickle.dumps(Evil(), 2))),
  "code in a zip": ("a.pt", lambda path: torch_zip(path, pickle.dumps(Evil(), 2))),
  "code in an array": ("a.npz", objects_npz),
  "many paths": ("b.pt", lambda path: torch_zip(path, nested(40, 2))),
  "a dictionary in itself": ("c.pt", lambda path: torch_zip(path, itself())),
  "deep": ("d.pt", lambda path: torch_zip(path, nested(200, 1))),
  "expanded": ("e.pt", expanded),
  "lying header": ("b.npz", lying_npz),
  "no array": ("c.npz", lambda path: torch_zip(path, b"x")),
  "header of 2**60 bytes": ("a.safetensors", lambda path: path.write_bytes(bytes(7) + b"\x10{}{}")),
  "header of text": ("b.safetensors", lambda path: path.write_bytes(b"\4" + bytes(7) + b"[[[[")),
  "array of 2**32": ("a.msgpack", lambda path: path.write_bytes(b"\x81\xa1a\xdd" + b"\xff" * 4 + bytes(9))),
  "map of 2**32": ("b.msgpack", lambda path: path.write_bytes(b"\xdf\xff\xff\xff\xff" + b"\xa1a\x01" * 30)),
  "cut short": ("c.msgpack", lambda path: path.write_bytes(msgpack_serialize({"a": np.ones(9)})[:50])),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name_and_run_no_code(tmp_path, name):
  file, write = HOSTILE[name]
  write(tmp_path / file)
  with pytest.raises(UnreadableFileError, match=f"{file}"):
    weight_files.read(weight_files.find(tmp_path / file))
  assert not Path("/tmp/evil_was_run").exists()


def test_a_student_in_wrappers_loads(tmp_path):
  """The rule for names also serves `init_from`."""
  from test_vit_weights import assert_same, random_params, student

  params = random_params(student())
  named = {f"_orig_mod.module.{name}": t for name, t in vit_weights.to_authors(params).items()}
  write_torch(tmp_path / "a.pth", named)
  assert_same(vit_weights.load(tmp_path / "a.pth"), params)
