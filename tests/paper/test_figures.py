"""Every figure is drawn from saved files and shows their content."""

import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import CLASSES, TEST, calibrated, write
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy.special import softmax
from typer.testing import CliRunner

from penex import cli, functional
from penex.compare.analysis import plots, robustness
from penex.compare.errors import CompareError
from penex.compare.files import write_json
from penex.compare.finished_runs import read_curve
from penex.compare.models.choose import resolve
from penex.compare.output_folder import run_folder
from penex.compare.registry import DEFAULT_LOSSES
from penex.metrics import ece
from penex.paper import figures
from penex.paper import trained_networks as checkpoints
from penex.paper.figures import NothingToShowError

Make = Callable[..., Path]
SWEEP = ("cross-entropy", "penex=0.01", "penex=0.1", "penex=1", "focal=0", "focal=2")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Losses at several values of their hyperparameters, never trained."""
    test = {
        spec: [calibrated(TEST, 1.5 + 0.2 * place, seed) for seed in range(2)]
        for place, spec in enumerate(SWEEP)
    }
    last = {spec: [2 * logits for logits in runs] for spec, runs in test.items()}
    seconds = dict.fromkeys(SWEEP, 0.01)
    return write(tmp_path_factory.mktemp("sweep") / "out", test, last=last, seconds=seconds)


@pytest.fixture(scope="module")
def plane(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"data": "two-gaussians", "train_size": 100, "losses": ("cross-entropy", "penex=0.5")}
    return make(tmp_path_factory.mktemp("plane") / "out", **options, seeds=1, epochs=5, lr=0.05)


@pytest.fixture(scope="module")
def attacked(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison with accuracies under attack that were never measured."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("attacked") / "out"))
    records = [
        {
            "loss": spec,
            "seed": seed,
            "epoch": epoch,
            "norm": norm,
            "radius": radius,
            "box": True,
            "asked": 10,
            "rows": 10,
            "test_share": 0.25,
            "accuracy": {"clean": 0.9, "pgd": 0.8 - 0.1 * seed - radius},
        }
        for spec in ("cross-entropy", "penex")
        for seed in range(2)
        for epoch in ("refined", "last")
        for norm, radius in (("linf", 2 / 255), ("l2", 0.25))
    ]
    write_json(folder / robustness.FILE, records)
    return folder


def several(folders: Sequence[Path]) -> list[plots.Comparison]:
    return [plots.read(folder) for folder in folders]


def drawn(name: str, *folders: Path) -> Figure:
    return figures.draw(name, several(folders))


def line(figure: Figure, label: str, axes: int = 0) -> Any:
    """The data of the line or the error bars called `label` in a panel."""
    handles, labels = figure.axes[axes].get_legend_handles_labels()
    handle: Any = handles[labels.index(label)]
    found = handle[0] if isinstance(handle, tuple) else handle
    return np.array(found.get_data(orig=False))


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_drawn(
    name: str, sweep: Path, plane: Path, attacked: Path, tmp_path: Path
) -> None:
    folders = {
        "curves": [sweep, plane],  # of several comparisons at once
        "decision-regions": [plane],
        "robustness": [attacked, sweep],
    }
    path = tmp_path / "picture.png"
    figures.save(name, several(folders.get(name, [sweep])), path)
    picture = imread(path)
    assert picture[..., :3].std() > 0.02
    assert picture.shape[0] > 300


@pytest.mark.parametrize("suffix", figures.FORMATS)
def test_a_file_is_the_same_each_time(suffix: str, finished: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.{suffix}" for n in "ab"]
    for path in paths:
        figures.save("margins", several([finished]), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_names() -> None:
    assert figures.names([]) == list(figures.FIGURES)
    assert figures.names(["margins", "curves", "margins"]) == ["margins", "curves"]
    with pytest.raises(CompareError, match=r"figures: none is called 'x'\. Known: curves, alpha"):
        figures.names(["x"])
    with pytest.raises(CompareError, match="none is called 'x'"):
        figures.draw("x", [])


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("alpha-sweep", "PENEX was not trained at two values"),
        ("gradient-norm", "PENEX was not trained at two values"),
        ("calibration-strength", "no loss was trained at two values"),
        ("decision-regions", "no comparison is of data with two features"),
        ("robustness", "no comparison was attacked; run penex attack first"),
    ],
)
def test_missing_data_is_reported(finished: Path, name: str, missing: str) -> None:
    with pytest.raises(NothingToShowError, match=missing):
        drawn(name, finished)


def test_curves_are_means_over_seeds(sweep: Path) -> None:
    figure = drawn("curves", sweep)
    columns = ("train_nll", "validation_nll", "train_accuracy", "validation_accuracy")
    for axes, column in enumerate(columns):
        runs = [read_curve(run_folder(sweep, "penex=0.1", seed))[column] for seed in range(2)]
        factor = 100 if "accuracy" in column else 1
        epochs, values = line(figure, "PENEX α=0.1", axes)
        np.testing.assert_array_equal(epochs, np.arange(1, 21))
        np.testing.assert_allclose(values, factor * np.mean(runs, axis=0))
    assert figure.axes[2].get_ylabel() == "Accuracy, %"


@pytest.mark.parametrize("selection", ["nll", "last"])
def test_alpha_sweep_shows_test_metrics(sweep: Path, selection: str) -> None:
    figure = drawn("alpha-sweep", sweep)
    title = {"nll": "Lowest validation NLL", "last": "Last epoch"}[selection]
    alphas, errors = line(figure, title, axes=2)
    np.testing.assert_array_equal(alphas, [0.01, 0.1, 1])
    for alpha, shown in zip(alphas, errors, strict=True):
        place = SWEEP.index(f"penex={alpha:g}")
        factor = 2 if selection == "last" else 1
        own = [ece(factor * calibrated(TEST, 1.5 + 0.2 * place, seed), TEST) for seed in range(2)]
        assert shown == pytest.approx(np.mean(own), abs=1e-6)
    assert figure.axes[0].get_ylabel() == "Accuracy on test rows, %"
    assert 30 < line(figure, title, axes=0)[1].min() <= 100


def test_calibration_has_a_panel_for_each_loss_that_was_swept(sweep: Path) -> None:
    figure = drawn("calibration-strength", sweep)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "made-up: Focal",
        "made-up: PENEX",
    ]
    strengths, values = line(figure, "Last epoch", axes=0)
    np.testing.assert_array_equal(strengths, [0, 2])
    assert (values < 0).all()
    assert figure.axes[0].get_xlabel() == "Gamma γ"
    assert figure.axes[1].get_xscale() == "log"


def test_gradient_norm_is_that_of_the_curves(sweep: Path, tmp_path: Path) -> None:
    alphas, norms = line(drawn("gradient-norm", sweep), "Mean over training")
    for alpha, norm in zip(alphas, norms, strict=True):
        own = [
            read_curve(run_folder(sweep, f"penex={alpha:g}", seed))["gradient_norm"].mean()
            for seed in (0, 1)
        ]
        assert norm == pytest.approx(np.mean(own))
    old = Path(shutil.copytree(sweep, tmp_path / "old"))
    for path in (old / "runs").glob("*/*/curve.csv"):
        path.write_text(path.read_text().replace("gradient_norm", "something"))
    with pytest.raises(NothingToShowError, match="no column gradient_norm"):
        drawn("gradient-norm", old)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_curve_has_the_norm_before_clipping(
    make: Make, tmp_path: Path, clip: float | None
) -> None:
    """In one step on all rows it is that of the fresh network's gradient."""
    options = {"losses": ("cross-entropy",), "seeds": 1, "epochs": 1, "batch_size": 1000}
    folder = make(tmp_path / "out", **options, gradient_clip=clip)
    source = checkpoints.Source(folder)
    features, target = source.split(0).train
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, _ = resolve(None, source.dataset).build(features, 3)
    loss = F.cross_entropy(network(torch.from_numpy(features)), torch.from_numpy(target))
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    norm = math.sqrt(sum(float(each.double().square().sum()) for each in gradients))
    found = read_curve(run_folder(folder, "cross-entropy", 0))["gradient_norm"]
    assert found == pytest.approx([norm], rel=1e-4)


