"""The site's settings: Markdown pages, the furo theme, and links into the repository.

`make docs` builds the site. A warning is an error there, so every link, anchor and table of contents is checked. Nothing is
loaded from a network when a page is viewed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

from changeover import __version__

project = "changeover"
version = release = __version__

extensions = ["myst_parser", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = True

# Headings down to the fourth level have anchors, by GitHub's rule: a link works there and here.
myst_heading_anchors = 4
# A block that names no language is shown as it is.
highlight_language = "text"

html_theme = "furo"
html_title = "changeover"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

REPOSITORY = Path(__file__).resolve().parents[1]


class RepositoryLinks(SphinxTransform):
    """Makes a link to a file of the repository outside `docs` a link to a copy of it in the site.

    A link to a folder gives the folder's README. Where there is nothing to link to, the warning of the parser remains.
    """

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Replace every reference that leaves `docs` and leads to a file."""
        pages = Path(self.env.srcdir)
        here = pages / Path(self.env.docname).parent
        for link in list(self.document.findall(addnodes.pending_xref)):
            # The parser names a Markdown file without its ending, as a page's name below `docs`.
            page = f"{link['reftarget']}.md" if link["refdomain"] == "doc" else link["reftarget"]
            path = Path(os.path.normpath((pages if link["refdomain"] == "doc" else here) / page))
            file = path / "README.md" if path.is_dir() else path
            if file.is_file() and file.is_relative_to(REPOSITORY) and not file.is_relative_to(pages):
                target = Path(os.path.relpath(file, here)).as_posix()
                copied = addnodes.download_reference("", "", *link.children, reftarget=target, refdoc=self.env.docname)
                link.replace_self(copied)


def setup(app: Sphinx) -> None:
    """Register what the site has beside its extensions."""
    app.add_transform(RepositoryLinks)
