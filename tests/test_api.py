"""The public names are those of tests/api.txt, so that a change of one cannot pass unnoticed.

They are read from the source, not from what imports: annotations stay as they are written, whatever
the versions of Python, torch and NumPy, and no extra has to be installed. `make api` accepts a
change on purpose.
"""

import ast
import difflib
import importlib
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import penex

SOURCE = Path(penex.__file__).parent
SNAPSHOT = Path(__file__).with_name("api.txt")
SPECIAL = ("__init__", "__call__")
IMPORTABLE = ("penex", "penex.functional", "penex.inference", "penex.losses")  # with torch alone

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Text(str):
    """A default or an annotation as it is written."""

    __slots__ = ()
    __repr__ = str.__str__


class Module(NamedTuple):
    """What a file defines and imports at its top level."""

    name: str
    defined: dict[str, ast.stmt]
    imported: dict[str, tuple[str, str]]

    @property
    def public(self) -> list[str] | None:
        """`__all__`."""
        node = self.defined.get("__all__")
        return None if node is None else ast.literal_eval(node.value)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from statements(node.body)
            yield from statements(node.orelse)


@cache
def load(name: str) -> Module | None:
    """A module of penex by its name; None if there is none."""
    stem = SOURCE.joinpath(*name.split(".")[1:])
    path = next(filter(Path.is_file, (stem.with_suffix(".py"), stem / "__init__.py")), None)
    if path is None:
        return None
    module = Module(name, {}, {})
    for node in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, Function | ast.ClassDef):
            module.defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                module.defined[ast.unparse(target)] = node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "penex":
            for alias in node.names:
                module.imported[alias.asname or alias.name] = (node.module, alias.name)
    return module


def find(module: Module, name: str) -> tuple[Module, ast.stmt] | None:
    """Where in penex a name is defined that `module` uses; None if it is foreign, or a module."""
    if name in module.defined:
        return module, module.defined[name]
    home, original = module.imported.get(name, ("", ""))
    return find(load(home), original) if home and not load(f"{home}.{original}") else None


