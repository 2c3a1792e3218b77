"""Run `scripts/data/get_segmentation_photos.py`."""

from data.get_segmentation_photos import main

from dtm_jax.options.command_line import run_script

if __name__ == "__main__":
  run_script(main)
