"""Reading files of torch without torch: equal tensors, and hostile pickles refused by name."""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest

from dtm_jax.models.files import torch_files
from dtm_jax.models.files.file_checks import UnreadableFileError
from dtm_jax.models.files.torch_pickles import UnsafePickleError

VALUES = np.arange(12, dtype="<f4")


# Pickles by hand: protocol 2, whose opcodes are few ------------------------------------------------------


def name(full):
  module, _, attribute = full.rpartition(".")
  return f"c{module}\n{attribute}\n".encode()


def number(value):
  return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def text(value):
  return b"X" + struct.pack("<I", len(value)) + value.encode()


def pack(*items):
  return b"(" + b"".join(items) + b"t"


def call(function, *arguments):
  return function + pack(*arguments) + b"R"


def mapping(**items):
  return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def tensor(shape=(12,), strides=(1,), offset=0, storage="torch.FloatStorage", key="0"):
  reference = pack(text("storage"), name(storage), text(key), text("cpu"), number(12)) + b"Q"
  numbers = [pack(*map(number, values)) for values in (shape, strides)]
  hooks = call(name("collections.OrderedDict"))
  rebuild = name("torch._utils._rebuild_tensor_v2")
  return call(rebuild, reference, number(offset), *numbers, b"\x89", hooks)


def write(folder, content, **storages):
  file = folder / "weights.pt"
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("top/data.pkl", b"\x80\x02" + content + b".")
    for key, data in ({"0": VALUES.tobytes()} | storages).items():
      archive.writestr(f"top/data/{key}", data)
  return file


def test_a_file_made_by_hand(tmp_path):
  parts = {
    "plain": tensor(),
    "transposed": tensor((4, 3), (1, 4)),
    "strided": tensor((2, 2), (6, 2), 1),
    "scalar": tensor((), (), 11),
    "expanded": tensor((2, 12), (0, 1)),
    "empty": tensor((0, 3), (3, 1), 12),
    "half": tensor((24,), (1,), 0, "torch.HalfStorage"),
    "bfloat": tensor((24,), (1,), 0, "torch.BFloat16Storage"),
  }
  loaded = torch_files.read(write(tmp_path, mapping(**parts, epoch=number(3))))
  expected = {
    "plain": VALUES,
    "transposed": VALUES.reshape(3, 4).T,
    "strided": VALUES[[[1, 3], [7, 9]]],
    "scalar": VALUES[11],
    "expanded": np.stack([VALUES, VALUES]),
    "empty": np.zeros((0, 3), np.float32),
    "half": VALUES.view(np.float16),
  }
  assert loaded.keys() == parts.keys()
  for key, value in expected.items():
    assert (loaded[key].shape, loaded[key].dtype) == (value.shape, value.dtype), key
    np.testing.assert_array_equal(loaded[key], value)
  np.testing.assert_array_equal(loaded["bfloat"].astype(np.float32)[1::2], VALUES)  # their upper halves
  assert not any(array.flags.writeable for array in loaded.values() if array.size)


@pytest.mark.parametrize("key", ["model", "module", "state_dict"])
def test_a_nested_state_dict_is_read_without_the_rest(tmp_path, key):
  """The optimiser's storage is missing in the file, so reading it would fail."""
  parts = {key: mapping(**{"module.a": tensor()}), "optimizer": mapping(a=tensor(key="missing"))}
  arguments = name("argparse.Namespace") + b")\x81" + mapping(lr=number(1)) + b"b"
  loaded = torch_files.read(write(tmp_path, mapping(**parts, args=arguments)))
  assert list(loaded) == ["a"]
  np.testing.assert_array_equal(loaded["a"], VALUES)


HOSTILE = {
  "os.system": call(name("os.system"), text("exit 1")),
  "posix.system": call(name("posix.system"), text("exit 1")),
  "builtins.eval": call(name("builtins.eval"), text("1/0")),
  "__builtin__.getattr": call(name("__builtin__.getattr"), name("collections.OrderedDict"), text("fromkeys")),
  "torch.load": call(name("torch.load"), text("other.pt")),
  "torch._utils._rebuild_tensor_v2.__globals__": name("torch._utils._rebuild_tensor_v2.__globals__"),
  "torch.storage._load_from_bytes": call(name("torch.storage._load_from_bytes"), text("")),
  "numpy.core.multiarray._reconstruct": name("numpy.core.multiarray._reconstruct"),
  "functools.partial": name("functools.partial"),
}


@pytest.mark.parametrize("forbidden", HOSTILE)
def test_a_hostile_pickle_is_refused_by_its_first_forbidden_name(tmp_path, forbidden):
  file = write(tmp_path, mapping(a=tensor(), b=HOSTILE[forbidden], c=name("subprocess.Popen")))
  with pytest.raises(UnsafePickleError) as error:
    torch_files.read(file)
  assert f"{file} is not read: its pickle asks for {forbidden}," in str(error.value)


def test_dotted_names_and_names_from_the_memo_are_refused(tmp_path):
  """Protocol 4 takes the name from the stack, and the memo may have put it there."""
  stored = b"\x8c\x02os\x94" + b"\x8c\x06system\x94" + b"00"
  for content, forbidden in [
    (stored + b"h\x00h\x01\x93", r"os\.system"),
    (b"\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93", r"collections\.OrderedDict\.__init__"),
  ]:
    with pytest.raises(UnsafePickleError, match=forbidden):
      torch_files.read(write(tmp_path, content))


