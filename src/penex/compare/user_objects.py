"""Losses and networks of the user's own, by the name that configurations have for them.

A name is ``module:attribute``. What was given in Python is found under it in this process and in
its workers; anything else is imported, and only by :func:`find`.
"""

import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from penex.compare.errors import CompareError

NAME = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")
_given: dict[str, Any] = {}


def register(thing: Any, name: str | None = None) -> str:
    """The name of an object, under which it is found from now on, in place of an earlier one.

    Args:
        thing: A function, a class, or an instance, which goes by the name of its class.
        name: Another.
    """
    if name is not None:
        _given[name] = thing
        return name
    owner = thing if hasattr(thing, "__qualname__") else type(thing)
    attribute = owner.__qualname__.rpartition(".")[2].strip("<>")  # a lambda is no attribute
    name = f"{owner.__module__}:{attribute}"
    _given[name] = thing
    return name


def registered(name: str) -> Any:
    """What was given in Python under a name; None if nothing was."""
    return _given.get(name)


def find(name: str, setting: str) -> Any:
    """What was given in Python under a name, or else what importing it finds.

    The working directory is searched too.

    Args:
        name: As in ``module:attribute``.
        setting: For messages.

    Raises:
        CompareError: There is no such module or attribute.
    """
    if name in _given:
        return _given[name]
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # noqa: PTH109  # sys.path holds strings
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise CompareError(f"{setting}: cannot import {module} for {name}: {error}") from error
    except AttributeError:
        raise CompareError(f"{setting}: {module} has no {attribute}, asked for by {name}") from None


def admit(name: str, setting: str) -> None:
    """Let a name be found by :func:`registered`; see :func:`find`."""
    _given[name] = find(name, setting)


def carrying(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same work for another process, where the objects of this one are found too."""
    return functools.partial(_with_objects, dict(_given), work) if _given else work


def _with_objects(given: Mapping[str, Any], work: Callable[..., Any], *arguments: Any) -> Any:
    _given.update(given)
    return work(*arguments)
