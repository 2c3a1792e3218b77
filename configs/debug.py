"""Pre-train at toy size: the whole path of `quickstart` in seconds, for tests and a first look.

    python -m dtm_jax.main --config=configs/debug.py --config.teacher.path=FOLDER_OF_A_SMALL_CLIP

Hardware: any CPU. Time: seconds. Expect: no number, it only has to run.
"""

from configs import quickstart


def get_config():
  config = quickstart.get_config()
  config.total_steps = 6
  config.batch_size = 16
  config.student.update(width=32, depth=2, num_heads=2)
  config.optim.warmup_steps = 2
  config.checkpoint.save_steps = 3
  config.log.log_steps = 2
  config.evals.knn.update(max_bank=64, max_queries=32, batch_size=32, k=5, at_start=False)
  del config.evals.snapshots
  return config
