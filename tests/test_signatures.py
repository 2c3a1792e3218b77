"""Test what is read from source code without an import."""

from dtm_jax import signatures
from dtm_jax.signatures import Parameter

SOURCE = '''
SIZES = (1, 2)

def build(path: str | None, *, sizes: tuple = SIZES, fast=False, depth: int = 1):
  """Build it.

  Args:
    path: the file, which
      must exist.
    sizes, fast: see `Other`.
    depth: number of layers.

  Raises:
    OSError: no such file.
  """

class Evaluator:
  """Measure it.

  Args:
    split: the split to measure. Default: all ...
  """

  scale: float = 2.0
  other = 3

  def __init__(self, context, *, split: str): ...
'''


def test_parameters_of_a_function():
  assert signatures.parameters_in_source(SOURCE, "build") == [
    Parameter("path", "str | None", None, "The file, which must exist."),
    Parameter("sizes", "tuple", "(1, 2)"),
    Parameter("fast", "", "False"),
    Parameter("depth", "int", "1", "Number of layers."),
  ]


def test_a_method_takes_the_meanings_from_its_class():
  found = signatures.parameters_in_source(SOURCE, "Evaluator", "__init__")
  assert found[2] == Parameter("split", "str", None, "The split to measure. Default: all ...")
  assert found[2].required


def test_fields_of_a_class():
  assert signatures.parameters_in_source(SOURCE, "Evaluator") == [Parameter("scale", "float", "2.0")]


def test_a_missing_definition_is_none():
  assert signatures.parameters_in_source(SOURCE, "splits") is None
  assert signatures.parameters_in_source(SOURCE, "Evaluator", "run") is None


def test_parameters_of_an_imported_function_are_the_same():
  space = {}
  exec(SOURCE, space)
  found = signatures.parameters_of(space["build"], space["build"].__doc__)
  assert found == signatures.parameters_in_source(SOURCE, "build")
