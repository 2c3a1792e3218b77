"""Show the examples of docstrings as code on the page docs/api.md. mkdocs.yml names this file."""

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
  """Put a fence around each example: lines from ">>> " to the next empty line."""

  def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    """Change the docstring of an object that griffe has just read."""
    if obj.docstring:
      obj.docstring.value = re.sub(r"^>>> (?:.+\n?)+", _fenced, obj.docstring.value, flags=re.M)


def _fenced(match: re.Match[str]) -> str:
  return f"```pycon\n{match[0].rstrip()}\n```\n"
