"""Run a script in a process in which neither CLU nor TensorFlow can be imported."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HIDE = """
import importlib.abc, sys

class Hide(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in ("clu", "tensorflow", "tensorflow_datasets"):
      raise ModuleNotFoundError(f"No module named {name!r} (hidden)", name=name)

sys.meta_path.insert(0, Hide())
"""


def run(script: str, *arguments: str, **environment: str) -> str:
  """Return the output of the script. A failure fails the test with the end of the error output."""
  done = subprocess.run(
    [sys.executable, "-c", HIDE + script, *arguments],
    cwd=ROOT,
    env=os.environ | environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout
