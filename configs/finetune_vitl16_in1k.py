"""Fine-tune a pre-trained ViT-L/16 on ImageNet-1k: `finetune_vitb16_in1k` with the large model.

    python -m dtm_jax.main --config=configs/finetune_vitl16_in1k.py \\
        --config.init_from.path=RUN_OR_WEIGHTS --workdir=gs://BUCKET/vitl16_finetuned

Hardware: not chosen. Hours: not measured. Expect: not measured.
Sources: BEiT v2-L (arXiv 2208.06366) uses 50 epochs with 5 of warm-up, layer decay 0.8 and drop path 0.2.
"""

from configs import finetune_vitb16_in1k


def get_config():
  config = finetune_vitb16_in1k.get_config()
  config.model.update(variant="L", drop_path=0.2, layer_scale_init=1e-5)
  config.total_epochs = 50.0
  config.optim.update(warmup_epochs=5.0, layer_decay=0.8)
  return config
