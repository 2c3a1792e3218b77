"""An unpickler for the pickles of torch.save and torch.jit.save that runs no code of the file.

A pickle may name any function, and the usual reader calls it. This reader knows only the names that a state
dict needs. It replaces each with a stand-in that records its arguments. Any other name is an error. No
stand-in accepts state that would change what it does.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dtm_jax.models.files.file_checks import UnreadableFileError

DTYPES = {
  "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
  "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


class UnsafePickleError(UnreadableFileError):
  """A pickle names something that no state dict needs."""


class StorageRef(NamedTuple):
  """A reference to a storage of the file.

  Attributes:
    key: name of the storage in the file.
    dtype: NumPy name of the element type.
    offset: first element, counted from the start of the storage.
  """

  key: str
  dtype: str
  offset: int


class TensorRef(NamedTuple):
  """A view of a storage; `offset`, `shape` and `strides` count elements."""

  storage: StorageRef
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class Instance:
  """A stand-in for an instance of any class. It keeps the pickled state as `attributes` and has no methods.

  The unpickler makes a new subclass for each name, so nothing outlives a reading.
  """

  __slots__ = ("attributes",)
  attributes: dict

  def __new__(cls, *_):
    instance = super().__new__(cls)
    object.__setattr__(instance, "attributes", {})
    return instance

  def __init__(self, *_):
    pass

  def __setstate__(self, state):
    object.__setattr__(self, "attributes", state if isinstance(state, dict) else {})


class _Function:
  """A stand-in for a function. Its __setstate__ keeps a pickle from setting its attributes."""

  __slots__ = ("_call",)

  def __init__(self, call: Callable):
    self._call = call

  def __call__(self, *args):
    return self._call(*args)

  def __setstate__(self, _):
    raise ValueError("a pickle gives state to a function")


class _Dict(dict):
  """A stand-in for OrderedDict. It ignores the attributes of state dicts, such as _metadata."""

  __slots__ = ()

  def __setstate__(self, _):
    pass


def _rebuild_tensor(storage: Any, offset: int, shape: tuple, strides: tuple, *_) -> TensorRef:
  if not isinstance(storage, StorageRef):
    raise ValueError("a tensor without a storage")
  return TensorRef(storage, offset, shape, strides)


FUNCTIONS: dict[str, Callable] = {
  "collections.OrderedDict": _Dict,
  "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
  "torch._utils._rebuild_tensor": _rebuild_tensor,
  "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
  "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
  "torch.jit._pickle.restore_type_tag": lambda value, _: value,
}
STORAGE_TYPES = {f"torch.{storage}": dtype for storage, dtype in DTYPES.items()}
STORAGE_TYPES |= {f"torch.{dtype}": dtype for dtype in DTYPES.values()}
IGNORED = {
  "torch.Size", "torch.device", "argparse.Namespace",
  *(f"torch.jit._pickle.build_{kind}list" for kind in ("int", "tensor", "double", "bool")),
  # NumPy scalars occur in the arguments and metrics of a training run.
  "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "_codecs.encode",
}  # fmt: skip
"""Names that occur beside the tensors. The unpickler accepts them as an `Instance`."""


class Unpickler(pickle.Unpickler):
  """Read a pickle of torch: tensors become `TensorRef`, instances of classes become `Instance`.

  Raises:
    UnsafePickleError: the pickle names something else; the message says the first such name.
    ValueError: the pickle refers to an unknown kind of storage.
  """

  def __init__(self, file: io.BufferedIOBase, path: Path):
    super().__init__(file, encoding="utf-8")
    self._path = path

  def find_class(self, module: str, name: str) -> Any:
    full = f"{module}.{name}"
    if full in FUNCTIONS:
      return _Function(FUNCTIONS[full])
    if full in STORAGE_TYPES:
      return STORAGE_TYPES[full]
    if full in IGNORED or module.split(".")[0] == "__torch__":
      return type("Instance", (Instance,), {"__slots__": ()})
    raise UnsafePickleError(
      f"{self._path} is not read: its pickle asks for {full}, which no state dict needs and may run code."
    )

  def persistent_load(self, pid: Any) -> StorageRef:
    kind, dtype, key, *rest = pid
    if kind != "storage" or dtype not in DTYPES.values():
      raise ValueError(f"a reference to {kind!r} of {dtype!r}")
    view = rest[2] if len(rest) > 2 else None  # legacy files: (key, offset, size) within the storage
    return StorageRef(str(key), dtype, view[1] if view else 0)
