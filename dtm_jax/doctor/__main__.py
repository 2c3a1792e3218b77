"""Check everything that a run needs, before hours of training: `python -m dtm_jax.doctor --config=FILE`.

    python -m dtm_jax.doctor --config=configs/vitb16.py --workdir=gs://BUCKET/vitb16 [--config.batch_size=...]

Takes the arguments of `dtm_jax.main`. On a pod, every host runs the same command. Each line of the report is
ok, a warning or a failure, with the fix. The exit code is 1 if there is a failure. The doctor leaves no file
in the workdir. It is meant to take under two minutes; `--compile_seconds` limits the longest part.
"""

import os
import sys
import time
from collections.abc import Iterable

from absl import logging

from dtm_jax.doctor import FAILURE, WARNING, Examination, Finding, examine
from dtm_jax.options.command_line import parse_with_config, run_script, script_parser
from dtm_jax.training import startup


def main() -> None:
  """Run the command line of the module's docstring."""
  start = time.perf_counter()
  parser = script_parser(__doc__)
  parser.prog = "python -m dtm_jax.doctor"
  parser.add_argument("--workdir", help="folder of the run (default: runs/<name of the config>)")
  parser.add_argument(
    "--compile_seconds", type=float, default=60.0, help="time limit of the step's compilation (default: 60)"
  )
  config, args = parse_with_config(parser)
  logging.set_verbosity(logging.ERROR)
  startup.quiet_orbax()
  startup.hide_accelerators_from_tensorflow()
  startup.start_distributed()
  startup.keep_compiled_programs()
  from dtm_jax import processes
  from dtm_jax.doctor.checks import make_checks
  from dtm_jax.options.arguments import split_arguments
  from dtm_jax.storage import paths

  path = str(split_arguments(sys.argv).config).partition(":")[0]
  name = os.path.splitext(os.path.basename(path))[0]
  workdir = os.path.join("runs", name) if args.workdir is None else args.workdir
  examination = Examination(config, paths.resolve(workdir))
  failures, warnings = _print_findings(examine(examination, make_checks(args.compile_seconds)))
  if processes.is_first():
    print(f"failures: {failures}, warnings: {warnings}, {time.perf_counter() - start:.0f} s.", flush=True)
  code = int(failures > 0)
  if examination.unfinished:  # a thread still compiles
    sys.stderr.flush()
    os._exit(code)
  startup.leave_distributed()
  sys.exit(code)


def _print_findings(findings: Iterable[Finding]) -> tuple[int, int]:
  """Print each finding as it comes, on process 0, and return the numbers of failures and warnings."""
  from dtm_jax import processes

  statuses = []
  for finding in findings:
    statuses.append(finding.status)
    if processes.is_first():
      text = finding.text.replace("\n", f"\n{'':22}")
      print(f"{finding.status:8} {finding.title:12} {text}", flush=True)
      if finding.fix:
        print(f"{'':8} {'':12} Fix: {finding.fix}", flush=True)
  return statuses.count(FAILURE), statuses.count(WARNING)


if __name__ == "__main__":
  run_script(main)
