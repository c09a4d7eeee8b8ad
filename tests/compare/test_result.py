"""Comparisons from Python: data of any kind, the returned model, and its saved bundle."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save
from torch import nn
from typer.testing import CliRunner

import penex
from penex import cli
from penex.compare.config import Config
from penex.compare.data.split import draw_rows
from penex.compare.errors import CompareError
from penex.compare.files import read_json
from penex.compare.finished_runs import read_logits
from penex.compare.models.classifier import Classifier
from penex.compare.output_folder import run_folder
from penex.compare.result import Result, compare_losses, in_memory, load
from penex.metrics import accuracy, nll

SMALL: dict[str, Any] = {
    "losses": ["cross-entropy", "penex"],
    "seeds": 2,
    "epochs": 2,
    "jobs": 1,
    "quiet": True,
}
TINY = {"dim": 16, "depth": 1, "heads": 2, "mlp": 16, "dropout": 0.0}
ROWS = 240
Y = np.random.default_rng(1).integers(2, size=ROWS)


def table() -> pd.DataFrame:
    """Every kind of column, each with words for missing values, and one that says nothing."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "number": np.where(rng.random(ROWS) < 0.2, np.nan, rng.normal(Y)),
            "few": rng.choice(["a", "b", "007", "?"], ROWS),
            "texts": [f"{rng.choice(list('xyz'))}, number {i} <b>" for i in range(ROWS)],
            "date": pd.date_range("2020-01-31", periods=ROWS, freq="D").strftime("%d/%m/%Y"),
            "at": pd.date_range("2020-01-31 07:30", periods=ROWS, freq="7h").astype(str),
            "same": "constant",
            "label": np.where(Y, "yes", "no"),
        }
    )
    frame.loc[::7, "date"] = None
    return frame


def texts() -> list[str]:
    return [f"{'good' if label else 'bad'} word{i % 7} x" for i, label in enumerate(Y)]


def images() -> np.ndarray:
    noise = np.random.default_rng(2).integers(100, size=(ROWS, 9, 8, 3))
    return (noise + 100 * Y[:, None, None, None]).astype(np.uint8)


def numbers() -> np.ndarray:
    return np.random.default_rng(3).normal(Y[:, None], 1.0, (ROWS, 4)).astype(np.float32)


KINDS: dict[str, tuple[Callable[[], Any], Any, dict[str, Any]]] = {
    "table": (table, "label", {}),
    "texts": (texts, Y, {"model_options": TINY}),
    "images": (images, Y, {}),
    "numbers": (numbers, Y, {}),
    "arrays": (lambda: numbers().reshape(ROWS, 2, 2), Y, {}),
}


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest) -> tuple[Result, Any, Any, dict[str, Any]]:
    """A result with its data and settings."""
    make, y, options = KINDS[request.param]
    return compare_losses(make(), y, **SMALL, **options), make(), y, options


@pytest.fixture(scope="module")
def result() -> Result:
    return compare_losses(table(), "label", **SMALL, name="tickets")


def test_predictions_are_the_saved_logits_bit_for_bit(
    made: tuple[Result, Any, Any, dict[str, Any]], tmp_path: Path
) -> None:
    """Of the run, of the bundle elsewhere, and from a process that never saw the data."""
    result, X, y, options = made  # noqa: N806
    config = Config(data="data", epochs=2, seeds=2, **options)
    dataset = in_memory(X, y, config.model_copy(update={"target": "label"}))
    for loss in ("cross-entropy", "penex"):
        test = draw_rows(dataset, 1, config)[2]
        rows = X.iloc[test] if isinstance(X, pd.DataFrame) else [X[row] for row in test]
        rows = rows if isinstance(X, list | pd.DataFrame) else np.array(rows)
        run = run_folder(result.folder, loss, 1)
        epoch = read_json(run / "run.json")["epochs"]["refined"]
        saved = read_logits(run)[f"test_{epoch}"]
        model = result.model(loss, 1)
        np.testing.assert_array_equal(model.logits(rows), saved)
        moved = Path(shutil.move(model.save(tmp_path / loss), tmp_path / "else" / "where" / loss))
        again = load(moved).best
        np.testing.assert_array_equal(again.logits(rows), saved)
        proba = again.predict_proba(rows)
        np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-12)
        np.testing.assert_array_equal(again.predict(rows), again.classes_[proba.argmax(1)])
        # The metrics of the table are those of these probabilities.
        row = result.table.query("loss == @loss and seed == 1").iloc[0]
        target = dataset.target[test]
        assert nll(np.log(proba), target) == pytest.approx(row["nll_scaled"], rel=1e-5)
        assert accuracy(np.log(proba), target) == pytest.approx(row["accuracy"])


