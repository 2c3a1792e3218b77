"""One file for each run, named in `--config=configs/NAME.py`. common.py holds what they share."""

from configs.common import durations, references

__all__ = ["durations", "references"]