def test_error_histogram_counts_the_rows(sweep: Path) -> None:
    figure = drawn("error-histogram", sweep)
    errors = []
    for seed in range(2):
        probability = softmax(calibrated(TEST, 1.5 + 0.2 * SWEEP.index("penex=1"), seed), axis=1)
        errors.append(1 - probability[np.arange(len(TEST)), TEST])
    counts, edges = np.histogram(np.concatenate(errors), bins=20, range=(0, 1))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    outline = handles[labels.index("PENEX α=1")].get_xy()
    heights = {round(x, 6): y for x, y in outline[1:-1:2]}
    for left, count in zip(edges, counts, strict=False):
        assert heights[round(left, 6)] == pytest.approx(100 * count / counts.sum(), abs=1e-6)


def test_robustness_is_drawn_in_steps_of_a_pixel(attacked: Path) -> None:
    figure = drawn("robustness", attacked)
    radii, accuracy = line(figure, "PENEX", axes=0)
    np.testing.assert_allclose(radii, [0, 2])
    np.testing.assert_allclose(accuracy, [90, 75 - 200 / 255])
    radii, _ = line(figure, "PENEX", axes=1)
    np.testing.assert_allclose(radii, [0, 0.25])
    assert "L2" in figure.axes[1].get_xlabel()