@pytest.mark.parametrize(
  "target",
  ["torch._utils._rebuild_tensor_v2", "collections.OrderedDict", "argparse.Namespace", "torch.FloatStorage"],
)
def test_a_pickle_cannot_change_what_it_calls(tmp_path, target):
  """The opcode BUILD sets the attributes of every object without __setstate__."""
  state = pack(b"N", mapping(_call=name("collections.OrderedDict"), __class__=name("argparse.Namespace")))
  with pytest.raises(UnreadableFileError, match=r"weights\.pt"):
    torch_files.read(write(tmp_path, mapping(a=name(target) + state + b"b")))
  assert torch_files.read(write(tmp_path, mapping(a=tensor()))).keys() == {"a"}


def test_pickled_state_changes_no_method_of_a_stand_in(tmp_path):
  state = mapping(items=number(1), keys=number(2), __class__=number(3))
  metadata = call(name("collections.OrderedDict")) + b"(" + text("a") + tensor() + b"u" + state + b"b"
  np.testing.assert_array_equal(torch_files.read(write(tmp_path, metadata))["a"], VALUES)


@pytest.mark.parametrize(
  ("shape", "strides", "offset"),
  [((13,), (1,), 0), ((12,), (1,), 1), ((2,), (12,), 0), ((2**40, 2**40), (1, 1), 0), ((2,), (-1,), 3),
   ((-1,), (1,), 0), ((2,), (1,), -1), ((2, 2), (1,), 0), ((2**70,), (0,), 0)],
)  # fmt: skip
def test_a_tensor_beyond_its_storage_is_named(tmp_path, shape, strides, offset):
  with pytest.raises(UnreadableFileError, match=r"weights\.pt .*blocks\.0"):
    torch_files.read(write(tmp_path, mapping(**{"blocks.0": tensor(shape, strides, offset)})))


def test_damaged_files_are_named(tmp_path):
  whole = write(tmp_path, mapping(a=tensor())).read_bytes()
  broken = tmp_path / "broken.pth"
  flipped = whole.replace(VALUES.tobytes(), VALUES[::-1].tobytes())
  for content in (
    whole[: len(whole) // 2],
    whole[:-30],
    flipped,
    b"",
    b"hello",
    pickle.dumps([1]),
    whole[2:],
  ):
    broken.write_bytes(content)
    with pytest.raises(UnreadableFileError, match=r"broken\.pth is damaged"):
      torch_files.read(broken)
  with pytest.raises(UnreadableFileError, match="no tensors at the top, nor below model, module, state_dict"):
    torch_files.read(write(tmp_path, mapping(epoch=number(3))))
  with pytest.raises(UnreadableFileError, match="data/7"):
    torch_files.read(write(tmp_path, mapping(a=tensor(key="7"))))
  with pytest.raises(FileNotFoundError):
    torch_files.read(tmp_path / "nowhere.pt")


def test_a_plain_hostile_pickle_is_refused(tmp_path):
  file = tmp_path / "weights.bin"
  file.write_bytes(b"\x80\x02" + HOSTILE["os.system"] + b".")
  with pytest.raises(UnsafePickleError, match=r"os\.system"):
    torch_files.read(file)


def test_a_legacy_file_made_by_hand(tmp_path):
  file = tmp_path / "old.pth"
  reference = (
    pack(text("storage"), name("torch.FloatStorage"), text("k"), text("cpu"), number(12), b"N") + b"Q"
  )
  one = call(name("torch._utils._rebuild_tensor_v2"), reference, number(4), pack(number(2)), pack(number(3)))
  stream = io.BytesIO()
  for part in (torch_files.LEGACY_MAGIC, 1001, {"little_endian": True}):
    pickle.dump(part, stream, 2)
  stream.write(b"\x80\x02" + mapping(a=one) + b".")
  pickle.dump(["k"], stream, 2)
  stream.write(struct.pack("<q", 12) + VALUES.tobytes())
  file.write_bytes(stream.getvalue())
  np.testing.assert_array_equal(torch_files.read(file)["a"], VALUES[[4, 7]])
  file.write_bytes(stream.getvalue()[:-1])
  with pytest.raises(UnreadableFileError, match=r"old\.pth .*ends within storage k"):
    torch_files.read(file)


# Torch as the writer -------------------------------------------------------------------------------------

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_torch_saves(tmp_path, zipped):
  torch = pytest.importorskip("torch")
  base = torch.arange(24.0)
  tensors = {dtype: base.to(getattr(torch, dtype)) for dtype in DTYPES} | {
    "view": base[3:15].reshape(3, 4).T,
    "parameter": torch.nn.Parameter(base[:5]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 2),
    "linear.weight": torch.nn.Linear(3, 2).state_dict()["weight"],
  }
  optimizer = torch.optim.AdamW([tensors["parameter"]])
  tensors["parameter"].sum().backward()
  optimizer.step()
  beside = {"optimizer": optimizer.state_dict(), "epoch": 3, "accuracy": np.float64(0.5), "lr": np.float32(1)}
  torch.save({"model": tensors, **beside}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
  loaded = torch_files.read(tmp_path / "a.pth")
  assert loaded.keys() == tensors.keys()
  for key, value in tensors.items():
    assert key not in DTYPES or str(loaded[key].dtype) == key
    np.testing.assert_array_equal(loaded[key].astype(np.float64), value.detach().double(), err_msg=key)
    assert loaded[key].shape == tuple(value.shape)


def test_reads_torchscript_modules(tmp_path):
  torch = pytest.importorskip("torch")
  inner = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.BatchNorm1d(4))
  model = torch.nn.Sequential(inner, torch.nn.GELU(), torch.nn.Conv2d(4, 2, 2)).half()
  torch.jit.script(model).save(tmp_path / "m.pt")
  loaded = torch_files.read(tmp_path / "m.pt")
  expected = model.state_dict()
  assert loaded.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_array_equal(loaded[key], value.numpy(), err_msg=key)
    assert str(loaded[key].dtype) == str(value.dtype).removeprefix("torch.")
