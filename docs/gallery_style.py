"""The look of the pictures in the gallery, which sphinx-gallery asks for by name (conf.py)."""

from typing import Any

import matplotlib.style
from cycler import cycler

from penex.compare.analysis.plots import COLOURS, STYLE


def use_style(gallery_conf: dict[str, Any], name: str) -> None:
    """Give the script that runs next the style of the other pictures here."""
    del gallery_conf, name
    matplotlib.style.use([*STYLE, {"axes.prop_cycle": cycler(color=COLOURS)}])
