"""Imported once by the process that warm runs are forked from. No device is touched, so forking is safe."""

import tensorflow  # noqa: F401

import dtm_jax.loop  # noqa: F401
