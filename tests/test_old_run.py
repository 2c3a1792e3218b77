"""A checkpoint from before version 1 restores to the bit.

tests/old_run was written on 27 November 2026 by commit 44605f6: two steps of the debug config with a student
of width 8 and depth 1. checksums.json has the CRC-32 of every array of its last state.
"""

import json
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import small_world

from dtm_jax.checkpoints.manager import Checkpoints
from dtm_jax.tasks import Run, pretrain
from dtm_jax.training import mesh as meshes
from dtm_jax.training import sharded_step

OLD_RUN = Path(__file__).parent / "old_run"


def test_the_checkpoint_of_an_old_run_restores_to_the_bit(tmp_path):
  shutil.copytree(OLD_RUN / "checkpoints", tmp_path / "checkpoints")
  small_world.write_clip(tmp_path / "clip")
  config = small_world.debug_config(tmp_path, batch_size=8)
  config.student.update(width=8, depth=1, num_heads=1)
  task = pretrain.build(config, Run(2, 10.0, 8))
  abstract = sharded_step.abstract_state(task, meshes.make_mesh(), config.mesh.rules)

  checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
  state, meta, step = checkpoints.restore(abstract)
  checkpoints.close()
  assert step == int(state["step"]) == 2
  assert meta == {"seed": 0, "batch_size": 8, "examples": 16, "first_batch_size": 8}
  leaves = jax.tree_util.tree_leaves_with_path(state)
  checksums = {
    jax.tree_util.keystr(path, simple=True, separator="/"): zlib.crc32(np.asarray(x).tobytes())
    for path, x in leaves
  }
  assert checksums == json.loads((OLD_RUN / "checksums.json").read_text())
