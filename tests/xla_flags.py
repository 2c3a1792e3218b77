"""The XLA flags of the tests. Most of a test's time is compilation, so these flags make it short."""

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
"""No optimisation of programs that run once, and XLA's older code generator.

Without the optimisation, the train step of the debug config compiles in half the time. The older generator
halves that again: 4.5 CPU seconds in place of 8.8.
"""

SHIPPED_GENERATOR: dict[str, bool | str] = {"xla_cpu_use_fusion_emitters": True}
"""The compiler options with the code generator of real runs.

Two programs that contain the same computation give the same bits with it. With the older one the last bit
depends on the computations beside it. Tests that compare two such programs to the bit need these options.
"""
