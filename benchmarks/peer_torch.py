"""Do the work of a train step in plain PyTorch, for `benchmarks.peer`: teacher, student, loss and update.

CLIP and BEiT are modules of transformers with random weights. The merging follows the paper's equations.
PyTorch needs no fixed shapes, so the tensors shrink from round to round. The whole batch shares one schedule,
so that all its images shrink alike.

On a GPU it is the plain PyTorch that a good engineer would write: bf16 autocast, TF32 for what stays float32,
`torch.compile` for teacher, student and augmentation, channels-last images, SDPA, and a fused optimiser.
Matching is not compiled, because its shapes change with every schedule.
"""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
  BeitConfig,
  BeitModel,
  CLIPVisionConfig,
  CLIPVisionModelWithProjection,
)

from dtm_jax.normalizations import NORMALIZATIONS

NO_DECAY = ("bias", "cls_token", "lambda_1", "lambda_2")


def draw_schedule(rng: np.random.Generator, num_tokens: int, max_rounds: int) -> list[int]:
  """Draw n̄ and k, and return the paper's r_1..r_k."""
  merged = num_tokens - int(rng.integers(1, num_tokens + 1))
  rounds = int(rng.integers(1, max_rounds + 1))
  each = merged // rounds
  return [each] * (rounds - 1) + [merged - (rounds - 1) * each]


