"""Read the tensors in files of torch.save and torch.jit.save without PyTorch.

    tensors = read("ViT-B-16.pt")                      # {name: array}

Such a file holds a pickle and the raw bytes of its storages. `torch_pickles` reads the pickle safely.
"""

import io
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

from dtm_jax.errors import UserError
from dtm_jax.models.files import checkpoint_contents
from dtm_jax.models.files.file_checks import UnreadableFileError, check_inflation, num_bytes_of
from dtm_jax.models.files.torch_pickles import Instance, StorageRef, TensorRef, Unpickler

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_ELEMENTS = 2**59  # the number of bytes still fits in 64 bits
_MAX_ENTRIES, _MAX_DEPTH = 200_000, 64  # dictionary entries of a file, and nested dictionaries

ReadStorage = Callable[[str], np.ndarray]


def read(path: str | Path, *, weights: str | None = None) -> dict[str, np.ndarray]:
  """Return the named tensors of a state dict or a TorchScript module as read-only views of the file's bytes.

  Reads only the storages of the model that `checkpoint_contents.pick` chooses. Honours strides, offsets and
  shared storages.

  Args:
    weights: the container of the model, if the file holds several models.

  Raises:
    UnsafePickleError: the pickle names something that no state dict needs; the message says the first name.
    UnreadableFileError: the file is damaged, cut short or without tensors, or a tensor exceeds its storage.
    OptionError: the file holds several models and `weights` does not name one.
  """
  return _read(
    Path(path), lambda tensors: checkpoint_contents.pick(tensors, source=str(path), weights=weights)
  )


def read_all(path: str | Path) -> dict[str, np.ndarray]:
  """Return all tensors of the file as `read` does, under the names "container.name"."""
  return _read(Path(path), lambda tensors: tensors)


def _read(path: Path, choose: Callable[[dict], dict]) -> dict[str, np.ndarray]:
  try:
    with path.open("rb") as file:
      content, read_storage = (_open_zip if file.read(2) == b"PK" else _open_legacy)(file, path)
      tensors = choose(_flatten(content))
      if not tensors:
        containers = ", ".join(checkpoint_contents.CONTAINERS)
        raise ValueError(f"there are no tensors at the top, nor below {containers}")
      storages = {key: read_storage(key) for key in {tensor.storage.key for tensor in tensors.values()}}
    arrays = {name: _array(name, tensor, storages[tensor.storage.key]) for name, tensor in tensors.items()}
    check_inflation(path, num_bytes_of(arrays), path.stat().st_size)
    return arrays
  except (OSError, UserError):
    raise
  except Exception as error:  # a damaged pickle can fail in any way
    raise UnreadableFileError(f"{path} is damaged, cut short, or no file of torch: {error}") from error


def _open_zip(file: io.BufferedIOBase, path: Path) -> tuple[Any, ReadStorage]:
  """Return the unpickled content of an archive, and a function that reads the bytes of a storage."""
  archive = zipfile.ZipFile(file)
  pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
  if len(pickles) != 1:
    some = ", ".join(archive.namelist()[:3])
    raise ValueError(
      f"the zip archive has no FOLDER/data.pkl, but {some}. If it is the archive of a folder, unpack it and "
      "give the folder"
    )
  top = pickles[0].removesuffix("data.pkl")

  def read_entry(name: str) -> bytes:
    # An uncompressed entry can't be larger than the file.
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
      raise ValueError(f"{name} is compressed, which torch never does")
    return archive.read(name)

  if f"{top}byteorder" in archive.namelist() and read_entry(f"{top}byteorder") != b"little":
    raise ValueError("it was written on a big-endian machine; save it again on a little-endian one")
  content = Unpickler(io.BytesIO(read_entry(pickles[0])), path).load()
  return content, lambda key: np.frombuffer(read_entry(f"{top}data/{key}"), np.uint8)


def _open_legacy(file: io.BufferedIOBase, path: Path) -> tuple[Any, ReadStorage]:
  """Return the same as `_open_zip` for a file of torch before 1.6.

  The file holds six parts: magic number, version, system, content, keys and storages.
  """
  file.seek(0)
  if Unpickler(file, path).load() != LEGACY_MAGIC:
    raise ValueError("it does not start with the magic number of torch.save")
  _version, _system = Unpickler(file, path).load(), Unpickler(file, path).load()
  item_sizes: dict[str, int] = {}

  class SizeRecorder(Unpickler):
    def persistent_load(self, pid: Any) -> StorageRef:
      storage = super().persistent_load(pid)
      item_sizes[storage.key] = np.dtype(storage.dtype).itemsize
      return storage

  content = SizeRecorder(file, path).load()
  keys = Unpickler(file, path).load()
  end = os.fstat(file.fileno()).st_size
  places = {}
  for key in keys:
    num_bytes = int.from_bytes(file.read(8), "little") * item_sizes[key]
    if file.tell() + num_bytes > end:
      raise ValueError(f"the file ends within storage {key}")
    places[key] = file.tell(), num_bytes
    file.seek(num_bytes, os.SEEK_CUR)

  def read_storage(key: str) -> np.ndarray:
    start, num_bytes = places[key]
    file.seek(start)
    return np.frombuffer(file.read(num_bytes), np.uint8)

  return content, read_storage


def _flatten(content: Any) -> dict[str, TensorRef]:
  """Return all tensors in nested dictionaries and TorchScript modules under the names "part.name".

  Raises:
    ValueError: there are so many entries that a part must contain itself or occur many times.
  """
  tensors: dict[str, TensorRef] = {}
  open_parts, visited = [("", content, 0)], 0
  while open_parts:
    prefix, part, depth = open_parts.pop()
    items = part.attributes if isinstance(part, Instance) else part if isinstance(part, dict) else {}
    visited += 1 + len(items)
    if visited > _MAX_ENTRIES or depth > _MAX_DEPTH:
      raise ValueError(f"it has more than {_MAX_ENTRIES} entries or more than {_MAX_DEPTH} nested levels")
    inner = []
    for name, value in items.items():
      if isinstance(value, TensorRef) and isinstance(name, str):
        tensors[prefix + name] = value
      elif isinstance(value, dict | Instance) and isinstance(name, str):
        inner.append((f"{prefix}{name}.", value, depth + 1))
    open_parts += reversed(inner)
  return tensors


def _array(name: str, tensor: TensorRef, data: np.ndarray) -> np.ndarray:
  """Return a tensor as a read-only view of the bytes of its storage."""
  storage, offset, shape, strides = tensor
  dtype = np.dtype(ml_dtypes.bfloat16 if storage.dtype == "bfloat16" else storage.dtype)
  elements = data[: data.size - data.size % dtype.itemsize].view(dtype)
  numbers = (offset, storage.offset, *shape, *strides)
  whole = all(type(number) is int and number >= 0 for number in numbers)
  if not whole or len(shape) != len(strides) or math.prod(shape) > _MAX_ELEMENTS:
    raise ValueError(f"{name} of shape {shape} has the strides {strides} and the offset {offset}")
  offset += storage.offset
  empty = 0 in shape
  last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
  if not empty and last >= elements.size:
    raise ValueError(
      f"{name} of shape {shape}, strides {strides} and offset {offset} exceeds the "
      f"{elements.size} elements of storage {storage.key}"
    )
  if empty:
    return np.zeros(shape, dtype)
  byte_strides = [stride * dtype.itemsize for stride in strides]
  return as_strided(elements[offset:], shape, byte_strides, writeable=False)