def test_qualitative_shows_the_largest_probabilities(sweep: Path) -> None:
    figure = drawn("qualitative", sweep)
    losses = ["Cross-entropy", "Focal γ=0", "PENEX α=0.01"]  # the first of every loss
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert sorted(filter(None, titles)) == losses
    first, *bars = figure.axes[:4]
    row = int(re.search(r"row (\d+)", first.texts[0].get_text())[1])  # type: ignore[index]
    logits = calibrated(TEST, 1.5 + 0.2 * SWEEP.index("penex=0.01"), 0)
    probability = softmax(logits[row])
    panel = bars[titles[1:4].index("PENEX α=0.01")]
    shown = [text.get_text() for text in panel.texts]
    order = np.argsort(-probability, kind="stable")
    assert shown == [f"{CLASSES[k]}  {probability[k]:.2f}" for k in order]
    assert first.texts[0].get_text() == f"{CLASSES[TEST[row]]}\nrow {row}"


def test_qualitative_needs_seed_0(tmp_path: Path) -> None:
    test = {"cross-entropy": [None, calibrated(TEST, 2, 0)]}
    with pytest.raises(NothingToShowError, match="Cross-entropy has no finite run at seed 0"):
        drawn("qualitative", write(tmp_path / "out", test))


def test_reliability_without_a_seed_in_common(tmp_path: Path) -> None:
    logits = calibrated(TEST, 2, 0)
    folder = write(tmp_path / "out", {"cross-entropy": [logits, None], "focal=0": [None, logits]})
    titles = [axes.get_title(loc="left") for axes in drawn("reliability", folder).axes]
    assert titles == ["Cross-entropy\nmade-up", "Focal γ=0\nmade-up"]


def test_one_colour_and_dash_for_each_loss() -> None:
    specs = [*DEFAULT_LOSSES, *(f"penex={n}" for n in range(1, 13))]
    looks = plots.line_styles(specs)
    assert len(set(looks.values())) == len(specs)
    assert [looks[spec].colour for spec in DEFAULT_LOSSES] == list(plots.COLOURS)
    assert plots.line_styles(["penex=0.3"])["penex=0.3"] == looks["penex"]


