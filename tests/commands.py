"""Check the commands that the README and the pages of docs/ show: their files, their flags and their options.

Nothing is run, and neither JAX nor TensorFlow is imported.
"""

import ast
import dataclasses
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from dtm_jax.errors import UserError
from dtm_jax.options import command_line, validation
from dtm_jax.options.arguments import split_arguments
from dtm_jax.options.sections import get

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_PROGRAMS = {
  "apt", "cat", "cd", "cp", "export", "gcloud", "gcsfuse", "git", "gsutil", "helm", "jupyter", "kubectl",
  "mkdir", "mlflow", "npm", "pip", "pre-commit", "sbatch", "scancel", "sed", "source", "squeue", "srun",
  "ssh", "tail", "tensorboard", "wandb",
}  # fmt: skip
FLAGS_IN = {
  "scripts/campaign.sh": "tests/campaign/__main__.py",
  "scripts/comparisons.sh": "scripts/studies/study.py",
  "scripts/gpu.sh": "benchmarks/gpu.py",
  "scripts/launch.sh": "dtm_jax/main.py",
  "scripts/quickstart.sh": "dtm_jax/main.py",
  "scripts/test.sh": "tests/conftest.py",
}
"""Scripts that pass their flags on -> the file that defines the flags."""
CONFIG_OF = {"scripts/quickstart.sh": "quickstart"}
"""Scripts that choose the config themselves."""


@dataclasses.dataclass(frozen=True)
class Block:
  """A fenced block of a page, and whether `<!-- test: run -->` stands before it."""

  page: str
  language: str
  text: str
  is_run: bool

  def commands(self) -> Iterator[str]:
    """Yield the command lines of a block of shell commands, with their continued lines."""
    text = re.sub(r"\\\n\s*", "", self.text)
    for line in text.splitlines():
      if line.strip() and not line.strip().startswith("#"):
        yield line.strip()


def blocks() -> list[Block]:
  """Return the fenced blocks of all pages."""
  pattern = r"(<!-- test: run -->\n)?^ *```(\w*)[^\n]*\n(.*?)^ *```$"
  return [
    Block(path.name, match[2], match[3], match[1] is not None)
    for path in PAGES
    for match in re.finditer(pattern, path.read_text(), re.S | re.M)
  ]


def problems(command: str) -> list[str]:
  """Return what is wrong with a command line; an empty list if its files, flags and options exist."""
  words = shlex.split(command, comments=True)
  found = []
  for part in _split(words, {"&&", "||", "|", ";"}):
    while part and re.fullmatch(r"[A-Z_]+=.*", part[0]):  # variables of the environment
      part = part[1:]
    found += _problems_of_program(part)
  return found


def _split(words: list[str], at: set[str]) -> list[list[str]]:
  parts: list[list[str]] = [[]]
  for word in words:
    if word in at:
      parts.append([])
    else:
      parts[-1].append(word)
  return [part for part in parts if part]


def _problems_of_program(words: list[str]) -> list[str]:
  program, *arguments = words or ["cd"]
  if program in ("srun", "nohup", "time", "sudo"):
    ours = [place for place, word in enumerate(words) if word in ("bash", "python")]
    return _problems_of_program(words[ours[0] :]) if ours else []
  if program == "gcloud":
    inner = [word.removeprefix("--command=") for word in arguments if word.startswith("--command=")]
    return [problem for command in inner for problem in problems(command)]
  if program in ("bash", "python", "python3") and arguments:
    if arguments[0] == "-m":
      return _problems_of_module(arguments[1], arguments[2:])
    if arguments[0] == "-c":
      ast.parse(arguments[1])
      return []
    return _problems_of_script(arguments[0], arguments[1:])
  if program.startswith(("scripts/", "./scripts/")):
    return _problems_of_script(program.removeprefix("./"), arguments)
  return [] if program in OTHER_PROGRAMS else [f"unknown program {program}"]


def _problems_of_module(name: str, arguments: list[str]) -> list[str]:
  if name == "dtm_jax.main":
    return [*_problems_of_flags("dtm_jax/main.py", arguments), *_problems_of_config(arguments)]
  if name == "pip":
    extras = {extra for word in arguments for extra in re.findall(r"^\.\[(.*)\]$", word)}
    known = set(re.findall(r"^(\w+) = \{ file", (ROOT / "pyproject.toml").read_text(), re.M))
    return [f"unknown extra {extra}" for extra in extras for one in extra.split(",") if one not in known]
  if name.partition(".")[0] in ("dtm_jax", "benchmarks", "scripts", "tests"):
    path = ROOT / (name.replace(".", "/") + ".py")
    path = path if path.exists() else ROOT / name.replace(".", "/") / "__main__.py"
    if not path.exists():
      return [f"there is no module {name}"]
    return [*_problems_of_flags(str(path.relative_to(ROOT)), arguments), *_problems_of_config(arguments)]
  return [] if importlib.util.find_spec(name.partition(".")[0]) else [f"there is no module {name}"]


def _problems_of_script(name: str, arguments: list[str]) -> list[str]:
  path = ROOT / name
  if not path.is_file():
    return [f"there is no file {name}"]
  config = CONFIG_OF.get(name)
  chosen = [f"--config=configs/{config}.py"] if config else []
  return [*_problems_of_flags(name, arguments), *_problems_of_config([*chosen, *arguments])]


def _problems_of_flags(name: str, arguments: list[str]) -> list[str]:
  """Return the flags that do not stand in the file of the command, nor in the file that it runs."""
  path = ROOT / FLAGS_IN.get(name, name)
  text = path.read_text()
  text += "".join((ROOT / "scripts" / folder / path.name).read_text() for folder in _folders(path))
  flags = {word.partition("=")[0] for word in arguments if re.match(r"--\w", word)}
  unknown = sorted(flag for flag in flags if not flag.startswith("--config") and flag != "--help")
  return [
    f"{name} has no flag {flag}"
    for flag in unknown
    if flag[2:].replace("-", "_") not in text.replace("-", "_")
  ]


def _folders(path: Path) -> list[str]:
  """Return the folders of scripts/ that hold the code of the command scripts/NAME.py."""
  if path.parent != ROOT / "scripts" or path.suffix != ".py":
    return []
  return [folder.name for folder in path.parent.iterdir() if (folder / path.name).is_file()]


def _problems_of_config(arguments: list[str]) -> list[str]:
  """Return why `dtm_jax.main` would refuse these options of a config."""
  if not any(word.startswith("--config=") for word in arguments):
    return []
  if "$" in "".join(arguments) or any(word.startswith("--config=FILE") for word in arguments):
    return []
  options = [word for word in arguments if word.startswith("--config")]
  try:
    config, found = command_line.read_config(split_arguments(["main", *options]))
    if get(config, "teacher.name") == "checkpoint" and config.teacher.path is None:
      config.teacher.path = "runs/some"
    validation.check(config, found)
  except UserError as error:
    return [str(error)]
  return []
