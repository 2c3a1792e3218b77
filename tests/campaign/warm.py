"""Imports for the process from which warm runs are forked. No device is touched, so forking is safe."""

import gc

import clu.metric_writers  # noqa: F401
import tensorflow  # noqa: F401

import dtm_jax.loop  # noqa: F401

gc.freeze()  # the forked processes share these objects; garbage collection would visit and copy them
