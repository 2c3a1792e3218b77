"""Save, verify and restore a run. Only this package imports Orbax.

manager          `Checkpoints`: the checkpoints of one run
saving           saves in the background, and tries a failed save once more
contents         says what one checkpoint holds; `load_params` reads only its parameters
retries          repeats a read until it succeeds, the bytes are proven wrong, or the tries run out
evidence         compares the files of a checkpoint with the table of their sizes and checksums
array_checksums  computes checksums of arrays on the devices that hold them
s3               lets Orbax write to `s3://`
"""
