"""Tensors from the files of torch.save and torch.jit.save, without PyTorch and without running anything.

    tensors = load("ViT-B-16.pt")                      # {name: array}

Such a file is a pickle beside the raw bytes of its storages, and a pickle may name any function for its
reader to call. Here the names that a state dict needs have stand-ins of our own, which only note their
arguments; the first other name is an error. No stand-in takes state that would change what it does.
"""

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

from dtm_jax.errors import UserError
from dtm_jax.models.files import checkpoint_contents
from dtm_jax.models.files.file_checks import UnreadableFileError, check_inflation, size_of

DTYPES = {
  "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
  "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
_LARGEST = 2**59  # elements, so that bytes can be counted in 64 bits
_MOST, _DEEPEST = 200_000, 64  # entries of dictionaries in a file, and dictionaries in one another
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class UnsafePickleError(UnreadableFileError):
  """A pickle names what no state dict needs."""


def load(path: str | Path, *, weights: str | None = None) -> dict[str, np.ndarray]:
  """Return the named tensors of a state dict or of a TorchScript module, read-only views of the file's bytes.

  Only the tensors of the model that `checkpoint_contents.pick` chooses are read. Strides, offsets and shared
  storages are honoured.

  Raises:
    UnsafePickleError: the pickle names what no state dict needs; says the first such name.
    UnreadableFileError: damaged, cut short, without tensors, or a tensor reaches beyond its storage.
    OptionError: the file holds several models and `weights` does not name one.
  """
  return _load(
    Path(path), lambda tensors: checkpoint_contents.pick(tensors, source=str(path), weights=weights)
  )


def load_all(path: str | Path) -> dict[str, np.ndarray]:
  """As `load`, all tensors of the file, "container.name"."""
  return _load(Path(path), lambda tensors: tensors)


def _load(path: Path, choose: Callable[[dict], dict]) -> dict[str, np.ndarray]:
  try:
    with path.open("rb") as file:
      content, read_storage = (_open_zip if file.read(2) == b"PK" else _open_legacy)(file, path)
      tensors = choose(_flatten(content))
      if not tensors:
        containers = ", ".join(checkpoint_contents.CONTAINERS)
        raise ValueError(f"there are no tensors at the top, nor below {containers}")
      storages = {key: read_storage(key) for key in {tensor.storage.key for tensor in tensors.values()}}
    arrays = {name: _array(name, tensor, storages[tensor.storage.key]) for name, tensor in tensors.items()}
    check_inflation(path, size_of(arrays), path.stat().st_size)
    return arrays
  except (OSError, UserError):
    raise
  except Exception as error:  # a damaged pickle can fail in any way
    raise UnreadableFileError(f"{path} is damaged, cut short, or no file of torch: {error}") from error


# Stand-ins for what a pickle may name --------------------------------------------------------------------


class _Storage(NamedTuple):
  key: str
  dtype: str
  offset: int


class _Tensor(NamedTuple):
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Function:
  """A stand-in for a function. That it has __setstate__ keeps a pickle from setting its attributes."""

  __slots__ = ("_call",)

  def __init__(self, call: Callable):
    self._call = call

  def __call__(self, *args):
    return self._call(*args)

  def __setstate__(self, _):
    raise ValueError("a pickle gives state to a function")


class _Dict(dict):
  """A stand-in for OrderedDict; the attributes that state dicts have (_metadata) are passed over."""

  __slots__ = ()

  def __setstate__(self, _):
    pass


class _Object:
  """A stand-in for an instance of any class: it keeps what would be its attributes, and does nothing.

  The unpickler gets a new subclass each time, so that nothing outlives a reading.
  """

  __slots__ = ("attributes",)

  def __new__(cls, *_):
    instance = super().__new__(cls)
    object.__setattr__(instance, "attributes", {})
    return instance

  def __init__(self, *_):
    pass

  def __setstate__(self, state):
    object.__setattr__(self, "attributes", state if isinstance(state, dict) else {})


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_) -> _Tensor:
  if not isinstance(storage, _Storage):
    raise ValueError("a tensor without a storage")
  return _Tensor(storage, offset, shape, strides)


FUNCTIONS = {
  "collections.OrderedDict": _Dict,
  "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
  "torch._utils._rebuild_tensor": _rebuild_tensor,
  "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
  "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
  "torch.jit._pickle.restore_type_tag": lambda value, _: value,
}
TOKENS = {f"torch.{storage}": dtype for storage, dtype in DTYPES.items()}
TOKENS |= {f"torch.{dtype}": dtype for dtype in DTYPES.values()}
PASSED_OVER = {
  "torch.Size", "torch.device", "argparse.Namespace",
  *(f"torch.jit._pickle.build_{kind}list" for kind in ("int", "tensor", "double", "bool")),
  # numpy's scalars, as arguments and metrics of a training are
  "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "_codecs.encode",
}  # fmt: skip
"""What lies beside the tensors: allowed, and made into a `_Object`."""