# ---- of functions ----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_binary_loss_is_the_loss(alpha: float, share: float) -> None:
    """Of the package itself, by its values and by its gradient along (m/2, -m/2)."""
    rho = share * alpha / 2
    margin = torch.linspace(-6, 10, 33, dtype=torch.float64, requires_grad=True)
    logits = torch.stack([margin / 2, -margin / 2], 1)
    target = torch.zeros(33, dtype=torch.int64)
    options = {"sensitivity": alpha, "penalty": rho, "reduction": "none"}
    loss = functional.penex_loss(logits, target, **options)
    at = margin.detach().numpy()
    shown = figures._binary_penex(at, alpha, rho, False)
    expected = loss.detach().numpy() / alpha
    np.testing.assert_allclose(np.diff(shown), np.diff(expected), rtol=1e-9, atol=1e-12)
    zero = figures._binary_penex(np.zeros(1), alpha, rho, False)
    assert zero == pytest.approx(math.log(2))
    (slope,) = torch.autograd.grad(loss.sum(), margin)
    shown = figures._binary_penex(at, alpha, rho, True)
    np.testing.assert_allclose(shown, slope.numpy() / alpha, rtol=1e-9, atol=1e-12)


def test_binary_cross_entropy_is_that_of_torch() -> None:
    margin = torch.linspace(-6, 10, 33, dtype=torch.float64, requires_grad=True)
    logits = torch.stack([margin / 2, -margin / 2], 1)
    loss = F.cross_entropy(logits, torch.zeros(33, dtype=torch.int64), reduction="none")
    at = margin.detach().numpy()
    np.testing.assert_allclose(figures._binary_ce(at, False), loss.detach().numpy(), rtol=1e-9)
    (slope,) = torch.autograd.grad(loss.sum(), margin)
    np.testing.assert_allclose(figures._binary_ce(at, True), slope.numpy(), rtol=1e-9)


def test_border_and_distances_of_lines() -> None:
    """Three classes whose regions meet along straight lines."""
    x, y = np.linspace(-2, 2, 60), np.linspace(-1, 3, 47)
    grid = np.stack(np.meshgrid(x, y), -1)
    weight, bias = np.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -2.0]]), np.array([0.1, 0.0, 0.4])
    scores = grid @ weight.T + bias
    edge = figures.border(x, y, scores)
    ordered = np.sort(edge @ weight.T + bias, axis=1)
    close = ordered[:, 2] - ordered[:, 1]
    assert np.median(close) < 1e-9
    assert np.mean(close < 1e-9) > 0.95  # but for cells in which three regions meet
    two = figures.border(x, y, scores[..., :2])
    rows = np.random.default_rng(0).uniform([-1, 0], [1, 2], size=(50, 2))
    difference, offset = weight[0] - weight[1], bias[0] - bias[1]
    exact = np.abs(rows @ difference + offset) / np.linalg.norm(difference)
    np.testing.assert_allclose(figures.distances(rows, two), exact, atol=0.04)
    assert (figures.distances(rows, two[:0]) == np.inf).all()


def test_decision_regions_are_of_the_networks(plane: Path) -> None:
    view = checkpoints.plane(plane, ["cross-entropy", "penex=0.5"], points=50)
    assert view is not None
    assert list(view.scores) == ["Cross-entropy", "PENEX α=0.5", checkpoints.SVM]
    assert len(view.features) == 100
    source = checkpoints.Source(plane)
    model, _ = checkpoints.load_model(source, "penex=0.5", 0, "last")
    at = np.array([[view.x[7], view.y[31]]], np.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(at)).numpy()[0]
    np.testing.assert_allclose(view.scores["PENEX α=0.5"][31, 7], logits, atol=1e-5)
    for name, scores in view.scores.items():
        assert scores.shape == (50, 50, 2)
        assert view.wrong[name].mean() < 0.3
        # The nearest point of the grid mostly says what is said of the row itself.
        columns = np.abs(view.features[:, :1] - view.x).argmin(1)
        lines = np.abs(view.features[:, 1:] - view.y).argmin(1)
        agree = (scores[lines, columns].argmax(1) != view.target) == view.wrong[name]
        assert agree.mean() > 0.9
    titles = [axes.get_title(loc="left") for axes in drawn("decision-regions", plane).axes]
    wrong = view.wrong["Cross-entropy"].sum()
    assert titles[0].startswith(f"Cross-entropy: {wrong} wrong\nSmallest margin ")


