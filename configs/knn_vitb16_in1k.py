"""Measure kNN accuracy of frozen features on ImageNet-1k's validation set, for a run's student or any
teacher.

    python -m dtm_jax.main --config=configs/knn_vitb16_in1k.py \\
        --config.teacher.path=RUN --workdir=gs://BUCKET/vitb16_knn

Hardware: one GPU or more; the bank of 3.9 GB is split over them. Time: not measured. Expect: not measured.

Another network: `--config.teacher.name=dinov2 --config.teacher.path=FOLDER_OR_REPOSITORY`. Its class token in
place of the mean of its patch tokens: `--config.evals.knn.features="('cls',)"`. For another labelled data set
see finetune_vitb16_in1k. One pass measures all four k.
"""

from configs import common
from configs.common import durations, placeholder


def get_config():
  config = common.evaluation_only("frozen", 1024)
  config.data = common.imagenet()
  config.teacher = common.frozen_run()
  config.evals = dict(
    knn=dict(
      **common.same_data(config.data),
      features=("features",),
      bank="train",
      queries=placeholder(str),  # default: the validation or test split of the data set
      k=(10, 20, 100, 200),
      temperature=0.07,
      resize=256,
      batch_size=1024,
      **durations("every"),
    ),
  )
  return config