class _Unpickler(pickle.Unpickler):
  def __init__(self, file, path: Path):
    super().__init__(file, encoding="utf-8")
    self._path = path

  def find_class(self, module: str, name: str) -> Any:
    full = f"{module}.{name}"
    if full in FUNCTIONS:
      return _Function(FUNCTIONS[full])
    if full in TOKENS:
      return TOKENS[full]
    if full in PASSED_OVER or module.split(".")[0] == "__torch__":
      return type("_Object", (_Object,), {"__slots__": ()})
    raise UnsafePickleError(
      f"{self._path} is not read: its pickle asks for {full}, which no state dict needs and may run code."
    )

  def persistent_load(self, pid: Any) -> _Storage:
    kind, dtype, key, *rest = pid
    if kind != "storage" or dtype not in DTYPES.values():
      raise ValueError(f"a reference to {kind!r} of {dtype!r}")
    view = rest[2] if len(rest) > 2 else None  # legacy files: (key, offset, size) within the storage
    return _Storage(str(key), dtype, view[1] if view else 0)


# Files ---------------------------------------------------------------------------------------------------


def _open_zip(file, path: Path) -> tuple[Any, Callable[[str], np.ndarray]]:
  """What the archive holds, and a function that reads the storage of a key as bytes."""
  archive = zipfile.ZipFile(file)
  pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
  if len(pickles) != 1:
    some = ", ".join(archive.namelist()[:3])
    raise ValueError(
      f"the zip archive has no data.pkl in a folder of its own ({some}). If it is an archive of a folder, "
      "unpack it and give the folder"
    )
  top = pickles[0].removesuffix("data.pkl")

  def read_entry(name: str) -> bytes:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:  # so it is no larger than the file
      raise ValueError(f"{name} is compressed, which torch never does")
    return archive.read(name)

  if f"{top}byteorder" in archive.namelist() and read_entry(f"{top}byteorder") != b"little":
    raise ValueError("it was written on a big-endian machine; save it again on a usual one")
  content = _Unpickler(io.BytesIO(read_entry(pickles[0])), path).load()
  return content, lambda key: np.frombuffer(read_entry(f"{top}data/{key}"), np.uint8)


def _open_legacy(file, path: Path) -> tuple[Any, Callable[[str], np.ndarray]]:
  """As `_open_zip`, of torch before 1.6: magic number, version, system, content, keys, then the storages."""
  file.seek(0)
  if _Unpickler(file, path).load() != LEGACY_MAGIC:
    raise ValueError("it does not begin as torch.save begins a file")
  _version, _system = _Unpickler(file, path).load(), _Unpickler(file, path).load()
  sizes: dict[str, int] = {}

  class NotingSizes(_Unpickler):
    def persistent_load(self, pid):
      storage = super().persistent_load(pid)
      sizes[storage.key] = np.dtype(storage.dtype).itemsize
      return storage

  content = NotingSizes(file, path).load()
  keys = _Unpickler(file, path).load()
  end = os.fstat(file.fileno()).st_size
  places = {}
  for key in keys:
    num_bytes = int.from_bytes(file.read(8), "little") * sizes[key]
    if file.tell() + num_bytes > end:
      raise ValueError(f"the file ends within storage {key}")
    places[key] = file.tell(), num_bytes
    file.seek(num_bytes, os.SEEK_CUR)

  def read_storage(key: str) -> np.ndarray:
    start, num_bytes = places[key]
    file.seek(start)
    return np.frombuffer(file.read(num_bytes), np.uint8)

  return content, read_storage


def _flatten(content: Any) -> dict[str, _Tensor]:
  """All tensors of dictionaries in dictionaries, and of a TorchScript module and its parts, "part.name".

  Raises:
    ValueError: there are so many that parts must be contained in themselves or in one another many times.
  """
  tensors: dict[str, _Tensor] = {}
  open_parts, visited = [("", content, 0)], 0
  while open_parts:
    prefix, part, depth = open_parts.pop()
    items = part.attributes if isinstance(part, _Object) else part if isinstance(part, dict) else {}
    visited += 1 + len(items)
    if visited > _MOST or depth > _DEEPEST:
      raise ValueError(f"it has more than {_MOST} entries, or {_DEEPEST} levels of them")
    inner = []
    for name, value in items.items():
      if isinstance(value, _Tensor) and isinstance(name, str):
        tensors[prefix + name] = value
      elif isinstance(value, dict | _Object) and isinstance(name, str):
        inner.append((f"{prefix}{name}.", value, depth + 1))
    open_parts += reversed(inner)
  return tensors


def _array(name: str, tensor: _Tensor, data: np.ndarray) -> np.ndarray:
  storage, offset, shape, strides = tensor
  dtype = np.dtype(ml_dtypes.bfloat16 if storage.dtype == "bfloat16" else storage.dtype)
  elements = data[: data.size - data.size % dtype.itemsize].view(dtype)
  numbers = (offset, storage.offset, *shape, *strides)
  whole = all(type(number) is int and number >= 0 for number in numbers)
  if not whole or len(shape) != len(strides) or math.prod(shape) > _LARGEST:
    raise ValueError(f"{name} of shape {shape} has the strides {strides} and the offset {offset}")
  offset += storage.offset
  empty = 0 in shape
  last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
  if not empty and last >= elements.size:
    raise ValueError(
      f"{name} of shape {shape}, strides {strides} and offset {offset} reaches beyond the "
      f"{elements.size} elements of storage {storage.key}"
    )
  if empty:
    return np.zeros(shape, dtype)
  byte_strides = [stride * dtype.itemsize for stride in strides]
  return as_strided(elements[offset:], shape, byte_strides, writeable=False)
