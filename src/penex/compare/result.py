"""The comparison from Python: losses on data in memory or in files, and what comes of it."""

import dataclasses
import functools
import hashlib
import html
import io
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from penex._terminal import Terminal
from penex.compare.analysis import plots, report, tables, verdict
from penex.compare.config import Config, Execution, Task, configure, import_user_objects
from penex.compare.data.dataset import ClassType, Content, Dataset, encode_labels
from penex.compare.data.images import Images
from penex.compare.data.load import to_dataset
from penex.compare.data.new_rows import channels_first
from penex.compare.data.tables import content_of, texts
from penex.compare.display import Display
from penex.compare.errors import CompareError
from penex.compare.files import read_json, reading, write_text
from penex.compare.models.saved_model import DESCRIPTION, read_model
from penex.compare.output_folder import (
    checkpoint_file,
    comparison_file,
    load_data,
    read_comparison,
    run_folder,
)
from penex.compare.registry import LOSSES, Loss
from penex.compare.runner import compare
from penex.compare.user_objects import register
from penex.metrics import METRICS

if TYPE_CHECKING:
    from torch import nn

    from penex.compare.models.classifier import Classifier

WIDTH = 100
"""Of a result as text, in columns."""
CURVES = (6.6, 3.6)
"""Width and height of the curves in a notebook, in inches."""


def compare_losses(
    X: Any,  # noqa: N803
    y: Any = None,
    *,
    losses: "Sequence[str | Loss | Callable[..., Any]] | None" = None,
    seeds: int = 5,
    tune: int = 0,
    model: "str | Callable[..., nn.Module] | None" = None,
    out: str | Path | None = None,
    name: str = "data",
    jobs: int | None = None,
    quiet: bool = False,
    **settings: Any,
) -> "Result":
    """Train a classifier with each loss, at several seeds, and compare them on test rows.

    Args:
        X: A DataFrame of features; an array of shape (N, ...), uint8 of shape (N, H, W) or
            (N, H, W, 3) being images; a list of N texts; or the path or name of a data set, as the
            command line has it, without `y`.
        y: The N classes; or the column of X that holds them.
        losses: Names of losses, such as "penex" or "penex=0.3"; and losses of your own: a
            criterion's class or function, or a :class:`~penex.compare.registry.Loss`. None: five
            common ones.
        seeds: Runs of each loss.
        tune: Trials, for each loss, to tune its learning rate and hyperparameter; 0: no tuning.
        model: The name of a network, as the command line has it; or a function of the shape of a
            row and the number of classes that returns an :class:`torch.nn.Module`. None: what
            suits the data.
        out: Folder for results; an unfinished comparison there continues. None: a temporary one,
            which is removed with the result.
        name: Of data in memory, in tables and reports.
        jobs: Runs at a time. None: one for each core; one, on a GPU.
        quiet: Show no progress.
        **settings: Any other setting of :class:`~penex.compare.config.Config`, such as `epochs`.

    Returns:
        The result.

    Raises:
        CompareError: The data, a loss or a setting is refused.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> losses = ["cross-entropy", "penex"]
        >>> result = compare_losses(X, y, losses=losses, seeds=2, epochs=3, jobs=1, quiet=True)
        >>> result.best.predict(X[:3]).shape
        (3,)
    """
    network = model if model is None or isinstance(model, str) else register(model)
    given: dict[str, Any] = {
        "losses": None if losses is None else tuple(_spec(loss) for loss in losses),
        "seeds": seeds,
        "tune": tune,
        "model": network,
    }
    if "data" in settings:
        raise CompareError("data: expected in the place of X; got it as a setting")
    if isinstance(X, str | Path):
        if y is not None:
            raise CompareError(f"y: {X} is a data set in files, whose classes target names")
        config, dataset = configure(data=str(X), **given, **settings), None
    else:
        if isinstance(y, str):
            settings["target"] = y
        config = configure(data=name, **given, **settings)
        y = config.target if y is None else y
        dataset = in_memory(X, y, config)
    folder = Path(tempfile.mkdtemp(prefix="penex-") if out is None else out)
    console = Terminal(quiet=quiet)
    execution = Execution(jobs=jobs)
    compare(config, folder, execution=execution, display=Display(console), dataset=dataset)
    return Result(folder, dataset, temporary=out is None)


