"""The command line: a thin layer over :mod:`penex.compare`.

Nothing heavy is imported here, so that ``penex --help`` answers at once.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from penex._extras import need

try:
    need("The penex command", "compare", "typer", "rich")
except ImportError as error:
    raise SystemExit(str(error)) from None

import typer
from rich.console import Console

if TYPE_CHECKING:
    from penex.compare.config import Config

app = typer.Typer(
    help="Should you still train your classifier with cross-entropy? Ask your own data.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
WIDTH_OF_A_FILE = 120


@app.command()
def compare(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="Table (.csv, .parquet), arrays X and y (.npz), or one of digits, wine, "
            "breast_cancer, iris. Default: digits with 300 training rows.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The same as DATA.", metavar="DATA", show_default=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Column of a table that holds the class.", show_default=False),
    ] = None,
    losses: Annotated[
        str | None,
        typer.Option(
            help="Losses, separated by commas; penex=0.3 sets the hyperparameter. Known: "
            "cross-entropy, label-smoothing, confidence-penalty, focal, penex. (default: all)",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Runs per loss, each with its own split. (default: 5)"),
    ] = None,
    train_size: Annotated[
        int | None,
        typer.Option(help="Training rows. (default: all that validation and test leave)"),
    ] = None,
    label_noise: Annotated[
        float | None,
        typer.Option(help="Share of training labels moved to another class. (default: 0)"),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training rows. (default: 100)")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of Adam. (default: 0.001)")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step. (default: 64)")] = None,
    tune: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="First tune the learning rate and the hyperparameter of every loss, with N "
            "trials each. (default: 0)",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time, one core each. (default: all cores)", min=1)
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for results; an unfinished comparison there continues.")
    ] = Path("penex-results"),
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of settings; options given here override it."),
    ] = None,
) -> None:
    """Train a classifier with each loss and say which one your data prefers.

    Every loss gets the same splits, initial weights and batches. Results go to the folder --out:
    report.html, results.json, table.tex and the logits of every run. Stop at any time; the same
    command continues.
    """
    console = _console()
    with _refusals(console):
        if source is not None and data is not None:
            from penex.compare.errors import CompareError

            raise CompareError(f"data: given twice, as {source!r} and as --data {data!r}")
        from penex.compare.config import configure

        settings = configure(
            config,
            data=data if source is None else source,
            target=target,
            losses=None if losses is None else [name.strip() for name in losses.split(",")],
            seeds=seeds,
            train_size=train_size,
            label_noise=label_noise,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            tune=tune,
        )
        _announce(console, settings, out)

        import joblib

        from penex.compare.display import Display
        from penex.compare.runner import compare as run

        run(settings, out, jobs=jobs or joblib.cpu_count(), display=Display(console))
        _report(console, out)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of penex compare.")],
) -> None:
    """Rebuild tables and report.html from the saved files of a comparison, finished or not."""
    console = _console()
    with _refusals(console):
        _report(console, folder)


def main() -> None:
    """Entry point of the command ``penex``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # "?" for ± where the encoding lacks it
    app()


def _announce(console: Console, config: "Config", out: Path) -> None:
    rows = f"{config.train_size} training rows, " if config.train_size else ""
    console.print(
        f"Comparing {len(config.losses)} losses × {config.seeds} seeds on {config.data} "
        f"({rows}{config.epochs} epochs); results in {out}",
        soft_wrap=True,
    )


def _report(console: Console, folder: Path) -> None:
    from penex.compare import tables
    from penex.compare.analysis import EPOCHS
    from penex.compare.report import write

    results = write(folder)
    for epoch in EPOCHS:
        console.print(tables.terminal(results, epoch, console.width))
        console.print()
    console.print(tables.caption(results))
    console.print(tables.LEGEND, style="dim")
    console.print(f"Report: {folder / 'report.html'}", soft_wrap=True)


def _console() -> Console:
    # Names of files and folders are printed as they are: no markup, and no line breaks in them.
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    return console


@contextmanager
def _refusals(console: Console) -> Iterator[None]:
    """Turn what the user can mend into one message and an exit status."""
    from penex.compare.errors import CompareError

    try:
        yield
    except (CompareError, OSError) as error:  # OSError: no permission, no space, no such device
        errors = Console(stderr=True, markup=False, highlight=False)
        errors.print(f"penex: {error}", style="red", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("Stopped. Finished runs are kept; the same command continues.")
        sys.exit(130)