def merge(target_BNC: torch.Tensor, merges: list[int], *, shuffle: bool = True) -> tuple[torch.Tensor, int]:
  """Merge tokens in rounds, and return the group of each token [B, N] and the number of groups.

  Args:
    merges: the number of merges in each round.
  """
  batch_size, num_tokens, width = target_BNC.shape
  sums = target_BNC.float()  # the sum of each group; it points in the same direction as the mean
  place = torch.arange(num_tokens, device=sums.device).expand(batch_size, -1)
  for count in merges:
    live = sums.shape[1]
    count = min(count, live // 2)
    if count == 0:
      continue
    order = torch.arange(live, device=sums.device).expand(batch_size, -1)
    if shuffle:
      order = torch.rand(batch_size, live, device=sums.device).argsort(dim=1)
    first, second = order[:, 0::2], order[:, 1::2]
    unit = F.normalize(sums, dim=2)
    rows = lambda x, index: x.gather(1, index[:, :, None].expand(-1, -1, width))
    best, counterpart = (rows(unit, first) @ rows(unit, second).transpose(1, 2)).max(dim=2)
    ranked = best.argsort(dim=1, descending=True, stable=True)
    going, staying = ranked[:, :count], ranked[:, count:]
    left = staying.shape[1]

    where = torch.empty_like(order)
    kept, moved = first.gather(1, staying), first.gather(1, going)
    where.scatter_(1, kept, torch.arange(left, device=sums.device).expand(batch_size, -1))
    seconds = left + torch.arange(second.shape[1], device=sums.device)
    where.scatter_(1, second, seconds.expand(batch_size, -1))
    where.scatter_(1, moved, left + counterpart.gather(1, going))
    shrunk = torch.zeros(batch_size, live - count, width, device=sums.device)
    sums = shrunk.scatter_add_(1, where[:, :, None].expand(-1, -1, width), sums)
    place = where.gather(1, place)
  return place, sums.shape[1]


def group_means(tokens_BNC: torch.Tensor, place_BN: torch.Tensor, groups: int) -> tuple[torch.Tensor, ...]:
  """Return the mean [B, n̄, C] and the size [B, n̄] of every group."""
  batch_size, _, width = tokens_BNC.shape
  size = torch.zeros(batch_size, groups, device=tokens_BNC.device)
  size = size.scatter_add(1, place_BN, torch.ones_like(place_BN, dtype=size.dtype))
  sums = torch.zeros(batch_size, groups, width, device=tokens_BNC.device)
  sums = sums.scatter_add(1, place_BN[:, :, None].expand(-1, -1, width), tokens_BNC.float())
  return sums / size[:, :, None], size


def morphed_loss(student_BNC, target_BNC, place_BN, groups: int) -> torch.Tensor:
  """Return (1/N) Σ_i w_i d(û_i, v̂_i), averaged over images. d is the smooth L1 distance with β = 2."""
  student, size = group_means(student_BNC, place_BN, groups)
  target, _ = group_means(target_BNC, place_BN, groups)
  distance = F.smooth_l1_loss(student, target, beta=2.0, reduction="none").mean(dim=2)
  return ((size * distance).sum(dim=1) / place_BN.shape[1]).mean()


class Student(torch.nn.Module):
  """A BEiT with mask token, relative position biases, final norm and head."""

  def __init__(self, options, image_size: int, out_dim: int):
    super().__init__()
    config = BeitConfig(
      hidden_size=options.width, num_hidden_layers=options.depth, num_attention_heads=options.num_heads,
      intermediate_size=round(options.mlp_ratio * options.width), image_size=image_size,
      patch_size=options.patch_size, use_mask_token=True, use_relative_position_bias=options.rel_pos_bias,
      use_shared_relative_position_bias=options.shared_rel_pos_bias,
      layer_scale_init_value=options.layer_scale_init, drop_path_rate=options.drop_path,
      hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
      layer_norm_eps=1e-6,
    )  # fmt: skip
    self.trunk = BeitModel(config, add_pooling_layer=False)
    self.norm = torch.nn.LayerNorm(options.width, eps=1e-6)
    self.head = torch.nn.Linear(options.width, out_dim)

  def forward(self, image, mask):
    tokens = self.trunk(pixel_values=image, bool_masked_pos=mask).last_hidden_state
    return self.head(self.norm(tokens[:, 1:]))


class Step:
  """Runs the train step of the config on one fixed batch. Each call makes one update and returns the loss."""

  def __init__(self, config, student, clip, *, device: str, seed: int = 0):
    torch.manual_seed(seed)
    self.rng, self.device, self.config = np.random.default_rng(seed), device, config
    size = config.data.image_size
    image = clip.image
    vision = CLIPVisionConfig(
      hidden_size=image.tower.width, num_hidden_layers=image.tower.depth,
      num_attention_heads=image.tower.num_heads, intermediate_size=image.tower.mlp_width,
      image_size=image.image_size, patch_size=image.patch_size, projection_dim=clip.embed_dim,
      hidden_act=image.tower.activation, attn_implementation="sdpa",
    )  # fmt: skip
    self.teacher = CLIPVisionModelWithProjection(vision).to(device).eval().requires_grad_(False)
    self.student = Student(student, size, clip.embed_dim).to(device).train()
    self.forward, self.target, self.augment = self.student, self._target, augment
    if device == "cuda":
      torch.set_float32_matmul_precision("high")
      torch.backends.cudnn.allow_tf32 = True
      self.student.to(memory_format=torch.channels_last)
      self.teacher.to(memory_format=torch.channels_last)
      self.forward, self.target, self.augment = map(torch.compile, (self.student, self._target, augment))
    decayed = lambda name, p: p.ndim > 1 and not name.endswith(NO_DECAY)
    named = list(self.student.named_parameters())
    self.optimizer = torch.optim.AdamW(
      [
        {"params": [p for n, p in named if decayed(n, p)], "weight_decay": config.optim.weight_decay},
        {"params": [p for n, p in named if not decayed(n, p)], "weight_decay": 0.0},
      ],
      lr=1e-4, betas=tuple(config.optim.betas), fused=True,
    )  # fmt: skip
    self.grid = size // student.patch_size
    shape = (config.batch_size, 3, size, size)
    self.image = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    if device == "cuda":
      self.image = self.image.to(memory_format=torch.channels_last)
    self.statistics = [self._statistics(name) for name in ("clip", "imagenet")]

  def _statistics(self, name: str):
    return [torch.tensor(each, device=self.device)[None, :, None, None] for each in NORMALIZATIONS[name]]

  def __call__(self) -> float:
    num_tokens, config = self.grid**2, self.config
    half = torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else contextlib.nullcontext()
    image = self.augment(self.image, config.augment.color_jitter)
    for_teacher, for_student = ((image - mean) / std for mean, std in self.statistics)
    noise = torch.rand(len(image), num_tokens, device=self.device)
    masked = config.mask.num_masked or round(config.mask.share * num_tokens)
    mask = noise.argsort(dim=1) < masked
    with half:
      with torch.no_grad():
        target = self.target(for_teacher).float()
        morpher = next(iter(config.morphers.values()))
        schedules = [
          draw_schedule(self.rng, num_tokens, morpher.max_rounds) for _ in range(config.loss.schedules)
        ]
        groups = [merge(target, merges, shuffle=morpher.split == "random") for merges in schedules]
      prediction = self.forward(for_student, mask).float()
    loss = sum(morphed_loss(prediction, target, *each) for each in groups) / len(groups)
    self.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.student.parameters(), config.optim.clip_norm)
    self.optimizer.step()
    return loss.item()  # waits for the device

  def _target(self, image):
    """Return the projected patch tokens."""
    model = self.teacher.vision_model
    tokens = model(pixel_values=image).last_hidden_state[:, 1:]
    return self.teacher.visual_projection(model.post_layernorm(tokens))


def augment(image: torch.Tensor, strength: float) -> torch.Tensor:
  """Return images in [0, 1] with random brightness, contrast, saturation and flip for each image."""
  image = image.float() / 255
  factor = lambda: 1 + strength * (2 * torch.rand(len(image), 1, 1, 1, device=image.device) - 1)
  weights = torch.tensor((0.299, 0.587, 0.114), device=image.device)[None, :, None, None]
  if strength:
    image = (factor() * image).clamp(0, 1)
    grey = (image * weights).sum(dim=1, keepdim=True)
    image = torch.lerp(grey.mean(dim=(2, 3), keepdim=True), image, factor()).clamp(0, 1)
    grey = (image * weights).sum(dim=1, keepdim=True)
    image = torch.lerp(grey, image, factor()).clamp(0, 1)
  flip = torch.rand(len(image), 1, 1, 1, device=image.device) < 0.5
  return torch.where(flip, image.flip(3), image)
