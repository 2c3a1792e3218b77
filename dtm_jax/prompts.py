"""Sets of caption templates, for zero-shot classification and for captions made of class names."""

TEMPLATES = {
  # The 18 templates that OpenAI's CLIP (MIT licence) uses for CIFAR-10, by way of clip-benchmark 1.6.2 (MIT).
  "cifar10": tuple(
    template.format(article=article, c="{c}")
    for article in ("a", "the")
    for template in (
      "a photo of {article} {c}.",
      "a blurry photo of {article} {c}.",
      "a black and white photo of {article} {c}.",
      "a low contrast photo of {article} {c}.",
      "a high contrast photo of {article} {c}.",
      "a bad photo of {article} {c}.",
      "a good photo of {article} {c}.",
      "a photo of {article} small {c}.",
      "a photo of {article} big {c}.",
    )
  ),
}


def captions(class_names: tuple[str, ...] | None, templates: str) -> list[list[str]]:
  """Every template with every class name: G lists of P captions.

  Raises:
    ValueError: the set of templates is unknown, or the data set has no class names.
  """
  if templates not in TEMPLATES:
    raise ValueError(f"Unknown templates {templates!r}. Available: {', '.join(TEMPLATES)}.")
  if not class_names:
    raise ValueError("Captions need class names, and this data set has none.")
  return [[template.format(c=name) for template in TEMPLATES[templates]] for name in class_names]
