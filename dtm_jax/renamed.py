"""Name the options of a config that have another name now."""

RENAMED = {"optim.frozen": "optim.fixed"}
"""The old key of each renamed option, and the new one. In a config the old key is an error that names the new
one. In the records of a run it counts as the new one."""
