"""The options of a command, made from the fields of the settings that they set."""

import dataclasses
import inspect
import types
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from penex.compare.config import Config, Execution, Shown


def of_config(names: Collection[str] | None = None) -> Iterator[inspect.Parameter]:
    """A parameter for each field of :class:`Config` that has an option, or for those of `names`."""
    for name, field in Config.model_fields.items():
        extra: Any = field.json_schema_extra
        shown: Shown = extra["option"]
        if shown["panel"] is not None and (names is None or name in names):
            yield _parameter(name, field.annotation, shown)


def of_execution() -> Iterator[inspect.Parameter]:
    """A parameter for each field of :class:`Execution`."""
    for field in dataclasses.fields(Execution):
        shown: Any = dict(field.metadata)
        yield _parameter(field.name, field.type, shown)


def _parameter(name: str, annotation: Any, shown: Shown) -> inspect.Parameter:
    """An option that is None unless it is given; a tuple as words separated by commas."""
    kind = _plain(annotation)
    words = [f"--{(shown.get('name') or name).replace('_', '-')}"]
    if kind is bool:
        words = [f"{words[0]}/--no-{words[0].removeprefix('--')}"]
    text = shown["help"]
    if shown["shown"] is not None:
        text += f" (default: {shown['shown']})"
    option = typer.Option(
        *words,
        help=text,
        rich_help_panel=shown["panel"] or None,
        metavar=shown["metavar"],
        min=shown.get("least"),
        show_default=False,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _plain(annotation: Any) -> Any:
    """The type of an option: int, float, bool, str, or one of a few words."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _plain(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        (kind,) = {_plain(each) for each in get_args(annotation) if each is not types.NoneType}
        return kind
    return annotation if origin is Literal or annotation in (int, float, bool) else str


def words(text: str | None) -> list[str] | None:
    """The words of a list with commas, of which those in parentheses do not count.

    >>> words("focal, penex(sensitivity=0.1, ema=0.5)")
    ['focal', 'penex(sensitivity=0.1, ema=0.5)']
    """
    if text is None:
        return None
    found, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [word.strip() for word in found]


def given(options: dict[str, Any], of: type[Config] | type[Execution]) -> dict[str, Any]:
    """The options that set fields of `of` and are not None; words as lists."""
    kinds: dict[str, Any]
    if of is Config:
        kinds = {name: field.annotation for name, field in Config.model_fields.items()}
    else:
        kinds = {field.name: field.type for field in dataclasses.fields(Execution)}
    return {
        name: words(value) if isinstance(value, str) and _holds_words(kinds[name]) else value
        for name, value in options.items()
        if name in kinds and value is not None
    }


def _holds_words(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(
        get_origin(each) is tuple for each in get_args(annotation)
    )
