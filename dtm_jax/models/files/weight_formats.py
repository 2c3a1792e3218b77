"""Read and write files of weights as {name: array}, one function for each format.

No function imports torch or runs code that a file contains.
"""

import json
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from dtm_jax.errors import NotThereError
from dtm_jax.models.files import checkpoint_contents, torch_files
from dtm_jax.models.files.file_checks import (
  UnreadableFileError,
  blaming,
  check_inflation,
  check_is_weights,
  num_bytes_of,
  read_json,
)

Tensors = dict[str, np.ndarray]
TORCH = (".bin", ".pt", ".pth")
INDEX = ".index.json"

_DAMAGED = " is damaged or cut short"
_SAFETENSORS = {
  "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL",
}  # fmt: skip


def read(file: Path, *, weights: str | None = None) -> Tensors:
  """Return the tensors of the model in a file, chosen by `checkpoint_contents.pick`.

  Args:
    weights: the container of the model, if the file holds several models.

  Raises:
    UnreadableFileError: the file is damaged, cut short or unsafe, has no known format, or unfolds to far more
      bytes.
    NotThereError: a shard is missing.
    OptionError: the file holds several models and `weights` does not name one.
  """
  check_known(file)
  with blaming(file, _DAMAGED):
    if file.name.endswith(TORCH):
      check_is_weights(file, zip_allowed=True)
      return torch_files.read(file, weights=weights)  # reads the bytes of the chosen tensors only
    tensors = _read_shards(file) if file.name.endswith(INDEX) else _read_whole(file)
    return checkpoint_contents.pick(tensors, source=str(file), weights=weights)


def check_known(file: Path) -> None:
  """Check that the file's name ends as that of a known format.

  Raises:
    UnreadableFileError: it does not; the message lists the known formats.
  """
  if not file.name.endswith((*READERS, INDEX)):
    raise UnreadableFileError(f"{file} has an unknown format. Available: {', '.join((*READERS, INDEX))}.")


def _read_whole(file: Path) -> Tensors:
  """Return all tensors of one file under their names in the file."""
  suffix = next(suffix for suffix in READERS if file.name.endswith(suffix))
  check_is_weights(file, zip_allowed=suffix in (*TORCH, ".npz"))
  with blaming(file, _DAMAGED):
    tensors = READERS[suffix](file)
    check_inflation(file, num_bytes_of(tensors), file.stat().st_size)
  return tensors


def _read_shards(index: Path) -> Tensors:
  """Return all tensors of the files that an index names: {"weight_map": {tensor: file}}."""
  places = read_json(index).get("weight_map")
  if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
    raise UnreadableFileError(f'{index} has no "weight_map" that maps tensor names to file names.')
  names = sorted(set(places.values()))
  kind = index.name.removesuffix(INDEX).rpartition(".")[2]
  missing = []
  for name in names:
    _check_inside(index, name, kind)
    if not (index.parent / name).is_file():
      missing.append(name)
  if missing:
    raise NotThereError(f"{index} names {', '.join(missing)}, which are not beside it.")
  return {name: tensor for shard in names for name, tensor in _read_whole(index.parent / shard).items()}


def _check_inside(index: Path, name: str, kind: str) -> None:
  """Check that a shard has the format of its index, and lies in the same folder even behind links.

  Links of the hub's cache from snapshots/REVISION/ to blobs/ are allowed.
  """
  if "\0" in name or "/" in name or "\\" in name or name in ("", ".", ".."):
    raise UnreadableFileError(f"{index} names files outside its folder: {name}")
  if not name.endswith(f".{kind}"):
    raise UnreadableFileError(f"{index} names {name!r}, which is no .{kind} file.")
  folder, target = index.parent.resolve(), (index.parent / name).resolve()
  places = [folder]
  if folder.parent.name == "snapshots":
    places.append(folder.parent.parent / "blobs")
  if not any(target.is_relative_to(place) for place in places):
    raise UnreadableFileError(f"{index} names files outside its folder: {name} is a link to {target}")


def _read_safetensors(file: Path) -> Tensors:
  with file.open("rb") as stream:
    (length,) = struct.unpack("<Q", stream.read(8))
    header = json.loads(stream.read(min(length, 100 * 2**20)))
  for name, entry in header.items():
    if name != "__metadata__" and entry["dtype"] not in _SAFETENSORS:
      raise UnreadableFileError(
        f"{file}: tensor {name} has the type {entry['dtype']}, which is not supported. Convert it to "
        "float32 or bfloat16 first."
      )
  return load_file(file)


def _read_msgpack(file: Path) -> Tensors:
  """Return the tensors that `flax.serialization` wrote; their names contain slashes."""
  flat = flatten_dict(msgpack_restore(file.read_bytes()), sep="/")
  return {name: leaf for name, leaf in flat.items() if isinstance(leaf, np.ndarray)}


def _read_npz(file: Path) -> Tensors:
  """Return the arrays that `numpy.savez` wrote. Checks their sizes before it unfolds them."""
  with zipfile.ZipFile(file) as archive:
    check_inflation(file, sum(entry.file_size for entry in archive.infolist()), file.stat().st_size)
    for entry in archive.infolist():
      with archive.open(entry) as stream:
        shape, dtype = _npy_header(stream)
        if math.prod(shape) * dtype.itemsize + stream.tell() != entry.file_size:
          raise ValueError(f"{entry.filename} has {entry.file_size} bytes, not those of {shape} {dtype}")
  with np.load(file, allow_pickle=False) as archive:
    return dict(archive)


def _npy_header(stream) -> tuple[tuple[int, ...], np.dtype]:
  """Return the shape and the type of the array that starts here."""
  version = np.lib.format.read_magic(stream)
  read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  shape, _, dtype = read(stream)
  if dtype.hasobject:
    raise ValueError("it holds Python objects, which are not supported")
  return shape, dtype


READERS: dict[str, Callable[[Path], Tensors]] = {
  ".safetensors": _read_safetensors,
  **dict.fromkeys(TORCH, torch_files.read_all),
  ".msgpack": _read_msgpack,
  ".npz": _read_npz,
}
"""The reader for each ending of a file's name."""


def write_safetensors(file: Path, tensors: Mapping[str, Any], dtype: str = "float32") -> None:
  """Write the tensors as `dtype`, marked as PyTorch's format so that `transformers` and timm read them."""
  # safetensors writes the buffer in memory order, so a transposed view must become a contiguous array.
  contiguous = {name: np.array(tensor, dtype, order="C") for name, tensor in tensors.items()}
  save_file(contiguous, file, metadata={"format": "pt"})
