"""Attacks on linear models, whose accuracy under attack is known exactly, and on real runs."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import nn
from typer.testing import CliRunner

from penex import cli
from penex.compare.analysis import plots, report, robustness, tables
from penex.compare.analysis.statistics import resplit_interval
from penex.compare.errors import CompareError
from penex.compare.files import read_json, write_json
from penex.compare.finished_runs import read_logits
from penex.compare.output_folder import run_folder
from penex.paper import attacks
from penex.paper import trained_networks as checkpoints
from penex.paper.attacks import Target, accuracies, final

pytest.importorskip("art", reason="adversarial-robustness-toolbox is not installed")
# The toolbox scales tensors to size 1 with a copy of a scalar.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:art")

RADII = {"linf": (0.12, 0.2), "l2": (0.5, 0.8)}


class Linear:
    """K classes, D inputs in [0, 1], a few of whose N labels are wrong."""

    def __init__(self, k: int, d: int = 12, n: int = 90, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.weight = rng.normal(size=(k, d))
        self.bias = 0.1 * rng.normal(size=k)
        self.x = rng.uniform(size=(n, d)).astype(np.float32)
        self.y = (self.x @ self.weight.T + self.bias).argmax(1)
        self.y[:5] = (self.y[:5] + 1) % k

    def target(self, scale: float = 1.0, box: tuple[float, float] | None = None) -> Target:
        k, d = self.weight.shape
        model = nn.Linear(d, k)
        with torch.no_grad():
            model.weight.copy_(torch.tensor(scale * self.weight))
            model.bias.copy_(torch.tensor(scale * self.bias))
        return Target(model, k, box)

    def exact(self, norm: str, radius: float, box: tuple[float, float] | None = None) -> float:
        """The share of rows whose margin to no other class an adversary can overcome."""
        robust = np.ones(len(self.y), bool)
        for other in range(len(self.weight)):
            direction = self.weight[self.y] - self.weight[other]
            margin = (direction * self.x).sum(1) + self.bias[self.y] - self.bias[other]
            if norm == "l2":
                assert box is None
                loss = radius * np.linalg.norm(direction, axis=1)
            else:
                moved = self.x - radius * np.sign(direction)
                moved = moved if box is None else moved.clip(*box)
                loss = (direction * (self.x - moved)).sum(1)
            robust &= (margin > loss) | (self.y == other)
        return float(robust.mean())


@pytest.mark.parametrize(
    ("norm", "box"), [("linf", None), ("linf", (0.0, 1.0)), ("l2", None)], ids=str
)
@pytest.mark.parametrize("k", [2, 4])
def test_accuracy_of_a_linear_model_is_the_exact_one(
    norm: str, box: tuple[float, float] | None, k: int
) -> None:
    linear = Linear(k)
    found = accuracies(linear.target(box=box), linear.x, linear.y, norm, RADII[norm])
    exact = [linear.exact(norm, radius, box) for radius in RADII[norm]]
    assert 0.1 < exact[1] < exact[0] < found[0]["clean"] == 85 / 90
    names = ["pgd", "apgd-ce", *(["apgd-dlr"] if k > 2 else [])]
    for left, share in zip(found, exact, strict=True):
        assert list(left) == ["clean", *names]  # no squares in rows that are no pictures
        assert list(left.values()) == sorted(left.values(), reverse=True)
        # Two classes: there is one way to go. Several: an attack may go for another than the best.
        missed = 0 if k == 2 else 0.06
        assert share - 1e-9 <= list(left.values())[-1] <= share + missed + 1e-9
        assert left["pgd"] <= share + 0.1


def test_the_scale_of_logits_weakens_only_attacks_on_cross_entropy() -> None:
    """As the module says, and the reason why several attacks are made."""
    linear = Linear(4)
    radius = RADII["linf"][1:]
    exact = linear.exact("linf", radius[0])
    for name, blinded in (("pgd", True), ("apgd-ce", True), ("apgd-dlr", False)):
        plain, confident = (
            accuracies(target, linear.x, linear.y, "linf", radius, 0, {name: 30})[0][name]
            for target in (linear.target(), linear.target(scale=1000))
        )
        assert plain == pytest.approx(exact, abs=0.06)
        if blinded:
            assert confident > exact + 0.1
        else:
            assert confident == plain


class Striped(nn.Module):
    """Two classes by the mean of a picture, in a way that has no gradient."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        mean = pixels.mean((1, 2, 3))
        steps = (mean * 1000).round() / 1000 + 0 * mean
        return torch.stack([0.5 - steps, steps - 0.5], 1)


