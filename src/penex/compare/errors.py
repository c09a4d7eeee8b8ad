"""The one error of the comparison that is meant for the person at the keyboard."""

import difflib
from collections.abc import Iterable

IN_FILES_ONLY = ("lr_of", "model_options")
"""Settings for which the command has no option."""


class CompareError(ValueError):
    """Input, configuration or output folder that the comparison refuses.

    The message is complete on its own: what was expected, what came, and where it helps what to
    do. The command line prints it without a traceback.
    """


def named(setting: str) -> str:
    """A setting as files and Python spell it, and as the command does where that differs.

    >>> named("train_size")
    'train_size (--train-size)'
    >>> named("epochs")
    'epochs'
    """
    if "_" not in setting or setting in IN_FILES_ONLY:
        return setting
    return f"{setting} (--{setting.replace('_', '-')})"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence with the nearest names, case aside, or nothing."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=3)
    return f" Did you mean {' or '.join(repr(by_lower[name]) for name in near)}?" if near else ""
