"""Sphinx configuration."""

import html
import re
import sys
import zlib
from pathlib import Path
from typing import Any, NewType

import numpy.typing
from docutils import nodes
from sphinx import addnodes

import penex

sys.path.insert(0, str(Path(__file__).parent))  # for gallery_style

# In signatures by its name, and not as the long union that it is.
numpy.typing.ArrayLike = NewType("ArrayLike", object)
numpy.typing.ArrayLike.__module__ = "numpy.typing"

project = "penex"
author = "The penex authors"
copyright = "2026, the penex authors"
release = version = penex.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx-mathjax-offline",  # formulas without a network
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "results", "inventories"]
suppress_warnings = ["myst.xref_missing"]  # anchors of names; check_site.py checks all links

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"/plot_",  # these are executed; tests/test_examples.py runs the others
    "abort_on_example_error": True,
    "subsection_order": ["../examples/tutorials", "../examples/integrations"],
    "within_subsection_order": "ExampleTitleSortKey",
    "reset_modules": ("matplotlib", "gallery_style.use_style"),
    "capture_repr": (),  # a script shows what it prints and draws
    "image_srcset": ["2x"],
    "min_reported_time": 1,
    "remove_config_comments": True,
    "write_computation_times": False,
}

html_theme = "pydata_sphinx_theme"
html_title = "penex"
html_show_sourcelink = False
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["custom.css", "gallery.css"]
html_sidebars = {page: [] for page in ("index", "start")}  # without pages beside them
html_theme_options = {
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
}

SITES = {
    "torch": "https://docs.pytorch.org/docs/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "sklearn": "https://scikit-learn.org/stable/",
}


def inventory(name: str) -> str:
    """Path of an inventory with the names used here, so that the build needs no network."""
    lines = (Path(__file__).parent / "inventories" / f"{name}.txt").read_bytes()
    header = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n"
    header += "# The remainder of this file is compressed using zlib.\n"
    file = Path(__file__).parent / "_build" / "inventories" / f"{name}.inv"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(header.encode() + zlib.compress(lines))
    return str(file)


intersphinx_mapping = {name: (address, inventory(name)) for name, address in SITES.items()}

ROOT_FILES = {"changelog": "CHANGELOG", "contributing": "CONTRIBUTING", "security": "SECURITY"}


def read_source(app: Any, page: str, source: list[str]) -> None:
    """Show files of the root on the site, and links to scripts as links to the gallery."""
    if page in ROOT_FILES:
        source[0] = (Path(app.srcdir).parent / f"{ROOT_FILES[page]}.md").read_text("utf-8")
        for name, file in ROOT_FILES.items():
            source[0] = source[0].replace(f"]({file}.md", f"]({name}.md")
    source[0] = re.sub(r"\]\(\.\./examples/(.+?)\.py\)", r"](auto_examples/\1.rst)", source[0])
    source[0] = source[0].replace("](../examples/)", "](auto_examples/index.rst)")


def add_description(
    app: Any, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """A description for search engines, the first paragraph; on the start page also its script."""
    if page == "index":
        app.add_js_file("playground.js")
    for paragraph in doctree.findall(nodes.paragraph) if doctree else ():
        text = html.escape(" ".join(paragraph.astext().split())[:300])
        context["metatags"] += f'<meta name="description" content="{text}">\n'
        return


def add_short_anchors(app: Any, doctree: nodes.document) -> None:
    """Anchors such as penex.FocalLoss too, to which pages with the source code link."""
    for signature in doctree.findall(addnodes.desc_signature):
        if signature.get("module", "").startswith("penex"):
            anchor = f"penex.{signature['fullname']}"
            if anchor not in doctree.ids:
                doctree.ids[anchor] = signature
                signature["ids"].append(anchor)


def describe_thumbnails(app: Any, doctree: nodes.document, page: str) -> None:
    """The title of an example as the alternative text of its thumbnail."""
    titles = {name.rpartition("/")[2]: title for name, title in app.env.titles.items()}
    for image in doctree.findall(nodes.image):
        found = re.search(r"sphx_glr_(\w+)_thumb", image["uri"])
        if found and found[1] in titles:
            image["alt"] = titles[found[1]].astext()


def setup(app: Any) -> None:
    app.connect("doctree-read", add_short_anchors)
    app.connect("doctree-resolved", describe_thumbnails)
    app.connect("source-read", read_source)
    app.connect("html-page-context", add_description)
