"""Sphinx configuration."""

import sys
from pathlib import Path
from typing import NewType

import numpy.typing

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
    "sphinx-mathjax-offline",  # formulas without a network
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "results"]

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
html_css_files = ["custom.css", "gallery.css"]
html_sidebars = {page: [] for page in ("index", "start", "api")}  # without pages beside them
html_theme_options = {
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
}