def value(module: Module, node: ast.expr) -> Text:
    """A default; the value of a constant rather than its name; of a setting without its help."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setting", "place"):
        return value(module, node.args[0])
    if isinstance(node, ast.Name) and (found := find(module, node.id)):
        home, definition = found
        if isinstance(definition, ast.Assign | ast.AnnAssign) and definition.value:
            return value(home, definition.value)
    return Text(ast.unparse(node))


def signature(module: Module, function: Function) -> inspect.Signature:
    given, kinds, nothing = function.args, inspect.Parameter, inspect.Parameter.empty

    def written(node: ast.expr | None) -> object:
        return Text(ast.unparse(node)) if node else nothing

    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
    rows = [
        *((kinds.POSITIONAL_OR_KEYWORD, *row) for row in zip(positional, defaults, strict=True)),
        (kinds.VAR_POSITIONAL, given.vararg, None),
        *(
            (kinds.KEYWORD_ONLY, *row)
            for row in zip(given.kwonlyargs, given.kw_defaults, strict=True)
        ),
        (kinds.VAR_KEYWORD, given.kwarg, None),
    ]
    return inspect.Signature(
        [
            inspect.Parameter(
                argument.arg,
                kinds.POSITIONAL_ONLY if argument in given.posonlyargs else kind,
                default=value(module, default) if default else nothing,
                annotation=written(argument.annotation),
            )
            for kind, argument, default in rows
            if argument
        ],
        return_annotation=written(function.returns),
    )


def members(module: Module, node: ast.ClassDef) -> dict[str, tuple[Module, ast.stmt]]:
    """Of a class and of its bases in penex."""
    found: dict[str, tuple[Module, ast.stmt]] = {}
    for base in reversed(node.bases):
        match find(module, ast.unparse(base)):
            case home, ast.ClassDef() as parent:
                found |= members(home, parent)
    for item in node.body:
        if isinstance(item, Function):
            found[item.name] = module, item
        elif isinstance(item, ast.AnnAssign):
            found[ast.unparse(item.target)] = module, item
        elif isinstance(item, ast.Assign):
            found |= {ast.unparse(target): (module, item) for target in item.targets}
    return {name: at for name, at in found.items() if name in SPECIAL or name[0] != "_"}


def bases(module: Module, node: ast.ClassDef) -> Iterator[str]:
    """The public ones."""
    for base in map(ast.unparse, node.bases):
        match find(module, base):
            case home, ast.ClassDef() as parent if base.startswith("_"):
                yield from bases(home, parent)
            case _:
                yield base


def lines(path: str, module: Module, node: ast.stmt) -> Iterator[str]:
    """The lines of the snapshot on one definition."""
    match node:
        case ast.ClassDef():
            kinds = [f"@{ast.unparse(kind)} " for kind in node.decorator_list]
            parents = ", ".join(dict.fromkeys(bases(module, node)))
            yield f"{''.join(kinds)}class {path}" + (f"({parents})" if parents else "")
            for name, at in members(module, node).items():
                yield from lines(f"{path}.{name}", *at)
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            kinds = [f"@{ast.unparse(kind)} " for kind in node.decorator_list]
            yield f"{''.join(kinds)}{path}{signature(module, node)}"
        case ast.AnnAssign():
            default = f" = {value(module, node.value)}" if node.value else ""
            yield f"{path}: {ast.unparse(node.annotation)}{default}"
        case ast.Assign():
            yield path if path == "penex.__version__" else f"{path} = {value(module, node.value)}"


def modules() -> list[Module]:
    """All that announce public names."""
    files = [path.relative_to(SOURCE).with_suffix("") for path in sorted(SOURCE.rglob("*.py"))]
    parts = [file.parent.parts if file.name == "__init__" else file.parts for file in files]
    names = [".".join(("penex", *each)) for each in parts if not any(p[0] == "_" for p in each)]
    return [module for module in map(load, names) if module.public is not None]


def announced(module: Module) -> Iterator[str]:
    for name in sorted(module.public):
        path = f"{module.name}.{name}"
        if found := find(module, name):
            home, node = found
            if home is not module and "._" not in home.name and name in (home.public or ()):
                yield f"{path} is {home.name}.{name}"
            else:
                yield from lines(path, home, node)
        else:
            yield f"module {path}"


class Option(NamedTuple):
    """What a parameter of a command is called on the command line, its type and its default."""

    names: tuple[str, ...]
    type: str
    default: str


def commands() -> dict[str, list[Option]]:
    """The commands of penex by name, from the functions that define them.

    Options that are made from settings are not among them.
    """
    module = load("penex.cli")
    found: dict[str, list[Option]] = {}
    for node in module.defined.values():
        for decorator in node.decorator_list if isinstance(node, Function) else ():
            kind = ast.unparse(decorator)
            if kind.startswith(("app.command(", "app.callback(", "with_settings(")):
                name = "penex" if kind.startswith("app.callback") else f"penex {node.name}"
                named = signature(module, node).parameters.values()
                parameters = [each for each in named if each.kind is not each.VAR_KEYWORD]
                found[name] = [option(module, parameter) for parameter in parameters]
    return found


def option(module: Module, parameter: inspect.Parameter) -> Option:
    annotation = ast.parse(parameter.annotation, mode="eval").body
    if isinstance(annotation, ast.Name):  # what several commands share has a name
        annotation = module.defined[annotation.id].value
    kind, call = annotation.slice.elts
    words = [word.value for word in call.args]
    names = [part for word in words for part in word.split("/")]
    if call.func.attr == "Argument":
        names = [parameter.name]
    default = "" if parameter.default is parameter.empty else f" = {parameter.default}"
    return Option(
        tuple(names or [f"--{parameter.name.replace('_', '-')}"]), ast.unparse(kind), default
    )


def snapshot() -> str:
    text = [line for module in modules() for line in announced(module)]
    for command, options in sorted(commands().items()):
        text.append(command)
        text += [f"{command} {'/'.join(each.names)}: {each.type}{each.default}" for each in options]
    settings = load("penex.compare.config")
    for title, kind in (("settings", "Config"), ("execution", "Execution")):
        for name, (_, node) in members(settings, settings.defined[kind]).items():
            if isinstance(node, ast.AnnAssign):
                text += lines(f"{title} {name}", settings, node)
    return "\n".join(text) + "\n"


def test_public_names_and_signatures_are_those_of_the_snapshot() -> None:
    old, new = SNAPSHOT.read_text(encoding="utf-8"), snapshot()
    diff = difflib.unified_diff(
        old.splitlines(), new.splitlines(), "tests/api.txt", "the source", lineterm="", n=0
    )
    if old != new:
        message = (
            "The public names have changed:",
            *diff,
            "If that is meant: `make api`, and an entry in CHANGELOG.md. A name that goes, or takes"
            " less than it did, is a breaking change.",
        )
        pytest.fail("\n".join(message), pytrace=False)


@pytest.mark.parametrize("name", IMPORTABLE)
def test_what_is_read_is_what_is_imported(name: str) -> None:
    module = load(name)
    real = importlib.import_module(name)
    assert module.public == real.__all__
    for each in module.public:
        match find(module, each):
            case home, ast.FunctionDef() as node:
                assert same(signature(home, node), getattr(real, each))
            case home, ast.ClassDef() as node:
                for called, (where, member) in members(home, node).items():
                    thing = inspect.getattr_static(getattr(real, each), called, None)
                    if isinstance(member, Function) and inspect.isfunction(thing):
                        assert same(signature(where, member), thing), f"{each}.{called}"


def same(read: inspect.Signature, function: object) -> bool:
    """Names and kinds of parameters, and the defaults that are plain values."""
    real = inspect.signature(function).parameters
    assert [(each.name, each.kind) for each in real.values()] == [
        (each.name, each.kind) for each in read.parameters.values()
    ]
    for name, each in read.parameters.items():
        if each.default is not each.empty:
            assert eval(each.default) == real[name].default, name
        else:
            assert real[name].default is each.empty
    return True


def test_the_commands_are_those_that_typer_has() -> None:
    typer = pytest.importorskip("typer")
    from penex.cli import app

    root = typer.main.get_command(app)
    known = {"penex": root} | {f"penex {name}": each for name, each in root.commands.items()}
    context = {"penex": typer.Context(root)}
    read = {name: [option.names for option in options] for name, options in commands().items()}
    assert known.keys() == {"penex", *read}
    for name, command in known.items():
        params = command.get_params(context.setdefault(name, typer.Context(command)))
        real = [(*each.opts, *each.secondary_opts) for each in params if each.name != "help"]
        assert real[: len(read.get(name, ()))] == read.get(name, [])


def test_every_integration_says_what_is_public() -> None:
    files = {path.stem for path in (SOURCE / "integrations").glob("[!_]*.py")}
    assert files
    assert {f"penex.integrations.{name}" for name in files} <= {m.name for m in modules()}


if __name__ == "__main__":
    sys.stdout.write(snapshot())
