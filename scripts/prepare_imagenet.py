"""Run `scripts/data/prepare_imagenet.py`."""

from data.prepare_imagenet import main

from dtm_jax.options.command_line import run_script

if __name__ == "__main__":
  run_script(main)
