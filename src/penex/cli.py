"""The command line: a thin layer over :mod:`penex.compare`.

Nothing heavy is imported here, so that ``penex --help`` answers at once.
"""

import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from penex import __version__
from penex._extras import need

try:
    need("The penex command", "compare", "typer", "rich")
except ImportError as error:
    raise SystemExit(str(error)) from None

import typer
from typer.core import TyperCommand

from penex._terminal import Terminal, printable

if TYPE_CHECKING:
    from penex.compare.config import Config, Execution
    from penex.compare.models.classifier import Classifier

SHAPE: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": "markdown",
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(
    help="Should you still train your classifier with cross-entropy? Ask your own data.",
    no_args_is_help=True,
    **SHAPE,
)
Function = TypeVar("Function", bound=Callable[..., None])
WIDTH_OF_A_FILE = 120


Folders = Annotated[
    list[Path], typer.Argument(metavar="FOLDER...", help="Output folders of penex compare.")
]


def with_settings(
    *, config: bool | tuple[str, ...] = False, execution: bool = False
) -> Callable[[Function], Function]:
    """Make a command of a function that takes settings as ``**options``.

    Its options are made from the fields of the settings when the command is used or its own help is
    asked for: pydantic would be a third of the time of ``penex --help``.

    Args:
        config: Whether all fields of ``Config`` that have an option are among them, or which.
        execution: Whether those of ``Execution`` are.
    """

    def register(function: Function) -> Function:
        own = inspect.signature(function).parameters.values()

        class Command(TyperCommand):
            @cached_property
            def made(self) -> Any:
                from penex import _cli_options as options

                parameters = [each for each in own if each.kind is not each.VAR_KEYWORD]
                names = None if config is True else config or ()
                parameters += options.of_config(names)
                parameters += options.of_execution() if execution else ()
                signature = inspect.Signature([
                    each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters
                ])  # fmt: skip
                setattr(function, "__signature__", signature)  # noqa: B010
                alone = typer.Typer(**SHAPE)
                alone.command()(function)
                return typer.main.get_command(alone)

            def get_params(self, ctx: Any) -> Any:
                return self.made.get_params(ctx)

            def invoke(self, ctx: Any) -> Any:
                return self.made.invoke(ctx)

        app.command(function.__name__, help=function.__doc__, cls=Command)(lambda: None)
        return function

    return register


LossName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Of another loss. (default: the recommended one)"),
]
Refit = Annotated[
    bool,
    typer.Option(
        "--refit",
        help="Train once more, on training and validation rows together; needs the data.",
    ),
]
DataPlace = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="DATA", help="Where the data are now. (default: where FOLDER says)"
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Import the modules of losses and networks that FOLDER names, which runs their code.",
    ),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"penex {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version, and stop.", callback=_version),
    ] = False,
) -> None:
    pass


@with_settings(config=True, execution=True)
def compare(
    source: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help="The same as --data.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results; an unfinished comparison there continues. (default: "
            "penex-results/NAME, the name being that of the data set)",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of settings, also those that have no option; options override it."
        ),
    ] = None,
    **options: Any,
) -> None:
    """Train a classifier with each loss and say which one your data prefers.

    Every loss gets the same splits, initial weights and batches. Results go to the folder --out:
    report.html, results.json, table.tex and the logits of every run. Stop at any time; the same
    command continues.
    """
    console = _console()
    with _refusals(console):
        from penex.compare.errors import CompareError

        if source is not None and options["data"] is not None:
            raise CompareError(
                f"data: given twice, as {source!r} and as --data {options['data']!r}"
            )
        execution = _execution(options)
        from penex._cli_options import given
        from penex.compare.config import Config, configure

        place = {} if source is None else {"data": source}
        settings = configure(config, **given(options, Config) | place)
        from penex.compare.data.load import short_name
        from penex.compare.display import Display
        from penex.compare.runner import compare as run
        from penex.compare.training.distributed import is_rank_zero

        out = out or Path("penex-results") / short_name(settings.data)
        _announce(console, settings, out)
        run(settings, out, execution=execution, display=Display(console))
        if is_rank_zero():
            _report(console, out)


@with_settings(config=("metric", "min_difference"))
def report(
    folders: Folders,
    out: Annotated[Path, typer.Option(help="Folder for the page of several comparisons.")] = Path(
        "penex-report"
    ),
    trust: Trust = False,
    **options: Any,
) -> None:
    """Rebuild tables and report.html from the saved files of a comparison, finished or not.

    Several comparisons are merged into one page, report.html in --out, with their table as
    table.tex and table.md.
    """
    console = _console()
    with _refusals(console):
        _import_named(folders, trust)
        if len(folders) == 1:
            _report(console, folders[0], **options)
        else:
            _merge(console, folders, out, **options)


