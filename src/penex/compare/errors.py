"""The one error of the comparison that is meant for the person at the keyboard."""


class CompareError(ValueError):
    """Input, configuration or output folder that the comparison refuses.

    The message is complete on its own: what was expected, what came, and where it helps what to
    do. The command line prints it without a traceback.
    """
