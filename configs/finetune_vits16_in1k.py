"""Fine-tune a pre-trained ViT-S/16 on ImageNet-1k: `finetune_vitb16_in1k` with the small model.

    python -m dtm_jax.main --config=configs/finetune_vits16_in1k.py \\
        --config.init_from.path=RUN_OR_WEIGHTS --workdir=gs://BUCKET/vits16_finetuned

Hardware: not chosen. Hours: not measured. Expect: not measured.
The durations and the layer decay are those of ViT-B.
"""

from configs import finetune_vitb16_in1k


def get_config():
  config = finetune_vitb16_in1k.get_config()
  config.model.variant = "S"
  return config