def test_square_needs_no_gradient() -> None:
    rng = np.random.default_rng(0)
    x = np.clip(rng.normal(0.5, 0.05, size=(12, 1, 16, 16)), 0, 1).astype(np.float32)
    x += np.where(np.arange(12) % 2, 0.01, -0.01)[:, None, None, None].astype(np.float32)
    y = (x.mean((1, 2, 3)) > 0.5).astype(np.int64)
    target, steps = Target(Striped(), 2, (0.0, 1.0)), {"pgd": 5, "square": 40}
    left = accuracies(target, x, y, "linf", [0.05], 0, steps)[0]
    assert left["clean"] == 1
    assert left["square"] < 0.5 < left["pgd"]
    small = x[:, :, :8, :8]
    assert "square" not in accuracies(target, small, y, "linf", [0.05], 0, steps)[0]


def test_attacks_stay_within_radius_and_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what an attack returns, only what it may return counts."""
    linear = Linear(3)
    seen: list[np.ndarray] = []
    true = attacks._right

    def right(target: Target, x: np.ndarray, y: np.ndarray) -> Any:
        seen.append(x)
        return true(target, x, y)

    monkeypatch.setattr(attacks, "_right", right)
    accuracies(linear.target(box=(0.0, 1.0)), linear.x, linear.y, "l2", [0.2])
    rows = {row.tobytes() for row in linear.x}
    for moved in seen[1:]:
        assert moved.min() >= 0
        assert moved.max() <= 1
        assert len({row.tobytes() for row in moved} - rows) > 0.5 * len(moved)
    nearest = np.linalg.norm(seen[1][:, None] - linear.x, axis=2).min(1)
    assert 0.1 < nearest.max() <= 0.2 * 1.001
    moved = linear.x[:4] + np.array([[0.3], [0.01], [np.nan], [0.05]], np.float32)
    kept = attacks._within(linear.x[:4], moved, "linf", 0.1, linear.target())
    np.testing.assert_array_equal(kept[[0, 2]], linear.x[[0, 2]])
    np.testing.assert_array_equal(kept[[1, 3]], moved[[1, 3]])


def test_results_depend_on_the_seed_but_not_on_global_generators() -> None:
    linear = Linear(3)
    before = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    moved = []
    for seed in (0, 0, 1):
        with attacks._seeded(seed):
            args = (linear.target(), linear.x, linear.y, "linf", 0.1, 1)
            moved.append(attacks._moved("pgd", *args))
    np.testing.assert_array_equal(moved[0], moved[1])
    assert (moved[0] != moved[2]).any()
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert random.getstate() == before[1]


@pytest.mark.parametrize(
    ("text", "expected"), [("1/255, 0.25", [1 / 255, 0.25]), ("", []), (" 2 ", [2.0])]
)
def test_radii(text: str, expected: list[float]) -> None:
    assert attacks.radii(text) == expected


@pytest.mark.parametrize("text", ["x", "1/0", "1,,inf", "nan"])
def test_invalid_radii_are_refused(text: str) -> None:
    with pytest.raises(CompareError, match="radius: expected a number"):
        attacks.radii(text)


# ---- of a comparison -------------------------------------------------------------------------


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture(scope="module")
def attacked(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison, attacked at two radii."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("attacked") / "out"))
    attack(folder, [0.1, 0.5])
    return folder


def attack(folder: Path, radii: list[float]) -> list[str]:
    """Twenty rows, by ten steps of one attack; what is said of it."""
    lines: list[str] = []
    steps = {"pgd": 10}
    attacks.attack(folder, radii={"linf": radii}, rows=20, steps=steps, say=lines.append)
    return lines


def test_records_are_of_every_checkpoint(attacked: Path) -> None:
    records = robustness.read(attacked)
    runs = [(r["loss"], r["seed"], r["epoch"], r["radius"]) for r in records]
    assert len(set(runs)) == len(runs) == 2 * 2 * 2 * 2
    for record in records:
        assert (record["rows"], record["norm"], record["box"]) == (20, "linf", False)
        assert record["accuracy"]["pgd"] <= record["accuracy"]["clean"]
    weak, strong = records[:2]
    assert final(strong) <= final(weak)


def of_run(folder: Path, spec: str, seed: int, selection: str) -> np.ndarray:
    """The saved test logits of a run at a selection."""
    where = run_folder(folder, spec, seed)
    epoch = read_json(where / "run.json")["epochs"][selection]
    return read_logits(where)[f"test_{epoch}"].astype(np.float64)


def test_clean_accuracy_is_that_of_the_saved_logits(attacked: Path) -> None:
    """The network is the one that gave the logits: same rows, same weights, at each epoch."""
    for record in robustness.read(attacked):
        run = (record["loss"], record["seed"])
        target = read_logits(run_folder(attacked, *run))["test_target"]
        chosen = np.random.default_rng(record["seed"]).permutation(len(target))[:20]
        right = of_run(attacked, *run, record["epoch"]).argmax(1) == target
        assert record["accuracy"]["clean"] == pytest.approx(right[chosen].mean())


@pytest.mark.parametrize("selection", ["refined", "last"])
@pytest.mark.parametrize("spec", ["cross-entropy", "penex"])
def test_a_loaded_network_gives_the_saved_logits(finished: Path, spec: str, selection: str) -> None:
    source = checkpoints.Source(finished)
    state = torch.get_rng_state()
    model, link = checkpoints.load_model(source, spec, 1, selection)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    inputs, _ = source.split(1).test
    saved = of_run(finished, spec, 1, selection)
    with torch.no_grad():
        logits = model(torch.from_numpy(inputs))
        np.testing.assert_allclose(logits.numpy(), saved, atol=1e-5)
        attacked = source.target(spec, 1, selection).model(torch.from_numpy(inputs)).softmax(1)
    scale = {"cross-entropy": 1.0, "penex": 1.1}[spec]
    expected = softmax(scale * saved, axis=1)
    np.testing.assert_allclose(link(logits).exp().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(attacked.numpy(), expected, atol=1e-5)


def test_a_constrained_network_keeps_its_constraint(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make(tmp_path / "out", losses=("conex-hard",), seeds=1, epochs=1)
    source = checkpoints.Source(folder)
    model, _ = checkpoints.load_model(source, "conex-hard", 0, "last")
    inputs, _ = source.split(0).test
    saved = of_run(folder, "conex-hard", 0, "last")
    with torch.no_grad():
        logits = model(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(logits, saved, atol=1e-5)
    np.testing.assert_allclose(logits.sum(1), 0, atol=1e-5)


def test_recorded_attacks_are_not_repeated(attacked: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(attacked, tmp_path / "out"))
    whole = robustness.read(folder)
    marked = [record | {"mark": True} for record in whole[:5]]
    write_json(folder / "robustness.json", marked)
    assert len(attack(folder, [0.5, 0.1])) == 6  # of eight checkpoints two were done
    again = robustness.read(folder)
    assert again[:5] == marked

    def key(record: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(record[name] for name in ("loss", "seed", "epoch", "radius"))

    assert {key(r): r["accuracy"] for r in again} == {key(r): r["accuracy"] for r in whole}
    assert attack(folder, [0.5, 0.1]) == []


def test_refusals(attacked: Path, copy: Path) -> None:
    with pytest.raises(CompareError, match="is of 20 rows; ask for these, or remove it"):
        attacks.attack(attacked, rows=30)
    with pytest.raises(CompareError, match="radius: expected a number above 0, got -1"):
        attacks.attack(copy, radii={"l2": (-1.0,)})
    with pytest.raises(CompareError, match="norm: expected one of linf, l2, got 'l1'"):
        attacks.attack(copy, radii={"l1": (1.0,)})
    with pytest.raises(CompareError, match="rows: expected at least 1, got 0"):
        attacks.attack(copy, rows=0)
    (run_folder(copy, "penex", 0) / "epoch-3.safetensors").write_bytes(b"PK")
    source = checkpoints.Source(copy)
    with pytest.raises(CompareError, match=r"epoch-3\.safetensors is damaged .*; remove "):
        checkpoints.load_model(source, "penex", 0, "last")
    run = run_folder(copy, "penex", 1) / "run.json"
    write_json(run, read_json(run) | {"epochs": {"last": 3}})
    with pytest.raises(CompareError, match="no network for the selection 'nll': the run diverged"):
        checkpoints.load_model(source, "penex", 1, "nll")
    with pytest.raises(CompareError, match="holds no finished run"):
        checkpoints.load_model(source, "penex", 7, "best")
    shutil.rmtree(copy / "runs")
    with pytest.raises(CompareError, match="no finished run yet"):
        attacks.attack(copy)


def test_data_other_than_the_training_data_are_refused(copy: Path) -> None:
    described = read_json(copy / "comparison.json")
    described["data"]["fingerprint"] = "0" * 64
    write_json(copy / "comparison.json", described)
    with pytest.raises(CompareError, match="iris has changed since .* was made: .* was 00000000"):
        attacks.attack(copy)


def test_summary_is_over_seeds(attacked: Path) -> None:
    records = robustness.read(attacked)
    records += [record | {"seed": 2} for record in records if record["seed"] == 0]
    cells = robustness.summary(records, "penex", "refined", "linf")
    assert list(cells) == [0, 0.1, 0.5]
    values = [
        final(record)
        for record in records
        if (record["loss"], record["epoch"], record["radius"]) == ("penex", "refined", 0.1)
    ]
    assert cells[0.1]["mean"] == pytest.approx(np.mean(values))
    interval = resplit_interval(values, test_share=0.25, bounds=(0, 1))
    assert [cells[0.1][name] for name in ("low", "high")] == [interval.low, interval.high]
    assert robustness.summary(records, "penex", "refined", "l2") == {}


def test_the_report_shows_robustness(attacked: Path) -> None:
    comparison = plots.read(attacked)
    results = comparison.results
    report.write(comparison)
    page = (attacked / "report.html").read_text(encoding="utf-8")
    (table,) = tables.robust(results, robustness.read(attacked))
    assert table.radii == ["0", "0.1", "0.5"]
    assert [label for label, _ in table.rows][:2] == [
        "Cross-entropy, lowest validation NLL after temperature scaling",
        "Cross-entropy, last epoch",
    ]
    assert "Under attack" in page
    for _, cells in table.rows:
        for cell in cells:
            assert f"<td>{cell}</td>" in page


def test_command(copy: Path) -> None:
    options = ["attack", str(copy), "--linf", "1/10", "--l2", "", "--rows", "9"]
    done = CliRunner().invoke(cli.app, options)
    assert done.exit_code == 0, done.output
    assert "cross-entropy, seed 0, lowest validation NLL after temperature scaling: " in done.stdout
    assert "% right; L∞ 0.1: " in done.stdout
    assert {record["radius"] for record in robustness.read(copy)} == {0.1}
    assert (copy / "report.html").exists()
    refused = CliRunner().invoke(cli.app, ["attack", str(copy), "--linf", "far"])
    assert refused.exit_code == 2
    assert "got 'far'" in refused.stderr


def test_images_are_attacked_as_pixels(make: Callable[..., Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    target = np.tile(np.arange(3), 20)
    pixels = rng.integers(0, 80, size=(60, 16, 16, 3)) + 60 * target[:, None, None, None]
    arrays = {"images": pixels.astype(np.uint8), "labels": target}
    split = {"train": slice(0, 36), "val": slice(36, 48), "test": slice(48, 60)}
    path = tmp_path / "pictures.npz"
    np.savez(path, **{f"{p}_{n}": a[rows] for p, rows in split.items() for n, a in arrays.items()})
    folder = make(tmp_path / "out", data=str(path), seeds=1, epochs=2, losses=("penex",))
    source = checkpoints.Source(folder)
    x, y = source.test_rows(0, 100)
    assert x.shape == (12, 3, 16, 16)
    assert x.dtype == np.float32
    assert 0 <= x.min() < x.max() <= 1
    attacked = source.target("penex", 0, "last")
    assert attacked.box == (0.0, 1.0)
    with torch.no_grad():
        logits = attacked.model(torch.from_numpy(x)).numpy()
    chosen = np.random.default_rng(0).permutation(12)
    saved = of_run(folder, "penex", 0, "last")[chosen]
    np.testing.assert_allclose(softmax(logits, axis=1), softmax(1.1 * saved, axis=1), atol=1e-5)
    labels = read_logits(run_folder(folder, "penex", 0))["test_target"]
    np.testing.assert_array_equal(y, labels[chosen])
    steps = {"pgd": 2, "square": 3}
    attacks.attack(folder, radii={"linf": (1 / 255,)}, rows=12, steps=steps, say=str)
    (selected, _) = robustness.read(folder)
    assert selected["box"] is True
    assert list(selected["accuracy"]) == ["clean", "pgd", "square"]
    found = checkpoints.test_pictures(folder, 0, np.array([0, 3]))
    np.testing.assert_array_equal(found, arrays["images"][48:][[0, 3]])


def test_texts_are_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    lines = [f"word{row % 3} and more,{row % 3}" for row in range(60)]
    path.write_text("\n".join(["text,label", *lines]))
    options = {"data": str(path), "text": "text", "target": "label", "losses": ("penex",)}
    small = {"dim": 8, "depth": 1, "heads": 2, "mlp": 8}
    folder = make(tmp_path / "out", **options, seeds=1, epochs=1, model_options=small)
    with pytest.raises(CompareError, match="texts holds texts; expected pictures or numbers"):
        attacks.attack(folder)
