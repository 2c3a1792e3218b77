"""Run `scripts/studies/train_seeds.py`."""

from studies.train_seeds import main

from dtm_jax.options.command_line import run_script

if __name__ == "__main__":
  run_script(main)