def test_onnx_gives_the_probabilities(
    made: tuple[Result, Any, Any, dict[str, Any]], tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    result, X, _, _ = made  # noqa: N806
    best = result.best
    what = best.export(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {"rows": best.encode(X[:11])})
    np.testing.assert_allclose(found, best.predict_proba(X[:11]), atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata == {"classes": json.dumps(best.classes_.tolist()), "input": what}


def test_refitting_includes_the_validation_rows(
    made: tuple[Result, Any, Any, dict[str, Any]],
) -> None:
    result, X, y, _ = made  # noqa: N806
    refit = result.refit(loss="penex")
    epochs = [run["epochs"]["refined"] for run in result.comparison.finished("penex")]
    assert refit.description.epoch == round(np.mean(epochs))
    before = (result.folder / "refit" / "penex" / "weights.safetensors").read_bytes()
    assert len(before) > 100
    again = load(result.folder).refit(X, y, loss="penex")  # is there already
    np.testing.assert_array_equal(again.logits(X[:9]), refit.logits(X[:9]))
    assert not np.array_equal(refit.logits(X[:9]), result.model("penex").logits(X[:9]))


def test_table_summary_and_report_of_a_result(result: Result, tmp_path: Path) -> None:
    assert list(result.table["loss"]) == ["cross-entropy", "cross-entropy", "penex", "penex"]
    assert list(result.table["seed"]) == [0, 1, 0, 1]
    assert result.table["knob"].isna().tolist() == [True, True, False, False]
    assert {"nll", "accuracy", "ece_scaled", "epoch", "temperature"} <= set(result.table.columns)
    assert list(result.summary.index) == ["Majority class", "Cross-entropy", "PENEX"]
    assert result.recommendation.startswith("No recommendation yet: ")
    assert any("validation rows" in warning for warning in result.warnings)
    assert result.recommendation[:40] in repr(result)
    page = result._repr_html_()
    assert result.recommendation[:40] in page
    assert "<svg" in page
    assert "<table" in page
    report = result.report(tmp_path / "deep" / "report.html").read_text()
    assert "tickets" in report
    kept = penex.load(result.save(tmp_path / "kept"))
    pd.testing.assert_frame_equal(kept.table, result.table)
    assert (tmp_path / "kept" / "report.html").exists()
    with pytest.raises(CompareError, match="expected a new one, .* exists"):
        result.save(tmp_path / "kept")


def test_without_a_folder_nothing_is_left_on_disk() -> None:
    made = compare_losses(numbers(), Y, **SMALL | {"seeds": 1, "epochs": 1})
    folder = made.folder
    assert folder.exists()
    del made
    assert not folder.exists()


def test_a_given_folder_is_continued(tmp_path: Path) -> None:
    first = compare_losses(numbers(), Y, **SMALL | {"seeds": 1}, out=tmp_path / "out")
    assert len(first.table) == 2
    run = run_folder(tmp_path / "out", "penex", 0) / "run.json"
    before = run.stat().st_mtime_ns
    second = compare_losses(numbers(), Y, **SMALL, out=tmp_path / "out")
    assert len(second.table) == 4
    assert run.stat().st_mtime_ns == before
    with pytest.raises(CompareError, match="data was data with 240 rows"):
        compare_losses(numbers() + 1, Y, **SMALL, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (Y, np.integer),
        (Y.astype(bool), np.bool_),
        (Y / 2, np.floating),
        (np.where(Y, "b", "a"), np.str_),
        (torch.from_numpy(Y), np.integer),
        (Y[:, None], np.integer),
    ],
)
def test_predicted_classes_have_the_original_type(labels: Any, kind: type) -> None:
    made = compare_losses(numbers(), labels, **SMALL | {"seeds": 1, "losses": ["penex"]})
    assert np.issubdtype(made.best.classes_.dtype, kind)
    np.testing.assert_array_equal(made.best.classes_, np.unique(labels))


def test_a_path_is_accepted_as_data(tmp_path: Path) -> None:
    table().to_csv(tmp_path / "rows.csv", index=False)
    made = compare_losses(tmp_path / "rows.csv", target="label", **SMALL | {"seeds": 1})
    assert made.best.classes_.tolist() == ["no", "yes"]
    assert compare_losses("iris", **SMALL | {"seeds": 1}).best.predict(np.zeros((1, 4))).size == 1


def net(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Linear(shape[0], num_classes)


def test_a_user_defined_network(tmp_path: Path) -> None:
    """Found again in the process; elsewhere only where it is trusted or given."""
    made = compare_losses(numbers(), Y, **SMALL | {"seeds": 1}, model=net)
    assert isinstance(made.best.network, nn.Linear)
    folder = made.best.save(tmp_path / "model")
    path = folder / "model.json"
    path.write_text(path.read_text().replace(f"{__name__}:net", "elsewhere:net"))
    with pytest.raises(CompareError, match="elsewhere:net is user-defined"):
        _ = load(folder).best
    with pytest.raises(CompareError, match="model: cannot import elsewhere"):
        load(folder, trust=True)


def test_a_pretrained_tokenizer_is_not_part_of_a_classifier(result: Result, tmp_path: Path) -> None:
    about = replace(result.best.description, kind="text", network="transformers:some/model")
    with pytest.raises(CompareError, match="its tokenizer is not saved with it"):
        Classifier(about, tmp_path)


@pytest.mark.parametrize(
    ("X", "y", "settings", "message"),
    [
        (numbers(), Y, {"epoch": 3}, r"^epoch: unknown setting. Did you mean 'epochs'\?"),
        (numbers(), Y, {"data": "iris"}, "^data: expected in the place of X"),
        (numbers(), None, {}, "^y: expected the classes of the rows, got None"),
        (numbers(), Y[:-1], {}, "^y: expected 240 classes, got 239"),
        (numbers()[:, :1] * np.nan, Y, {}, "^X: expected finite numbers"),
        (np.array(3.0), Y, {}, "^X: expected a DataFrame, .* got ndarray of shape "),
        ("iris", Y, {}, "^y: iris is a data set in files"),
        (table(), "labels", {}, r"^X has no column 'labels'; .* Did you mean 'label'\?"),
        (texts(), np.zeros(ROWS), {}, "expected at least 2 classes"),
        (numbers(), Y, {"losses": ["penx"]}, "did you mean penex"),
    ],
)
def test_refused(X: Any, y: Any, settings: dict[str, Any], message: str) -> None:  # noqa: N803
    with pytest.raises(CompareError, match=message):
        compare_losses(X, y, **settings)


# New rows


def test_rows_unlike_the_training_rows_are_refused(result: Result) -> None:
    best, frame = result.best, table()
    for rows, message in (
        (frame.drop(columns="few"), r"expected also the columns 'few'; got 'number', .*"),
        (frame.assign(number="much"), "column 'number' held numbers in training; .*much"),
        (frame.assign(date="tomorrow"), "column 'date' held dates in training; .*tomorrow"),
        (frame.assign(number=np.inf), "column 'number' .* infinite"),
        (frame.to_numpy(), "expected a DataFrame, got ndarray of shape"),
    ):
        with pytest.raises(CompareError, match=f"^rows: {message}"):
            best.predict(rows)
    # What training did not have counts for nothing; columns that it did not use may be missing.
    new = frame.assign(few="unknown", number=None).drop(columns=["same", "label"])
    assert np.isfinite(best.predict_proba(new)).all()
    assert best.predict(frame[:0]).shape == (0,)


def test_a_table_is_read_as_in_training(result: Result) -> None:
    """As text, with words for missing values, in another order, and with numbers as text."""
    frame = table()
    expected = result.best.predict_proba(frame)
    text = frame.astype(object).where(frame.notna(), "NA").astype(str)
    backwards = text[text.columns[::-1]]
    np.testing.assert_array_equal(result.best.predict_proba(backwards), expected)


# Folders from strangers


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.json", b"{", "is damaged"),
        ("model.json", b"[]", "is damaged"),
        ("model.json", b'{"format": 99}', "has format 99"),
        ("model.json", b'{"format": 1}', "is damaged"),
        ("model.safetensors", b"PK", "is damaged"),
        ("model.safetensors", save({}), "is damaged"),
        ("weights.safetensors", b"PK", "is damaged"),
        ("weights.safetensors", save({}), "is of another network"),
    ],
)
def test_a_damaged_bundle_is_refused(
    result: Result, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    folder = result.best.save(tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(CompareError, match=message):
        _ = load(folder).best


def test_a_bundle_contains_no_pickle(result: Result, tmp_path: Path) -> None:
    folder = result.best.save(tmp_path / "model")
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.json", "model.safetensors", "weights.safetensors"}
    assert not [path for path in result.folder.rglob("*") if path.suffix in (".ckpt", ".pkl")]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="holds no comparison"):
        load(tmp_path)


# The commands


def run(*words: str | Path) -> str:
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_predict_and_export(result: Result, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "out")
    rows = tmp_path / "rows.csv"
    table().drop(columns="label").to_csv(rows, index=False)
    found = pd.read_csv(io.StringIO(run("predict", folder, rows)))
    assert list(found.columns) == ["row", "class", "p(no)", "p(yes)"]
    expected = result.best.predict_proba(table())
    np.testing.assert_allclose(found[["p(no)", "p(yes)"]], expected, rtol=1e-12)
    run("predict", folder, rows, "--loss", "penex", "--out", tmp_path / "new" / "p.csv")
    found = pd.read_csv(tmp_path / "new" / "p.csv")
    np.testing.assert_allclose(found["p(no)"], result.model("penex").predict_proba(table())[:, 0])
    run("export", folder, tmp_path / "bundle", "--loss", "penex")
    shutil.rmtree(folder)
    assert run("predict", tmp_path / "bundle", rows) == found.to_csv(index=False)
    refused = CliRunner().invoke(
        cli.app, ["predict", str(tmp_path / "bundle"), str(rows), "--refit"]
    )
    assert (refused.exit_code, "holds one classifier" in refused.stderr) == (2, True)


def test_predict_texts_and_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    words = compare_losses(texts(), Y, **SMALL | {"seeds": 1}, model_options=TINY)
    (tmp_path / "new.txt").write_text("good word1 x\nbad word2 x\n")
    folder = words.best.save(tmp_path / "words")
    found = pd.read_csv(io.StringIO(run("predict", folder, tmp_path / "new.txt")))
    expected = words.best.predict_proba(["good word1 x", "bad word2 x"])[:, 1]
    np.testing.assert_allclose(found["p(1)"], expected)
    seen = compare_losses(images(), Y, **SMALL | {"seeds": 1})
    (tmp_path / "pictures").mkdir()
    for number in (0, 1):
        image.fromarray(images()[number]).save(tmp_path / "pictures" / f"{number}.png")
    folder = seen.best.save(tmp_path / "seen")
    found = pd.read_csv(io.StringIO(run("predict", folder, tmp_path / "pictures")))
    assert list(found["row"]) == ["0.png", "1.png"]
    np.testing.assert_allclose(found["p(1)"], seen.best.predict_proba(images()[:2])[:, 1])