def load(folder: str | Path, *, objects: Iterable[Any] = (), trust: bool = False) -> "Result":
    """The result of an earlier comparison, finished or not; or a classifier that was saved.

    Args:
        folder: Of `out` or ``--out``; or one that :meth:`Classifier.save` wrote, whose result has
            nothing but :attr:`Result.best`.
        objects: Losses and networks of your own that were given to :func:`compare_losses`.
        trust: Whether to import the modules of losses and networks that `folder` names, which
            runs their code.

    Raises:
        CompareError: The folder holds neither.
    """
    for each in objects:
        _spec(each)
    folder = Path(folder)
    if trust:
        import_named(folder)
    if (folder / DESCRIPTION).is_file():
        read_model(folder)
    else:
        read_comparison(folder)
    return Result(folder)


def import_named(folder: Path) -> None:
    """Import the losses and the network that a comparison or a saved classifier names.

    Raises:
        CompareError: The folder holds neither, or one cannot be imported.
    """
    if (folder / DESCRIPTION).is_file():
        model = read_model(folder)
        import_user_objects([model.loss], model.network)
        return
    path = comparison_file(folder)
    described = read_json(path)
    with reading(path):
        named = described["config"]
        import_user_objects(named["losses"], named.get("model"))


class Result:
    """What a comparison found: the verdict, its numbers, and the networks.

    Attributes:
        folder: With all of it in files.
    """

    def __init__(
        self, folder: Path, dataset: Dataset | None = None, *, temporary: bool = False
    ) -> None:
        self.folder = folder
        self._dataset = dataset
        if temporary:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @property
    def is_comparison(self) -> bool:
        """Whether the folder holds more than one saved classifier."""
        return not (self.folder / DESCRIPTION).is_file()

    @functools.cached_property
    def comparison(self) -> plots.Comparison:
        """What tables and pictures are made from; its `results` are the content of results.json."""
        return plots.read(self.folder)

    @property
    def recommendation(self) -> str:
        """Which loss to train with, by how much it is better, and how certain that is."""
        return verdict.recommendation(self.comparison.results)

    @property
    def warnings(self) -> list[str]:
        """Why numbers of this comparison should not be believed, a sentence each."""
        return verdict.warnings(self.comparison.results)

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """One row a run, at its selected epoch.

        Columns: loss, seed, lr, knob (the value of the loss's hyperparameter), epoch, temperature,
        and the metrics of :data:`penex.metrics.METRICS` on test rows; those that end in "_scaled"
        are after temperature scaling. NaN where a run diverged.
        """
        results = self.comparison.results
        selection = results["config"]["select"]
        rows = []
        for run in results["runs"]:
            row = {name: run[name] for name in ("loss", "seed", "lr", "knob")}
            row["epoch"] = run["epochs"].get(selection)
            row["temperature"] = run["temperature"][selection]
            for scaling, ending in (("link", ""), ("scaled", "_scaled")):
                found = run["test"][selection][scaling] or {}
                row |= {f"{metric}{ending}": found.get(metric) for metric in METRICS}
            rows.append(row)
        frame = pd.DataFrame(rows)
        numbers = frame.columns.difference(["loss", "seed", "epoch"], sort=False)
        return frame.astype(dict.fromkeys(numbers, float) | {"epoch": "Int64"})

    @functools.cached_property
    def summary(self) -> pd.DataFrame:
        """The table of the report at the selected epochs, as text: one row a loss."""
        results = self.comparison.results
        found = {}
        for row in tables.rows(results, results["config"]["select"]):
            cells = [each.value + " ★" * each.best for each in row.cells]
            found[row.label] = [row.settings, *cells]
        columns = ["Settings", *tables.header()]
        return pd.DataFrame.from_dict(found, orient="index", columns=columns)

    @functools.cached_property
    def best(self) -> "Classifier":
        """The network of the recommended loss, at the first seed that did not diverge."""
        if not self.is_comparison:
            from penex.compare.models.classifier import read_bundle

            return read_bundle(self.folder)
        return self.model(verdict.recommended(self.comparison.results))

    def model(self, loss: str, seed: int | None = None) -> "Classifier":
        """The network of a loss, at its selected epoch.

        Args:
            loss: As in the configuration.
            seed: Of the run; None: the first that did not diverge.

        Raises:
            CompareError: There is no such run, or it diverged.
        """
        from penex.compare.models.classifier import of_run

        run = self._run(loss, seed)
        folder = run_folder(self.folder, loss, run["seed"])
        epoch = run["epochs"][self._selection]
        return of_run(folder, checkpoint_file(folder, epoch), epoch, self._temperature([run]))

    def refit(
        self,
        X: Any = None,  # noqa: N803
        y: Any = None,
        *,
        loss: str | None = None,
    ) -> "Classifier":
        """Train a network on training and validation rows together, and keep it in the folder.

        For as many epochs as were selected, and with the temperature that was fitted, in the mean
        over seeds; there are no rows left to find them by.

        Args:
            X: The data again, as :func:`compare_losses` had it, where it came from memory and this
                result was loaded; or the path of files, if they are not where the folder says.
            y: Its classes.
            loss: Which; None: the recommended one.

        Raises:
            CompareError: The data cannot be read again, or has changed; or every run diverged.
        """
        from penex.compare.models.classifier import read_bundle

        loss = verdict.recommended(self.comparison.results) if loss is None else loss
        folder = self.folder / "refit" / loss
        if not (folder / DESCRIPTION).is_file():
            from penex.compare.training.run import refit

            config, described = read_comparison(self.folder)
            run = self._run(loss, None)
            if X is None and self._dataset is not None:
                dataset = self._dataset
            elif X is None or isinstance(X, str | Path):
                _, dataset = load_data(self.folder, None if X is None else str(X))
            else:
                dataset = in_memory(X, y, config)
            if dataset.fingerprint != described["fingerprint"]:
                raise CompareError(f"X has changed since {self.folder} was made")
            knob = math.nan if run["knob"] is None else run["knob"]
            task = Task(folder, loss, run["seed"], run["lr"], knob)
            own = self._finite_runs(loss)
            epochs = round(float(np.mean([each["epochs"][self._selection] for each in own])))
            refit(task, config, dataset, epochs=epochs, temperature=self._temperature(own))
        return read_bundle(folder)

    @property
    def _selection(self) -> str:
        return str(self.comparison.results["config"]["select"])

    def _finite_runs(self, loss: str) -> list[dict[str, Any]]:
        """The records of the runs of a loss that have a network at the selection."""
        runs = self.comparison.finished(loss)
        if not runs:
            known = ", ".join(each["spec"] for each in self.comparison.results["losses"])
            raise CompareError(f"loss: expected one with a finished run, of {known}; got {loss!r}")
        return [run for run in runs if run["temperature"][self._selection] is not None]

    def _run(self, loss: str, seed: int | None) -> dict[str, Any]:
        for run in self._finite_runs(loss):
            if seed in (None, run["seed"]):
                return run
        of = "every run" if seed is None else f"the run at seed {seed} is missing, or it"
        raise CompareError(f"{loss} has no network: {of} diverged")

    def _temperature(self, runs: Sequence[dict[str, Any]]) -> float:
        """The geometric mean of what was fitted, if the recommendation is after scaling; else 1."""
        if self.comparison.results["primary"]["scaling"] != "scaled":
            return 1.0
        return float(np.exp(np.mean([np.log(run["temperature"][self._selection]) for run in runs])))

    def report(self, path: str | Path) -> Path:
        """Write report.html, which needs nothing but itself, to `path`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, report.page(self.comparison))
        return path

    def save(self, folder: str | Path) -> Path:
        """Keep all runs in a new folder, with the report, for :func:`penex.load`.

        Raises:
            CompareError: `folder` exists.
        """
        folder = Path(folder)
        if folder.exists():
            raise CompareError(f"folder: expected a new one, {folder} exists")
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(".*"))
        report.write(plots.read(folder))
        return folder

    def __repr__(self) -> str:
        if not self.is_comparison:
            return repr(self.best)
        results = self.comparison.results
        stream = io.StringIO()
        console = Terminal(file=stream, width=WIDTH)
        console.print(self.recommendation)
        for warning in self.warnings:
            console.print(f"Warning: {warning}")
        console.print(tables.terminal(results, results["config"]["select"], WIDTH))
        return stream.getvalue().rstrip()

    def _repr_html_(self) -> str:
        """The verdict, the table and the curves, for a notebook."""
        if not self.is_comparison:
            return f"<pre>{html.escape(repr(self.best))}</pre>"
        warnings = "".join(f"<li>{html.escape(text)}</li>" for text in self.warnings)
        draw = functools.partial(
            plots.learning, loss_results=self.comparison.loss_results, column="validation_nll"
        )

        def panel(axes: Any) -> None:
            draw(axes)
            axes.set_ylabel("Validation NLL")
            axes.legend()

        curves = plots.svg("validation", "NLL on validation rows by epoch", panel, CURVES)
        return (
            f"<p><strong>{html.escape(self.recommendation)}</strong></p><ul>{warnings}</ul>"
            f'<div style="overflow-x: auto">{self.summary.to_html()}</div>{curves}'
        )


def _spec(loss: Any) -> str:
    if isinstance(loss, str):
        return loss
    if isinstance(loss, Loss):
        if loss.name in LOSSES:
            raise CompareError(
                f"losses: {loss.name} is a loss of this package; choose another name"
            )
        return register(loss, loss.name)
    return register(loss)


def in_memory(X: Any, y: Any, config: Config) -> Dataset:  # noqa: N803
    """The data set of what :func:`compare_losses` was given.

    Raises:
        CompareError: It is none that can be compared on.
    """
    if isinstance(X, pd.DataFrame):
        content = _of_frame(X, y, config)
        return dataclasses.replace(
            to_dataset(config.data, content, config), class_type=_class_type(X, y)
        )
    if y is None or isinstance(y, str):
        raise CompareError(f"y: expected the classes of the rows, got {y!r}")
    labels = pd.Series(_array(y).reshape(-1))
    features = _features(X, config)
    if len(features) != len(labels):
        raise CompareError(f"y: expected {len(features)} classes, got {len(labels)}")
    content = Content(features, *encode_labels(labels, "y"))
    return dataclasses.replace(
        to_dataset(config.data, content, config), class_type=_class_type(X, y)
    )


def _of_frame(frame: pd.DataFrame, y: Any, config: Config) -> Content:
    """Of a table in memory, whose classes are in a column or apart."""
    if y is not None and not isinstance(y, str):
        labels = _array(y).reshape(-1)
        if len(labels) != len(frame):
            raise CompareError(
                f"y: expected {len(frame)} classes, as X has rows; got {len(labels)}"
            )
        y = next(name for name in ("y", "class", "y of X") if name not in frame)
        frame = frame.assign(**{y: labels})
        config = config.model_copy(update={"target": y})
    return content_of(frame.reset_index(drop=True), "X", config)


def _array(values: Any) -> Any:
    """An array of a tensor, a list, or what else holds values."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _class_type(X: Any, y: Any) -> ClassType:  # noqa: N803
    """What the classes are, before they become names."""
    labels = pd.Series(X[y]) if isinstance(y, str) else pd.Series(_array(y).reshape(-1))
    kinds: dict[str, ClassType] = {
        "boolean": "bool",
        "integer": "int",
        "floating": "float",
        "mixed-integer-float": "float",
    }
    return kinds.get(pd.api.types.infer_dtype(labels, skipna=True), "str")


def _features(X: Any, config: Config) -> Any:  # noqa: N803
    values = _array(X)
    if values.ndim == 1 and values.dtype.kind in "OUT":
        return texts(pd.Series(values.tolist(), name="X"), "X")
    if values.ndim < 2 or values.dtype.kind not in "biuf" or values.size == 0:
        raise CompareError(
            "X: expected a DataFrame, numbers of shape (N, ...), images, texts, or a path or name; "
            f"got {type(X).__name__} of shape {values.shape} and type {values.dtype}"
        )
    if values.dtype == np.uint8 and values.ndim > 2:
        pixels = channels_first(values, config.image_size)
        return Images(pixels, hashlib.sha256(pixels.tobytes()).hexdigest())
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(numbers).all():
        raise CompareError("X: expected finite numbers, of at most 3.4e38; got others")
    return numbers
