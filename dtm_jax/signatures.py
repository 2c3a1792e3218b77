"""Read the parameters of functions and the fields of classes from source code, without an import.

An import of a module that needs JAX or TensorFlow takes seconds, and parsing its source takes milliseconds.
"""

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Parameter:
  """Describe one parameter of a function, or one field of a class.

  Attributes:
    annotation: the type as written in the source, such as "int | None".
    default: the default as written in the source; None if there is none.
    meaning: what the docstring says about it, as a sentence; "" if it says nothing.
  """

  name: str
  annotation: str
  default: str | None = None
  meaning: str = ""

  @property
  def required(self) -> bool:
    """Whether there is no default."""
    return self.default is None


def parameters_in_source(source: str, *path: str) -> list[Parameter] | None:
  """Return the parameters of the function, or the fields of the class, at `path` in the source of a module.

  The meanings come from the docstring of the function. If a method has none, the docstring of its class
  counts.

  Args:
    path: such as ("build",) or ("Evaluator", "__init__").

  Returns:
    The parameters in order, or None if the source has no such definition.
  """
  module = ast.parse(source)
  parameters: Iterable[Named] = ()
  body, docstring = module.body, ""
  for name in path:
    definitions = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    found = next((node for node in definitions if node.name == name), None)
    if found is None:
      return None
    body, docstring = found.body, ast.get_docstring(found) or docstring
    parameters = _fields(found) if isinstance(found, ast.ClassDef) else _parameters(found)
  constants, meanings = _constants(module), meanings_in_docstring(docstring)

  def written(default: ast.expr | None) -> str | None:
    if isinstance(default, ast.Name):
      default = constants.get(default.id, default)
    return None if default is None else ast.unparse(default)

  return [
    Parameter(name, ast.unparse(annotation) if annotation else "", written(default), meanings.get(name, ""))
    for name, annotation, default in parameters
  ]


def parameters_of(function: Callable[..., Any], docstring: str | None) -> list[Parameter]:
  """Return the named parameters of an imported function. `docstring` gives their meanings."""
  meanings, empty = meanings_in_docstring(inspect.cleandoc(docstring or "")), inspect.Parameter.empty
  named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
  return [
    Parameter(
      each.name,
      "" if each.annotation is empty else inspect.formatannotation(each.annotation),
      None if each.default is empty else repr(each.default),
      meanings.get(each.name, ""),
    )
    for each in inspect.signature(function).parameters.values()
    if each.kind in named
  ]


def meanings_in_docstring(docstring: str) -> dict[str, str]:
  """Return what the sections `Args:` and `Attributes:` of a docstring say about each name, as sentences.

  "a, b: text" is the meaning of both names. "a: see `B`" only points to another place, so it is none.
  """
  meanings: dict[str, str] = {}
  for section in re.findall(r"^(?:Args|Attributes):\n((?:(?:  .*)?\n)*(?:  .*)?)", docstring, re.MULTILINE):
    for names, text in re.findall(r"^  (\w+(?:, \w+)*): (.*(?:\n    .*|\n(?=\n))*)", section, re.MULTILINE):
      text = " ".join(text.split())
      if not text.startswith("see "):
        meanings |= dict.fromkeys(names.split(", "), as_sentence(text))
  return meanings


def as_sentence(text: str) -> str:
  """Return the text with a capital letter at its start and a full stop at its end."""
  return text[:1].upper() + text[1:] + ("" if not text or text.endswith((".", "...")) else ".")


Named = tuple[str, ast.expr | None, ast.expr | None]
"""The name, the annotation and the default of a parameter."""


def _parameters(function: ast.FunctionDef) -> list[Named]:
  arguments = function.args
  positional = [*arguments.posonlyargs, *arguments.args]
  defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
  pairs = [
    *zip(positional, defaults, strict=True),
    *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
  ]
  return [(argument.arg, argument.annotation, default) for argument, default in pairs]


def _fields(of_class: ast.ClassDef) -> Iterable[Named]:
  for node in of_class.body:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      yield node.target.id, node.annotation, node.value


def _constants(module: ast.Module) -> dict[str, ast.expr]:
  """Return the values of the module's constants by name."""
  assigned = [node for node in module.body if isinstance(node, ast.Assign)]
  return {node.targets[0].id: node.value for node in assigned if isinstance(node.targets[0], ast.Name)}
