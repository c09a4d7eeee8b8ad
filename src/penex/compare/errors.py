"""The one error of the comparison that is meant for the person at the keyboard."""

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
