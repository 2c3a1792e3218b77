"""Before JAX starts: the CPU as eight devices. Then: full precision and no silent broadcasting."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices on busy cores may wait for one another longer than the 40 s after which XLA aborts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
  " --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
  # Most of a test's time is compilation, and half of that the optimisation of programs that run once.
  " --xla_backend_optimization_level=0"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One cache of compiled programs for the session, of all its processes, subprocesses included: a dozen tests
# compile the same. It is new each time: what a test sees must not hang on what the user's cache holds.
if "PYTEST_XDIST_WORKER" not in os.environ:
  cache = tempfile.TemporaryDirectory(prefix="dtm_jax_tests_", ignore_cleanup_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
