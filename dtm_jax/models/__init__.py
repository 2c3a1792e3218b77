"""Flax Linen models. Parameters are plain nested dicts; those of a tower's L blocks are stacked [L, ...].

Functions have the same names in all families: `read` returns the content of a file, `load` finds weights and
returns our parameters, `save` writes them as files, `from_NAME` and `to_NAME` convert names and axes.
"""
