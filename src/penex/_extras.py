"""Optional dependencies: the error that says which extra to install."""

from importlib.util import find_spec


def need(what: str, extra: str, *packages: str) -> None:
    """Refuse to go on without `packages`.

    Raises:
        ImportError: One is missing; the message names the extra that brings it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ImportError(
                f"{what} needs the extra '{extra}' ({package} is missing): "
                f"pip install 'penex[{extra}]'",
                name=package,
            )
