"""Before JAX starts: the CPU as eight devices. Then: full precision and no silent broadcasting."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices on busy cores may wait for one another longer than the 40 s after which XLA aborts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
  " --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
  # Most of a test's time is compilation, and half of that the optimisation of programs that run once.
  " --xla_backend_optimization_level=0"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What a test sees must not hang on what the user's cache holds; subprocesses inherit this.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
