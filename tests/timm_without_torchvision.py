"""timm imports torchvision for its data loaders and graph features, which its models do not need.

During the import, `import_timm()` replaces torchvision by an empty module.
"""

import importlib.abc
import importlib.machinery
import sys
import types


class _Enum(type):
  def __getattr__(cls, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return name


class _Empty(types.ModuleType):
  """A module that returns a new class for every name. Every attribute of such a class is its own name."""

  __path__ = ()

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return _Enum(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  def find_spec(self, fullname, path=None, target=None):
    if fullname.split(".")[0] == "torchvision":
      return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
    return None

  def create_module(self, spec):
    return _Empty(spec.name)

  def exec_module(self, module):
    pass


def import_timm():
  finder = _Finder()
  sys.meta_path.insert(0, finder)
  try:
    import timm
  finally:
    sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
      del sys.modules[name]
  return timm