@app.command()
def figures(
    folders: Folders,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A figure to draw, may be repeated: curves, alpha-sweep, gradient-norm, "
            "calibration-strength, error-histogram, reliability, margins, qualitative, runtime, "
            "robustness, binary-loss, decision-regions. (default: all)",
            show_default=False,
        ),
    ] = None,
    format: Annotated[Literal["png", "svg", "pdf"], typer.Option(help="Of the files.")] = "png",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the figures. (default: figures in FOLDER, or in penex-report)",
            show_default=False,
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Draw figures of comparisons, several in one figure, from their saved files."""
    console = _console()
    with _refusals(console):
        from penex.compare.analysis.plots import read
        from penex.paper import figures as drawing

        into = out or (folders[0] if len(folders) == 1 else Path("penex-report")) / "figures"
        names = drawing.names(only or [])
        _import_named(folders, trust)
        comparisons = [read(folder) for folder in folders]
        for name in names:
            path = into / f"{name}.{format}"
            try:
                drawing.save(name, comparisons, path)
            except drawing.NothingToShowError as error:
                if only:
                    raise
                console.print(f"{name} left out: {error}", style="dim", soft_wrap=True)
            else:
                console.print(str(path), soft_wrap=True)


@app.command()
def attack(
    folder: Annotated[Path, typer.Argument(help="Output folder of penex compare.")],
    linf: Annotated[
        str, typer.Option(help="Radii in L∞, separated by commas; none if empty.")
    ] = "1/255,2/255,4/255",
    l2: Annotated[
        str, typer.Option(help="Radii in L2, separated by commas; none if empty.")
    ] = "0.25,0.5",
    rows: Annotated[
        int, typer.Option(help="Test rows to attack, the same for every loss.", min=1)
    ] = 1000,
    data: DataPlace = None,
    trust: Trust = False,
) -> None:
    """Attack the networks of a comparison: accuracy on test rows that an adversary changes.

    Radii are of pixels on the scale [0, 1]; of scaled features where the data are numbers.
    Results go to robustness.json in FOLDER, and into its report. Stop at any time; the same command
    continues.
    """
    console = _console()
    with _refusals(console):
        from penex.paper import attacks

        _import_named([folder], trust)
        radii = {"linf": attacks.radii(linf), "l2": attacks.radii(l2)}
        attacks.attack(folder, radii=radii, rows=rows, data=data, say=console.print)
        _report(console, folder)


@app.command()
def predict(
    folder: Annotated[
        Path, typer.Argument(help="Output folder of penex compare, or a saved classifier.")
    ],
    rows: Annotated[
        Path,
        typer.Argument(
            help="New rows: a table; texts in a table or one a line (.txt); an image or a folder "
            "of images; or an array (.npy, or X of an .npz)."
        ),
    ],
    loss: LossName = None,
    out: Annotated[
        Path | None,
        typer.Option(help="CSV file for classes and probabilities. (default: print them)"),
    ] = None,
    refit: Refit = False,
    data: DataPlace = None,
    trust: Trust = False,
) -> None:
    """Predict the classes of new rows with the network of the recommended loss.

    Neither the data nor the folder's place has to be what it was.
    """
    console = _console()
    with _refusals(console):
        from penex.compare.data.new_rows import read_rows
        from penex.compare.files import write_text

        classifier = _classifier(folder, loss, refit=refit, data=data, trust=trust)
        names, features = read_rows(rows, classifier.description)
        content = classifier.frame(features, names).to_csv(index=False)
        if out is None:
            shown = printable(content, keep="\n") if sys.stdout.isatty() else content
            typer.echo(shown, nl=False)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, content)
            console.print(f"{len(names)} rows by {classifier!r}: {out}", soft_wrap=True)


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(help="Output folder of penex compare, or a saved classifier.")
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET",
            help="An ONNX file (.onnx), from rows to probabilities; or a folder, for penex predict "
            "elsewhere.",
        ),
    ],
    loss: LossName = None,
    refit: Refit = False,
    data: DataPlace = None,
    trust: Trust = False,
) -> None:
    """Write the network of the recommended loss to a file or folder of its own."""
    console = _console()
    with _refusals(console):
        classifier = _classifier(folder, loss, refit=refit, data=data, trust=trust)
        if target.suffix.lower() == ".onnx":
            what = classifier.export(target)
            console.print(f"{target}: {classifier!r}; its input is {what}", soft_wrap=True)
        else:
            classifier.save(target)
            console.print(f"{target}: {classifier!r}", soft_wrap=True)


def _import_named(folders: list[Path], trust: bool) -> None:
    """Import what folders name, if the user trusts them."""
    if trust:
        from penex.compare.result import import_named

        for folder in folders:
            import_named(folder)


def _classifier(
    folder: Path, loss: str | None, *, refit: bool, data: str | None, trust: bool
) -> "Classifier":
    from penex.compare.errors import CompareError
    from penex.compare.result import load

    result = load(folder, trust=trust)
    if (loss is not None or refit) and not result.is_comparison:
        raise CompareError(f"{folder} holds one classifier; leave out --loss and --refit")
    if refit:
        return result.refit(data, loss=loss)
    return result.best if loss is None else result.model(loss)


@with_settings(execution=True)
def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(help="The preset, one of those that --list shows.", show_default=False),
    ] = None,
    show: Annotated[
        bool, typer.Option("--list", help="Show the presets and what they cost, and stop.")
    ] = False,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke", help="Try it on a slice, in seconds; data that is missing is made up."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results. (default: penex-reproduce/NAME)"),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the files of the data set, or with a folder of them by its name, "
            "instead of a download."
        ),
    ] = None,
    losses: Annotated[
        str | None,
        typer.Option(
            help="Only these of the preset's losses, separated by commas.", show_default=False
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Runs per loss. (default: the preset's)")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training rows. (default: the preset's)")
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="First tune the learning rate of every loss, with N trials each, which the "
            "published protocol does not. (default: 0)",
        ),
    ] = None,
    **options: Any,
) -> None:
    """Run an experiment of the paper, and show its numbers beside the published ones.

    The published protocol is kept, and what is fairer stands beside it: the best epoch, temperature
    scaling, several seeds, and with --tune a learning rate tuned for every loss. Stop at any time;
    the same command continues.
    """
    console = _console()
    with _refusals(console):
        from penex.compare.errors import CompareError
        from penex.paper.presets import NAMES, preset

        if show:
            _list(console)
            return
        if name is None:
            raise CompareError(f"reproduce: name a preset, one of {', '.join(NAMES)}")
        facts = preset(name)
        execution = _execution(options)
        folder = Path("penex-reproduce") / name if out is None else out

        from penex._cli_options import words
        from penex.compare.display import Display
        from penex.paper.reproduce import reproduce as run

        configs = facts.configs(
            smoke=smoke, losses=words(losses), seeds=seeds, epochs=epochs, tune=tune
        )
        console.print(f"{facts.title} (paper: {facts.paper}); results in {folder}", soft_wrap=True)
        for experiment, config in configs.items():
            _announce(console, config, folder / experiment)
        results = run(
            name,
            configs,
            folder,
            smoke=smoke,
            data_dir=data_dir,
            execution=execution,
            display=Display(console),
        )
        if results:
            _reproduced(console, folder, results)


def _list(console: Terminal) -> None:
    from rich import box
    from rich.table import Table

    from penex.paper.presets import NAMES, preset

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("Name", "Experiment"):
        table.add_column(title)
    for title in ("Runs", "Epochs", "Million steps"):
        table.add_column(title, justify="right")
    for name in NAMES:
        facts = preset(name)
        configs = facts.configs()
        runs = sum(len(config.losses) * config.seeds for config in configs.values())
        epochs = sorted({config.epochs for config in configs.values()})
        steps = sum(facts.steps(experiment, config) for experiment, config in configs.items())
        table.add_row(
            name, facts.title, str(runs), "–".join(map(str, epochs)), f"{steps / 1e6:.3f}"
        )
    console.print(table)


def _reproduced(console: Terminal, folder: Path, results: "dict[str, dict[str, Any]]") -> None:
    from penex.compare.analysis import tables
    from penex.compare.files import read_json
    from penex.compare.registry import parse_loss
    from penex.paper.reproduce import FILE

    for experiment, each in results.items():
        console.print(f"{experiment}:")
        _show(console, each)
    record = read_json(folder / FILE)
    if record["smoke"]:
        console.print("A smoke run: that it ends is all that its numbers say.")
    for each in results.values():
        for row in tables.published(each):
            epoch = row.epoch[0].lower() + row.epoch[1:]
            console.print(
                f"{row.label}, {row.metric}, {epoch}: {row.ours} (published: "
                f"{row.published}; {row.source})"
            )
    if curves := record["curves"]:
        for each in curves["distances"]:
            if each["rms"] is not None:
                console.print(
                    f"{parse_loss(each['loss']).label}: validation NLL is {each['rms']:.3f} from "
                    f"the published curve (root mean square of epochs {each['first']} to "
                    f"{each['last']}; {curves['source']})"
                )
        console.print(f"Figure of the published curves: {curves['figure']}", soft_wrap=True)
    console.print("Where this differs from the paper:")
    for deviation in record["deviations"]:
        console.print(f"- {deviation}")
    for figure, drawn in record["figures"].items():
        console.print(f"Figure {figure}: {drawn}", soft_wrap=True)
    page = folder if len(results) > 1 else folder / next(iter(results))
    console.print(f"Report: {page / 'report.html'}", soft_wrap=True)


def main() -> None:
    """Entry point of the command ``penex``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # "?" for ± where the encoding lacks it
    # What ends a job on a cluster ends it as Ctrl-C does: nothing half-written, no process left.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()


