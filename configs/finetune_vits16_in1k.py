"""Fine-tuning of a pre-trained ViT-S/16 on ImageNet-1k: `finetune_vitb16_in1k` with the small model.

    python -m dtm_jax.main --config=configs/finetune_vits16_in1k.py \\
        --config.init_from.path=RUN_OR_WEIGHTS --workdir=gs://BUCKET/vits16_finetuned

Not yet run at full size: no hours and no accuracy of ours. Durations and layer decay are those of B.
"""

from configs import finetune_vitb16_in1k


def get_config():
  config = finetune_vitb16_in1k.get_config()
  config.model.variant = "S"
  return config
