"""Train and evaluate.

    python -m dtm_jax.main --config=configs/vitb16.py [--workdir=DIR]

Write an option of the config as `--config.batch_size=64`. The command
`--config=FILE --help` lists all options. They are checked before anything is
loaded. An error that the user can mend ends with one message and exit code 2.

On a pod every host runs the same command. If JAX does not find the cluster by
itself, set JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and
JAX_PROCESS_ID.

After a SIGTERM the run saves and ends with code 0, or with DTM_JAX_STOPPED_CODE
if that is set. A script that sets it can tell such a run from a complete one
and start the same command again.

Compiled programs are kept in ~/.cache/dtm_jax/xla (or $DTM_JAX_CACHE/xla), so
a second start does not compile them again. JAX_COMPILATION_CACHE_DIR names
another place, and JAX_ENABLE_COMPILATION_CACHE=false keeps none.
"""

import os
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict

from dtm_jax import progress
from dtm_jax.errors import UserError
from dtm_jax.options import command_line, help_text, validation
from dtm_jax.options.arguments import split_arguments
from dtm_jax.options.command_line import USER_ERROR
from dtm_jax.options.config_file import load_config
from dtm_jax.training import startup

_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of checkpoints and logs, from which a run resumes. Default: runs/<name of the config>.",
)
_HELP = {"--help", "-help", "-h", "--helpfull", "-helpfull", "--helpshort", "-helpshort"}
_run: dict = {}
"""The checked config and the workdir, which `parse_flags` passes to `main`."""


def main(argv: list[str]) -> None:
  """Run the config that `parse_flags` has read and checked."""
  config, workdir = _run["config"], _run["workdir"]
  logging.info("Task %r in %s. Loading the libraries takes some seconds.", config.task, workdir)
  try:
    startup.quiet_orbax()
    startup.start_distributed()
    startup.keep_compiled_programs()
    import jax

    logging.info(
      "Process %d of %d, devices: %s", jax.process_index(), jax.process_count(), jax.local_devices()
    )
    if jax.process_index():
      progress.only_lines()
    from dtm_jax import loop  # after jax.distributed: importing the loop may touch the devices

    complete = True
    if config.get("replay"):
      loop.replay(config)
    else:
      _, complete = loop.run(config, workdir)
    startup.leave_distributed()
    if not complete:
      sys.exit(startup.exit_code_when_stopped(os.environ))
  except UserError as error:
    place = startup.process_place(os.environ)
    command_line.end_with(error, f"Process {place}: " if place else "")


def parse_flags(argv: list[str]) -> list[str]:
  """Read and check the command line and the config. This is the `flags_parser` of absl."""
  try:
    config, workdir, rest = read_command_line(flags.FLAGS.read_flags_from_files(argv, force_gnu=False))
  except UserError as error:
    if startup.process_place(os.environ) and not startup.cluster_is_wrong(os.environ):
      sys.exit(USER_ERROR)  # every process fails alike, and the first one says why
    command_line.end_with(error)
  _run.update(config=config, workdir=workdir)
  return rest


def read_command_line(argv: list[str]) -> tuple[ConfigDict, str, list[str]]:
  """Return the checked config, the workdir, and the list with the name of the program.

  Raises:
    UserError: a flag, an option, a file, or a variable of the cluster is wrong.
  """
  arguments = split_arguments(argv)
  if asked := _HELP & {*arguments.rest}:
    text = _help(arguments.config)
    if any("full" in flag for flag in asked):
      text += f"\n\nFlags of the libraries:\n{flags.FLAGS.get_help()}"
    try:
      print(text, flush=True)
    except BrokenPipeError:  # `--help | head` has read enough; Python must not flush the rest at its end
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
  config, problems, rest = command_line.read(arguments)
  path = str(arguments.config).partition(":")[0]
  name = os.path.splitext(os.path.basename(path))[0]
  workdir = os.path.join("runs", name) if _WORKDIR.value is None else _WORKDIR.value
  validation.check_all(
    lambda: validation.check(config, problems),
    lambda: validation.check_workdir(workdir),
    lambda: startup.check_cluster(os.environ),
  )
  return config, workdir, rest


def _help(path: str | None) -> str:
  """Return how to start a run, and the options of the config, or else the list of configs."""
  lines = [__doc__.strip(), "", "  --workdir=DIR", help_text.paragraph(flags.FLAGS["workdir"].help)]
  if path:
    return "\n".join([*lines, "", f"Options of {path}:", "", help_text.config_help(load_config(path))])
  about = "What to run. With a config, --help lists its options with their meaning."
  return "\n".join([*lines, "  --config=FILE", help_text.paragraph(about), "", help_text.configs_help()])


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
