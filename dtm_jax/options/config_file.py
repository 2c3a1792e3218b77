"""Load the config from the Python file that `--config` names."""

import difflib
import os
import sys
import traceback
import types

from ml_collections import ConfigDict

from dtm_jax.errors import NotThereError, OptionError


def load_config(path: str) -> ConfigDict:
  """Return the result of the file's `get_config()`, locked. "FILE:TEXT" passes the text to `get_config`.

  Raises:
    NotThereError: there is no such file.
    OptionError: the file is not a config. An error in the file's own code keeps the file and the line.
  """
  file, _, text = (path, "", "") if os.path.exists(path) else path.partition(":")
  if not os.path.isfile(file):
    raise NotThereError(f"--config={path}: there is no such file.{_configs_near(file)}")
  try:
    config = _run(file, path, text)
  except OptionError:
    raise
  except Exception as error:
    lines = traceback.format_exception(error)
    own = [line for line in lines[1:] if __file__ not in line]
    raise OptionError(f"--config={path}: the file raises an error.\n{''.join(own).rstrip()}") from error
  if not isinstance(config, ConfigDict):
    raise OptionError(f"--config={path}: get_config() returns {type(config).__name__}, not a ConfigDict.")
  return config.lock()


def _run(file: str, path: str, text: str) -> object:
  """Run the file and return the result of its `get_config`."""
  module = types.ModuleType("config")
  module.__file__ = file
  here = os.getcwd()
  sys.path.insert(0, here)  # for `from configs import ...`, also if the package is installed
  try:
    with open(file, encoding="utf-8") as opened:
      exec(compile(opened.read(), file, "exec"), module.__dict__)
    if not callable(getattr(module, "get_config", None)):
      raise OptionError(f"--config={path}: the file has no function get_config().")
    return module.get_config(*([text] if text else []))
  finally:
    sys.path.remove(here)


def _configs_near(file: str) -> str:
  """Return a sentence with the configs that have similar names; empty if there are none."""
  folder = os.path.dirname(file) or "."
  if not os.path.isdir(folder):
    folder = "configs"
  names = os.listdir(folder) if os.path.isdir(folder) else []
  configs = sorted(name for name in names if name.endswith(".py"))
  near = difflib.get_close_matches(os.path.basename(file), configs, n=3, cutoff=0.3)
  return f" Nearest: {', '.join(os.path.join(folder, name) for name in near)}." if near else ""