def _execution(options: dict[str, Any]) -> "Execution":
    """Where runs are executed; if several devices are to share one, under torchrun from here on.

    Options that are None take the default, or what torchrun has decided.
    """
    from penex._cli_options import given
    from penex.compare.config import Execution
    from penex.compare.errors import CompareError
    from penex.compare.training.distributed import devices_and_nodes, start

    devices, nodes = devices_and_nodes()
    defaults = {"jobs": None, "devices": devices, "nodes": nodes}
    execution = Execution(**defaults | given(options, Execution))
    for name in execution.loggers:
        if name not in ("tensorboard", "wandb"):
            raise CompareError(f"logger: expected tensorboard or wandb, got {name!r}")
    if devices * nodes == 1 and execution.devices * execution.nodes > 1:
        sys.exit(start(execution, ["-m", "penex.cli", *sys.argv[1:]]))
    return execution


def _announce(console: Terminal, config: "Config", out: Path) -> None:
    rows = f"{config.train_size} training rows, " if config.train_size else ""
    console.print(
        f"Comparing {len(config.losses)} losses × {config.seeds} seeds on {config.data} "
        f"({rows}{config.epochs} epochs); results in {out}",
        soft_wrap=True,
    )


def _report(console: Terminal, folder: Path, **options: Any) -> None:
    from penex.compare.analysis import plots
    from penex.compare.analysis.report import write

    comparison = plots.read(folder, **options)
    write(comparison)
    _show(console, comparison.results)
    console.print(f"Report: {folder / 'report.html'}", soft_wrap=True)


