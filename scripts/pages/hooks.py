"""Prepare the pages of the documentation site. mkdocs calls these functions (`hooks` in mkdocs.yml).

Some pages and pictures are outside docs/, such as results/step.md. The site has them at the same places below
its root. So a link to `../results/step.md` works on the site, and also if docs/ is read as files.
"""

import importlib
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

configuration = importlib.import_module(
  "scripts.pages.configuration"
)  # mkdocs runs in the folder of the code
SEARCH_SCRIPT = "https://unpkg.com/iframe-worker/shim"
OUTSIDE = ("CHANGELOG.md", "assets/*.png", "results/**/*.md", "results/**/*.png", "results/**/*.html")
"""The files of the repository that the site has in addition to docs/."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Add the files outside docs/ to the site."""
  root = Path(config.config_file_path).parent
  for path in sorted({path for pattern in OUTSIDE for path in root.glob(pattern)}):
    name = path.relative_to(root).as_posix()
    files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
  return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
  """Point the links of a page at the places on the site, and fill in what is generated from the code."""
  if page.file.src_uri == "configuration.md":
    markdown = configuration.filled_in(markdown)
  return links_on_the_site(markdown, in_docs=page.file.src_dir == config.docs_dir)


def links_on_the_site(markdown: str, *, in_docs: bool) -> str:
  """Return the text of a page with links for the site, where docs/ is the root.

  Args:
    markdown: the text of the page.
    in_docs: whether the page stands in docs/ itself, one level below the root of the repository.
  """
  if in_docs:
    return re.sub(r"\]\(\.\./", "](", markdown)
  return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
  """Load the script for search in local files from the site, because the theme loads it from the network."""
  return output.replace(SEARCH_SCRIPT, get_relative_url("javascripts/iframe-worker.js", page.url))


def on_post_template(output: str, template_name: str, config: MkDocsConfig) -> str:
  """Do the same for pages without a source, such as 404.html."""
  return output.replace(SEARCH_SCRIPT, "javascripts/iframe-worker.js")
