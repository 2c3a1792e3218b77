"""Save, verify and restore a run. Only this package imports Orbax.

manager          `Checkpoints`: the checkpoints of one run
saving           background saves, and the second try of a save that failed
contents         what one checkpoint holds; `load_params` reads its parameters alone
retries          repeats a read until it succeeds, or the bytes are proven wrong, or it is given up
evidence         compares the files of a checkpoint with the table of their sizes and checksums
array_checksums  checksums of arrays, computed where the arrays are
s3               lets Orbax write on `s3://`
"""
