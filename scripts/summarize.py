"""Run `scripts/report/summarize.py`."""

from report.summarize import main

from dtm_jax.options.command_line import run_script

if __name__ == "__main__":
  run_script(main)
