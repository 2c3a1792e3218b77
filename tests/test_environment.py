"""scripts/environment.sh enters the right environment, installs what is missing, and removes nothing.

The environments are real ones without pip. A stub replaces the pip of `python -m venv`. It writes the
metadata of the packages and logs its calls.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import packaging
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
STUB_PIP = """
import os, pathlib, sys, time, zipfile
from packaging.requirements import Requirement
args, site = sys.argv[1:], pathlib.Path(os.__file__).parent
site = pathlib.Path(sys.prefix) / "lib" / site.name / "site-packages"
def install(name, version):
  folder = site / f"{name}-{version}.dist-info"
  folder.mkdir(exist_ok=True)
  (folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
  if os.environ.get("DIES_AT") == name:
    os._exit(9)
  (folder / "INSTALLER").write_text("stub")
if args != ["--version"]:
  with open("pip.log", "a") as log:
    print(*args, file=log)
  time.sleep(float(os.environ.get("PIP_SECONDS", 0)))
  for arg in args:
    if arg.startswith("--requirement="):
      for line in pathlib.Path(arg.partition("=")[2]).read_text().splitlines():
        if line.partition("#")[0].strip():
          wanted = Requirement(line.partition("#")[0])
          install(wanted.name, next(iter(wanted.specifier)).version)
  if "--editable" in args:
    (site / "checkout.pth").write_text(os.getcwd())
"""
STUB_PYTHON = """#!/usr/bin/env bash
if [ "$1 $2" = "-m venv" ]; then
  "{python}" -m venv --without-pip "$3" && cp -r {stub}/* "$3"/lib/python3*/site-packages/
  echo venv "$3" >>pip.log
else
  exec "{python}" "$@"
fi
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
  """Return a folder with environment.sh, requirement files, a package, and stubs of python3.11 and pip."""
  stub = tmp_path / "stub"
  (stub / "pip").mkdir(parents=True)
  (stub / "pip" / "__main__.py").write_text(STUB_PIP)
  (stub / "packaging").symlink_to(Path(packaging.__file__).parent)
  (tmp_path / "bin").mkdir()
  python = tmp_path / "bin" / "python3.11"
  base = os.path.realpath(sys.executable)
  python.write_text(STUB_PYTHON.format(python=base, stub=stub))
  python.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
  for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "DTM_JAX_VENV", "PYTHONPATH"):
    monkeypatch.delenv(name, raising=False)
  folder = tmp_path / "checkout"
  (folder / "scripts").mkdir(parents=True)
  shutil.copy(ROOT / "scripts" / "environment.sh", folder / "scripts")
  (folder / "dtm_jax").mkdir()
  (folder / "dtm_jax" / "__init__.py").touch()
  (folder / "pyproject.toml").write_text("")
  (folder / "requirements.txt").write_text("# numbers\nalpha>=1.2,<2\n")
  (folder / "requirements-test.txt").write_text("beta==3.0  # for the tests\n")
  return folder


ALL = ("requirements.txt", "requirements-test.txt")


