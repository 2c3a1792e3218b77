"""Run `scripts/data/tfrecord_to_array_record.py`."""

from data.tfrecord_to_array_record import main

from dtm_jax.options.command_line import run_script

if __name__ == "__main__":
  run_script(main)
