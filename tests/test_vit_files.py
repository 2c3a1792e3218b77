"""Students from single files: checkpoints of PyTorch trainings, as the authors and BEiT v2 publish them."""

import numpy as np
import pytest
from test_vit_weights import assert_same, random_params, student

from dtm_jax.models.vit import weights as vit_weights


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_loads_a_checkpoint_of_the_authors(tmp_path, suffix):
  torch = pytest.importorskip("torch")
  params = random_params(student())
  tensors = {name: torch.from_numpy(np.array(t)) for name, t in vit_weights.to_authors(params).items()}
  file = tmp_path / f"checkpoint{suffix}"
  torch.save({"model": tensors, "optimizer": {"state": {}}, "epoch": 3}, file)
  assert_same(vit_weights.load(file), params)
