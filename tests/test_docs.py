"""The documentation site: its pages, its links, and its page of options that the code generates."""

import ast
import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dtm_jax.options.config_file import load_config
from dtm_jax.options.sections import dotted_keys

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """The site, built strictly: a broken link, anchor or reference is an error."""
  folder = tmp_path_factory.mktemp("site")
  environment = os.environ | {"NO_MKDOCS_2_WARNING": "true"}
  command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={folder}"]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return folder


def test_the_navigation_lists_every_page():
  text = (ROOT / "mkdocs.yml").read_text()
  listed = re.findall(r"^ +- .*: (\S+\.md)$", text, re.M)
  assert len(listed) == len(set(listed))
  assert {path.name for path in (ROOT / "docs").glob("*.md")} == {*listed} - {"CHANGELOG.md"}


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_the_network(site):
  for page in site.rglob("*.html"):
    if page.is_relative_to(site / "results"):
      continue
    loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="?(https?://[^">]+)', page.read_text())
    assert not loaded, (page, loaded)
  assert (site / "search" / "search_index.js").exists()


@pytest.mark.slow
def test_the_configuration_page_has_every_option_of_every_config(site):
  page = html.unescape((site / "configuration.html").read_text())
  shown = set(re.findall(r"<td><code>([\w.]+)</code></td>", page))
  for name in CONFIGS:
    if name not in ("__init__", "common"):
      assert f"configs/{name}.py" in page
      assert {*dotted_keys(load_config(str(ROOT / f"configs/{name}.py")))} <= shown, name


def strings_of(folder: Path) -> list[str]:
  """Return all string literals of the Python files below a folder, with "\0" for what is filled in."""
  found = []
  for path in folder.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.JoinedStr):
        found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(node.value)
  return found


def test_every_quoted_message_is_in_the_code():
  text = (ROOT / "docs/troubleshooting.md").read_text()
  messages = re.findall(r"^### `(.*)`$", text, re.M)
  assert len(messages) >= 25
  assert len(messages) == len(re.findall("^### ", text, re.M)) == len(set(messages))
  strings = strings_of(ROOT / "dtm_jax")
  for message in messages:
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.S)
    assert any(pattern.search(string) for string in strings), message
