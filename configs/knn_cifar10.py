"""Measure kNN accuracy of the quickstart's student on CIFAR-10: 10,000 test images, all 50,000 training
images.

    python -m dtm_jax.main --config=configs/knn_cifar10.py --workdir=runs/knn_cifar10

Hardware: two CPU cores. Time: not measured.
Expect: not measured for the student. The projected tokens of its teacher
(`--config.teacher.name=clip --config.teacher.path=assets/tiny_clip_cifar10`) reach 63.4, 64.6 and 63.9 % with
10, 20 and 200 neighbours. Source: our own run.
"""

from configs import knn_vitb16_in1k


def get_config():
  config = knn_vitb16_in1k.get_config()
  config.data.dataset.name = "cifar10"
  config.data.image_size = 32
  config.data.num_threads = 2
  config.teacher.path = "runs/quickstart"
  config.evals.knn.update(k=(10, 20, 200), resize=32, batch_size=512)
  return config
