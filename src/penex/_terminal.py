"""What is printed to a terminal: text from data and folders cannot control it."""

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_CONTROL = re.compile(
    # C0 and C1 (escape sequences, bell, line breaks), marks and overrides of the text's direction,
    # invisible characters, separators, halves of characters.
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def printable(text: str, keep: str = "") -> str:
    r"""Text with control characters as Python writes them.

    Args:
        text: Perhaps with names from data.
        keep: Control characters that stay.

    >>> print(printable("red \x1b[31m\n"))
    red \x1b[31m\n
    """
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


class Terminal(Console):
    """A console that prints control characters as text: its own styles remain."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """As in Rich. A text is one line, whatever names are in it."""
        lines = (printable(each) if isinstance(each, str) else each for each in objects)
        super().print(*lines, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As in Rich, which renders all that it prints with this method, cells of tables too."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, keep="\n"), style, control)
