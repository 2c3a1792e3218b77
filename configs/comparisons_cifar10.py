"""One run of the paper's comparisons on CIFAR-10, small enough that two CPU cores make dozens of them.

    bash scripts/comparisons.sh a        or a single run:
    python -m dtm_jax.main --config=configs/comparisons_cifar10.py

200 steps of 64 images and a student of width 64: a sixth of the quickstart's work. kNN and the linear probe
see 5,000 training and the first 5,000 test images. Three to four minutes on two cores; what to expect is in
results/cifar10_a/table.md.
"""

from configs import durations, quickstart


def get_config():
  config = quickstart.get_config()
  config.batch_size = 64
  config.total_steps = 200
  config.student.update(width=64, num_heads=2, unroll=4)
  config.optim.update(lr=2e-3, warmup_steps=20)
  dataset, image_size = config.data.dataset, config.data.image_size
  frozen = dict(dataset=dataset, features=("student",), image_size=image_size, **durations("every"))
  config.evals = dict(
    knn=dict(**frozen, bank="train[:5000]", queries="test[:5000]", k=20, temperature=0.07),
    linear=dict(**frozen, fit="train[:5000]", held_out="train[5000:6000]", split="test[:5000]"),
  )
  return config
