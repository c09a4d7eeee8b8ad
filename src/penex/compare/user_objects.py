"""Losses and networks defined by the user, under the names that configurations give them.

A name is ``module:attribute``. An object that was passed in Python, or imported because the user
named it, is found under its name in this process and in its workers. Nothing else is imported: a
configuration that was received from someone else runs no code.
"""

import functools
import importlib
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from penex.compare.errors import CompareError

OBJECT_NAME = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")
_objects: dict[str, Any] = {}


def register(thing: Any, name: str | None = None) -> str:
    """Make an object known under a name, in place of an earlier one of that name.

    Args:
        thing: A function, a class, or an instance, which is named after its class.
        name: Default: ``module:attribute`` of `thing`.

    Returns:
        The name.
    """
    if name is None:
        owner = thing if hasattr(thing, "__qualname__") else type(thing)
        attribute = owner.__qualname__.rpartition(".")[2].strip("<>")  # a lambda is no attribute
        name = f"{owner.__module__}:{attribute}"
    _objects[name] = thing
    return name


def registered(name: str) -> Any:
    """The object known under a name, or None."""
    return _objects.get(name)


def import_object(name: str, setting: str) -> None:
    """Import what a name says, unless it is known. The working directory is searched too.

    Args:
        name: ``module:attribute``, from the user.
        setting: The setting that has it, for messages.

    Raises:
        CompareError: There is no such module or attribute.
    """
    if name in _objects:
        return
    module, _, attribute = name.partition(":")
    _search(os.getcwd())  # noqa: PTH109  # sys.path holds strings
    try:
        _objects[name] = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise CompareError(f"{setting}: cannot import {module} for {name}: {error}") from error
    except AttributeError:
        raise CompareError(f"{setting}: {module} has no attribute {attribute} ({name})") from None


def require_object(name: str, setting: str) -> Any:
    """The object known under a name.

    Raises:
        CompareError: There is none.
    """
    if name not in _objects:
        raise CompareError(
            f"{setting}: {name} is user-defined, and its code has not been imported here; pass it "
            "again, or trust this folder (--trust)"
        )
    return _objects[name]


def with_user_objects(work: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """The same work for another process, in which the objects of these names are known too."""
    objects = {name: _objects[name] for name in names}
    if not objects:
        return work
    import cloudpickle  # not for every command

    # Unpickled only once the modules that they are from can be found.
    return functools.partial(_with_objects, list(sys.path), cloudpickle.dumps(objects), work)


def _with_objects(
    paths: list[str], objects: bytes, work: Callable[..., Any], *arguments: Any
) -> Any:
    for path in paths:
        _search(path)
    _objects.update(pickle.loads(objects))  # noqa: S301  # from our own parent process
    return work(*arguments)


def _search(path: str) -> None:
    if path not in sys.path:
        sys.path.append(path)
