"""Open the HTML pages in a headless Chromium: no script error, nothing wider than the screen, a picture.

The browser is on the PATH, or DTM_JAX_BROWSER names its program.
"""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import small_runs
from PIL import Image

from dtm_jax import report

ROOT = Path(__file__).parents[1]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("DTM_JAX_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
WIDTHS = (1280, 420)
PROBE = """<script>
window.problems = [];
addEventListener("error", event => problems.push(String(event.message)));
addEventListener("securitypolicyviolation", event => problems.push("blocked: " + event.violatedDirective));
addEventListener("load", () => {
  const plot = document.querySelector("svg.plot[data-series]"), box = plot?.getBoundingClientRect();
  plot?.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top}));
  const all = [...document.body.querySelectorAll("*")], scrolling = ".scroll, .box";
  const inside = each => each.closest(`${scrolling}, .plot, .strip`);
  const screen = document.documentElement.clientWidth;
  const wide = all.filter(each => !inside(each) && each.getBoundingClientRect().right > screen + 1);
  const cut = all.filter(each => each.matches(scrolling) && each.scrollWidth > each.clientWidth + 1);
  const found = {
    problems, screen, page: document.documentElement.scrollWidth, cut: cut.length,
    wide: wide.slice(0, 5).map(each => `${each.tagName}.${each.className}`),
    tip: document.querySelector(".tip")?.innerText,
  };
  const out = document.createElement("pre"); out.id = "probe"; out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>"""

FRAME = """<!DOCTYPE html><title>frame</title>
<iframe srcdoc="{page}" style="border:0;width:{width}px;height:900px"></iframe>
<script>addEventListener("load", () => document.body.append(
  document.adoptNode(document.querySelector("iframe").contentDocument.querySelector("#probe"))));</script>"""
"""A window has at least 500 pixels across, but a frame of it may be narrower."""

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    BROWSER is None, reason="no browser: install chromium, or name a program in DTM_JAX_BROWSER"
  ),
]


def browse(folder: Path, page: Path, width: int, *options: str, height: int = 900) -> str:
  """Run the browser once on a page and return what it prints."""
  command = [
    BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
    f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}", *options, page.as_uri(),
  ]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True, timeout=180)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  """Return the pages to open, by name."""
  folder = tmp_path_factory.mktemp("pages")
  runs = [small_runs.write(folder / name) for name in ("a", "b" * 60)]
  (folder / "report.html").write_text(report.make_page(runs[:1]))
  (folder / "compare.html").write_text(report.make_page(runs))
  shutil.copy(ROOT / "results" / "consistency" / "cifar10.html", folder / "consistency.html")
  return folder


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "compare", "consistency"])
def test_a_page_fits_the_screen_without_errors(pages, name, width):
  probed = (pages / f"{name}.html").read_text().replace("</title>", f"</title>{PROBE}", 1)
  framed = pages / f"{name}_{width}.html"
  framed.write_text(FRAME.format(width=width, page=html.escape(probed)))
  dom = browse(pages, framed, 1400, "--dump-dom")
  found = json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', dom, re.S)[1]))
  assert found["problems"] == []
  assert found["screen"] == width
  assert found["page"] <= width, json.dumps(found)
  assert found["wide"] == []
  assert found["cut"] == 0, "a table is cut off and has to be scrolled"
  if name != "consistency":
    assert found["tip"].startswith("step "), found


@pytest.mark.parametrize("width", WIDTHS)
def test_a_screenshot_shows_the_page(pages, width):
  picture = pages / f"{width}.png"
  browse(pages, pages / "report.html", width, f"--screenshot={picture}", height=2000)
  pixels = np.asarray(Image.open(picture).convert("RGB"))
  assert pixels.shape == (2000, width, 3)
  for band in np.split(pixels, 4):  # no part of the page is empty
    assert len(np.unique(band.reshape(-1, 3), axis=0)) > 20
