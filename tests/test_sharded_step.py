"""The jitted, sharded step runs without the loop, CLU and TensorFlow."""

import without_clu

STEPS = """
import jax
import numpy as np
from configs import linear_probe_cifar10
from dtm_jax import plugins
from dtm_jax.tasks import Run
from dtm_jax.training import mesh as meshes
from dtm_jax.training import sharded_step

for name in plugins.available("tasks"):
  plugins.load("tasks", name)
config = linear_probe_cifar10.get_config()
config.teacher = {"name": "clip", "path": sys.argv[1]}
task = plugins.load("tasks", config.task).build(config, Run(10, 5.0, 16, tuple("abcdefghij")))
mesh = meshes.make_mesh(data=4, fsdp=2)
state = sharded_step.init_state(task, jax.random.key(0), mesh, config.mesh.rules)
frozen = sharded_step.place_frozen(task, mesh, config.mesh.rules)
step = sharded_step.jit_train_step(task, state, frozen, mesh)
batch = {"image": np.zeros((16, 32, 32, 3), np.uint8), "label": np.zeros(16, np.int32)}
batch = meshes.to_device(batch, mesh)
for seed in range(2):
  state, measurements = step(state, frozen, batch, jax.random.key(seed))
assert step._cache_size() == 1, "the key is a constant of the step"
assert np.isfinite(measurements["loss"])
print("steps:", state["step"])
"""


def test_a_sharded_step_runs_without_clu_and_tensorflow(world):
  """It imports every task. The linear probe takes two steps on 4 x 2 devices: two seeds, one program."""
  assert without_clu.run(STEPS, str(world / "clip")) == "steps: 2\n"
