"""Train several seeds of one config at once on one device. Each has a workdir like that of a run of its own.

    python scripts/train_seeds.py --config=configs/quickstart.py --seeds=0,1,2 --workdir=runs/seed-{seed}

The options of the config are those of `dtm_jax.main`. {seed} stands for the seed. The numbers differ from
those of separate runs only by rounding. `python -m dtm_jax.main --workdir=runs/seed-1` evaluates one of
the runs, or goes on with it alone. The device needs the memory of all runs together.

The same command resumes the runs after a stop. It refuses several processes, `log.profile_step` and `replay`.
With several devices it uses the first one.
"""

import os
import sys
from collections.abc import Sequence

from absl import logging

from dtm_jax.errors import OptionError
from dtm_jax.options.command_line import parse_with_config, run_script, script_parser
from dtm_jax.options.validation import check_workdir
from dtm_jax.training import startup


def main(argv: Sequence[str] | None = None) -> None:
  """Run the command line of the module's docstring."""
  parser = script_parser(__doc__)
  parser.add_argument("--seeds", required=True, help="seeds with commas between them")
  parser.add_argument("--workdir", required=True, help="folder of each run, with {seed} in its name")
  config, args = parse_with_config(parser, argv)
  workdirs = {seed: args.workdir.replace("{seed}", str(seed)) for seed in _seeds(args.seeds)}
  if len({*workdirs.values()}) < len(workdirs):
    raise OptionError(f"--workdir={args.workdir} needs {{seed}} in its name, so that each seed has a folder.")
  for workdir in workdirs.values():
    check_workdir(workdir)
  startup.quiet_orbax()
  startup.start_distributed()
  startup.keep_compiled_programs()
  from dtm_jax import seeds  # after jax.distributed: importing the loop may touch the devices

  logging.info("Seeds %s of task %r.", ", ".join(map(str, workdirs)), config.task)
  complete = seeds.run(config, workdirs)
  startup.leave_distributed()
  if not complete:
    sys.exit(startup.exit_code_when_stopped(os.environ))


def _seeds(text: str) -> list[int]:
  """Return the numbers in a text such as "0,1,2"."""
  words = [word.strip() for word in text.split(",")]
  if not all(word.isdecimal() for word in words) or len({*words}) < len(words):
    raise OptionError(f"--seeds={text} must be different whole numbers with commas between them.")
  return [int(word) for word in words]


if __name__ == "__main__":
  run_script(main)
