"""Draw groups and classes of patches, similarities, rounds of matching and curves, as figures of matplotlib.

    figure = draw_groups(image, label)      # a photo beside its groups of patches
    figure.savefig("groups.png")            # or .svg, or .pdf
    text = to_svg(figure)                   # to place inside an HTML page

In a notebook, a figure at the end of a cell is shown. The figures have small text, thin lines and colours
that differ in grey, too, so that they can be read in print. matplotlib is imported when the first figure is
made: `pip install "dtm_jax[studies]"`.
"""

from dtm_jax.pictures.classes import draw_token_classes
from dtm_jax.pictures.curves import draw_curves
from dtm_jax.pictures.groups import draw_groups, draw_rounds, group_tokens, label_after_rounds
from dtm_jax.pictures.photos import read_photo
from dtm_jax.pictures.sheet import to_svg
from dtm_jax.pictures.similarity import cosine_to, draw_similarity

__all__ = [
  "cosine_to",
  "draw_curves",
  "draw_groups",
  "draw_rounds",
  "draw_similarity",
  "draw_token_classes",
  "group_tokens",
  "label_after_rounds",
  "read_photo",
  "to_svg",
]