def enter(folder, *files, **environment):
  """Source the script as ours do, and print the environment that it enters."""
  command = (
    f'set -euo pipefail; source scripts/environment.sh {" ".join(files)}; echo "in $(command -v python)"'
  )
  return subprocess.run(
    ["bash", "-c", command], cwd=folder, env=os.environ | environment, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip


def pip_calls(folder):
  log = folder / "pip.log"
  return log.read_text().splitlines() if log.exists() else []


def contents(folder):
  return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def entered(done, venv):
  assert done.returncode == 0, done.stdout
  assert done.stdout.splitlines()[-1] == f"in {venv}/bin/python"


def user_environment(folder, *packages):
  """Make an environment as a user does with uv, so it has no pip."""
  subprocess.run([os.path.realpath(sys.executable), "-m", "venv", "--without-pip", folder], check=True)
  site = next(folder.glob("lib/python3*/site-packages"))
  (site / "packaging").symlink_to(Path(packaging.__file__).parent)
  for package in packages:
    (site / f"{package}.dist-info").mkdir()
    name, version = package.split("-")
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (site / f"{package}.dist-info" / "METADATA").write_text(text)
  return folder


def test_one_environment_serves_all_scripts(checkout):
  """The first script makes it, the tests extend it, and the quickstart enters it without pip."""
  entered(enter(checkout, "requirements.txt"), checkout / ".venv")
  (checkout / ".venv" / "of_the_user").write_text("")
  entered(enter(checkout, *ALL), checkout / ".venv")
  calls = pip_calls(checkout)
  assert [call.startswith("venv") for call in calls].count(True) == 1
  before = contents(checkout / ".venv")
  for files in (ALL, ("requirements.txt",)):
    entered(enter(checkout, *files), checkout / ".venv")
  assert pip_calls(checkout) == calls
  assert contents(checkout / ".venv") == before
  plain = subprocess.run(
    [checkout / ".venv" / "bin" / "python", "-c", "import dtm_jax; print(*dtm_jax.__path__)"],
    cwd="/", text=True, stdout=subprocess.PIPE, check=True,
  )  # fmt: skip
  assert plain.stdout.strip() == str(checkout / "dtm_jax")


def test_a_changed_requirement_is_installed_into_the_same_environment(checkout):
  entered(enter(checkout, *ALL), checkout / ".venv")
  (checkout / ".venv" / "of_the_user").write_text("")
  (checkout / "requirements.txt").write_text("alpha>=1.2,<2\ngamma>=1\n")
  done = enter(checkout, "requirements.txt")
  entered(done, checkout / ".venv")
  assert list((checkout / ".venv").glob("lib/*/site-packages/gamma-1.dist-info"))
  assert (checkout / ".venv" / "of_the_user").exists()


@pytest.mark.parametrize("link", [False, True], ids=["folder", "link"])
def test_an_environment_of_the_user_is_used_or_left_alone(checkout, tmp_path, link):
  place = tmp_path / "elsewhere" if link else checkout / ".venv"
  if link:
    (checkout / ".venv").symlink_to(place)
  user_environment(place, "alpha-1.5", "numbers-1.0")
  before = contents(place)
  entered(enter(checkout, "requirements.txt"), checkout / ".venv")
  refused = enter(checkout, *ALL)
  assert refused.returncode
  assert "beta==3.0" in refused.stdout
  assert "alpha" not in refused.stdout
  assert "DTM_JAX_VENV=" in refused.stdout
  assert contents(place) == before
  entered(enter(checkout, *ALL, DTM_JAX_VENV="other/venv"), checkout / "other" / "venv")
  assert contents(place) == before


def test_an_environment_of_another_checkout_is_left_alone(checkout, tmp_path):
  entered(enter(checkout, "requirements.txt"), checkout / ".venv")
  other = tmp_path / "other"
  shutil.copytree(checkout, other, symlinks=True, ignore=shutil.ignore_patterns(".venv*"))
  (other / ".venv").symlink_to(checkout / ".venv")
  before = contents(checkout / ".venv")
  entered(enter(other, "requirements.txt"), other / ".venv")
  assert enter(other, *ALL).returncode
  assert contents(checkout / ".venv") == before


@pytest.mark.parametrize("what", ["old_python", "files", "file", "dangling"])
def test_the_message_names_an_unusable_environment(checkout, what):
  venv = checkout / ".venv"
  if what == "file":
    venv.write_text("mine")
  elif what == "dangling":
    venv.symlink_to("nowhere")
  elif what == "files":
    venv.mkdir()
    (venv / "notes.txt").write_text("mine")
  else:
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (venv / "bin" / "python").chmod(0o755)
  before = contents(checkout)
  done = enter(checkout, "requirements.txt")
  assert done.returncode
  assert "DTM_JAX_VENV=" in done.stdout
  assert ".venv" in done.stdout
  assert contents(checkout) == before


def test_an_empty_folder_behind_a_link_becomes_the_environment(checkout, tmp_path):
  (tmp_path / "big_disk").mkdir()
  (checkout / ".venv").symlink_to(tmp_path / "big_disk")
  entered(enter(checkout, "requirements.txt"), checkout / ".venv")
  entered(enter(checkout, *ALL), checkout / ".venv")


def test_an_installation_that_was_cut_off_is_completed(checkout):
  assert enter(checkout, "requirements.txt", DIES_AT="alpha").returncode
  entered(enter(checkout, "requirements.txt"), checkout / ".venv")
  package = next((checkout / ".venv").glob("lib/*/site-packages/alpha-*"))
  assert (package / "INSTALLER").exists()
  assert sum("--requirement" in call for call in pip_calls(checkout)) == 2


def test_an_environment_of_ours_whose_python_is_gone_is_repaired(checkout):
  entered(enter(checkout, "requirements.txt"), checkout / ".venv")
  (checkout / ".venv" / "of_the_user").write_text("")
  for python in (checkout / ".venv" / "bin").glob("python*"):
    python.unlink()
    python.symlink_to("/no/such/python")
  entered(enter(checkout, "requirements.txt"), checkout / ".venv")
  assert (checkout / ".venv" / "of_the_user").exists()


def test_two_scripts_at_once_install_one_after_the_other(checkout):
  """The second script waits, and then installs only what the first did not."""
  command = ["bash", "-c", "set -e; source scripts/environment.sh requirements.txt requirements-test.txt"]
  both = [
    subprocess.Popen(
      command, cwd=checkout, env=os.environ | {"PIP_SECONDS": "0.5"}, stdout=subprocess.PIPE, text=True
    )
    for _ in range(2)
  ]
  outputs = [process.communicate(timeout=300)[0] for process in both]
  assert [process.returncode for process in both] == [0, 0]
  assert "waiting" in "".join(outputs)
  assert len(pip_calls(checkout)) == 3  # the environment, the requirements, the package


def test_the_active_environment_is_used_when_it_is_named(checkout, tmp_path):
  active = user_environment(tmp_path / "active", "alpha-1.5")
  done = enter(checkout, "requirements.txt", VIRTUAL_ENV=str(active))
  entered(done, checkout / ".venv")
  assert f"DTM_JAX_VENV={active}" in done.stdout
  entered(enter(checkout, "requirements.txt", VIRTUAL_ENV=str(active), DTM_JAX_VENV=str(active)), active)


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=lambda path: path.name)
def test_our_requirements_are_ranges(path):
  """Each line is a name and versions, since the script compares versions and knows no options or URLs."""
  for line in path.read_text().splitlines():
    if text := line.partition("#")[0].strip():
      assert Requirement(text).specifier, text
