"""Imports for the process from which warm runs are forked. No device is touched, so forking is safe."""

import tensorflow  # noqa: F401

import dtm_jax.loop  # noqa: F401
