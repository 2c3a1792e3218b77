"""Run `scripts/weights/convert_clip.py`."""

from weights.convert_clip import main

from dtm_jax.options.command_line import run_script

if __name__ == "__main__":
  run_script(main)