# ---- the whole -------------------------------------------------------------------------------


def test_pyplot_is_not_imported(sweep: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from penex.compare.analysis import plots, report; from penex.paper import figures\n"
        "one = plots.read(Path(sys.argv[1]))\n"
        "figures.save('curves', [one], Path(sys.argv[2], 'curves.svg'))\n"
        "report.merge([one], Path(sys.argv[2]))\n"
        "print({'matplotlib.pyplot', 'art'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(sweep), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert {path.name for path in tmp_path.iterdir()} >= {"curves.svg", "report.html"}


def test_the_users_matplotlib_settings_are_neither_used_nor_changed(
    finished: Path, tmp_path: Path
) -> None:
    comparisons = several([finished])
    figures.save("margins", comparisons, tmp_path / "a.svg")
    with mpl.rc_context({"axes.xmargin": 0.3, "xtick.major.size": 9, "font.size": 20}):
        before = dict(mpl.rcParams)
        figures.save("margins", comparisons, tmp_path / "b.svg")
        assert dict(mpl.rcParams) == before
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_missing_data_removes_only_the_figures_that_need_it(
    make: Make, plane: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    np.savez(path, X=rng.normal(size=(60, 2)), y=np.tile([0, 1], 30))
    folder = make(tmp_path / "out", data=str(path), seeds=1, epochs=1)
    path.unlink()
    assert drawn("qualitative", folder).axes
    with pytest.raises(CompareError, match=re.escape(str(path))):
        drawn("decision-regions", folder)


def test_a_formula_in_a_name_is_text(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "a$_{x$ and $y.npz"
    np.savez(path, X=np.random.default_rng(0).normal(size=(60, 2)), y=np.tile([0, 1], 30))
    folder = make(tmp_path / "out", data=str(path), seeds=1, epochs=1)
    for name in ("margins", "qualitative", "decision-regions"):
        figures.save(name, several([folder]), tmp_path / f"{name}.png")


def test_command(sweep: Path, finished: Path, tmp_path: Path) -> None:
    options = ["figures", str(finished), "--format", "svg", "--out", str(tmp_path / "figures")]
    done = CliRunner().invoke(cli.app, options)
    assert done.exit_code == 0, done.output
    saved = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"curves", "margins", "reliability", "qualitative", "binary-loss"} <= saved
    assert "alpha-sweep left out: PENEX was not trained at two values" in done.stdout
    assert set(figures.FIGURES) - saved == {
        name for name in figures.FIGURES if f"{name} left out" in done.stdout
    }
    both = [str(sweep), str(finished), "--only", "curves", "--only", "margins"]
    done = CliRunner().invoke(cli.app, ["figures", *both, "--out", str(tmp_path / "both")])
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"curves.png", "margins.png"}
    for name, message in (("x", "none is called 'x'"), ("alpha-sweep", "not trained at two")):
        refused = CliRunner().invoke(cli.app, ["figures", str(finished), "--only", name])
        assert refused.exit_code == 2
        assert message in refused.stderr
    assert not (finished / "figures").exists()


def test_help_names_every_figure() -> None:
    help = CliRunner().invoke(cli.app, ["figures", "--help"], terminal_width=500).stdout
    assert all(name in help for name in figures.FIGURES)