def _show(console: Terminal, results: "dict[str, Any]") -> None:
    """Recommendation, warnings and tables of a comparison."""
    from penex.compare.analysis import tables, verdict

    console.print(verdict.recommendation(results), style="bold")
    for warning in verdict.warnings(results):
        console.print(f"Warning: {warning}", style="yellow")
    console.print()
    console.print(tables.terminal(results, results["config"]["select"], console.width))
    console.print()
    console.print(tables.selections_terminal(results))
    console.print()
    lines = (tables.caption, tables.legend, tables.floor, tables.timing)
    for line in filter(None, (make(results) for make in lines)):
        console.print(line, style="dim")


def _merge(console: Terminal, folders: list[Path], out: Path, **options: Any) -> None:
    from penex.compare.analysis import plots, report, tables, verdict

    comparisons = [plots.read(folder, **options) for folder in folders]
    several = [one.results for one in comparisons]
    report.merge(comparisons, out)
    for results, title in zip(several, tables.titles(several), strict=True):
        console.print(f"{title}: {verdict.recommendation(results)}", style="bold")
        for warning in verdict.warnings(results):
            console.print(f"Warning: {warning}", style="yellow")
    console.print()
    for selection in dict.fromkeys((*(each["config"]["select"] for each in several), "last")):
        for table in tables.merged_terminal(several, selection):
            console.print(table)
            console.print()
    console.print(tables.MERGED_LEGEND, style="dim")
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)


def _console() -> Terminal:
    console = Terminal()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    if os.environ.get("RANK", "0") != "0":  # torchrun's first process speaks for all
        console.quiet = True
    return console


@contextmanager
def _refusals(console: Terminal) -> Iterator[None]:
    """Turn what the user can mend into one message and an exit status."""
    from penex.compare.errors import CompareError

    try:
        yield
    except (CompareError, OSError, ImportError) as error:
        # OSError: no permission, no space, no such device. ImportError: `need` names an extra;
        # ModuleNotFoundError would be a fault of this package.
        if isinstance(error, ModuleNotFoundError):
            raise
        errors = Terminal(stderr=True, quiet=console.quiet)
        errors.print(f"penex: {error}", style="red", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("Stopped. Finished runs are kept; the same command continues.")
        sys.exit(130)


if __name__ == "__main__":
    main()
