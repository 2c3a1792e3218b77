"""Run `scripts/studies/study.py`."""

from studies.study import main

from dtm_jax.options.command_line import run_script

if __name__ == "__main__":
  run_script(main)
