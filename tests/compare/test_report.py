"""The report of real, tiny comparisons: what it shows is what was saved, and it stands alone."""

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.image import imread
from sklearn.metrics import log_loss
from typer.testing import CliRunner

from penex import cli
from penex.compare import plots, report, tables
from penex.compare.analysis import curves, summarize
from penex.compare.errors import CompareError
from penex.compare.store import read_logits, run_folder
from penex.metrics import METRICS, ece

HOSTILE = ('<script>alert("1")</script>', "a & b_{c} $x$ 50 %", "'><img src=x onerror=alert(2)>")
VOID = {"br", "meta"}


class Page(HTMLParser):
    """The text of a page, cell by cell, and what an honest browser would stumble over."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.source = (folder / "report.html").read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [str(value) for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += f"{data.strip()} " if data.strip() else ""


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def written(folder: Path) -> tuple[dict[str, Any], Page]:
    return report.write(folder), Page(folder)


def spoil(folder: Path, spec: str, seed: int, *names: str) -> None:
    """Make a run one that diverged, at the epochs of `names`."""
    path = run_folder(folder, spec, seed) / "logits.npz"
    arrays = read_logits(path.parent)
    for name in names:
        arrays[f"test_{name}"][0, 0] = np.nan
    np.savez(path, **arrays)


def test_stands_alone(copy: Path) -> None:
    _, page = written(copy)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "xlink:href", "src", "action", "data"):
            assert str(value).startswith("#")
        if not name.startswith("xmlns"):
            assert "//" not in str(value)
    assert all(link.startswith("#") for link in re.findall(r"url\((.*?)\)", page.source))
    assert "@import" not in page.source


def test_ids_are_unique_and_links_lead_to_them(copy: Path) -> None:
    _, page = written(copy)
    links = re.findall(r"(?:href=\"|url\()#([^\")]+)", page.source)
    assert len(links) > 20
    assert len(set(page.ids)) == len(page.ids)
    assert set(links) <= set(page.ids)


def test_every_picture_is_described(copy: Path) -> None:
    _, page = written(copy)
    described = [value for name, value in page.attributes if name == "aria-label"]
    pictures = len([value for name, value in page.attributes if (name, value) == ("role", "img")])
    assert pictures == page.tags.count("figure") == 2 + 2 + 1
    assert len(described) >= pictures
    assert all(described)


def test_tables_show_what_results_json_holds(copy: Path) -> None:
    _, page = written(copy)
    results = json.loads((copy / "results.json").read_text(encoding="utf-8"))
    shown = iter(page.rows)
    for epoch in ("best", "last"):
        assert next(shown) == [f"{name} " for name in ("Loss", *tables.header(), "ms/epoch")]
        for loss in results["losses"]:
            row = next(shown)
            assert row[0] == f"{loss['label']} "
            for (name, scaling), cell in zip(tables.COLUMNS, row[1:-1], strict=True):
                value = results["summary"][epoch][scaling][name][loss["spec"]]
                numbers = [value["mean"], value["half_width"]]
                if value["difference"]:
                    numbers += [abs(value["difference"]["mean"]), value["difference"]["half_width"]]
                texts = re.findall(r"[\d.]+", cell)
                assert texts == [METRICS[name].format(number) for number in numbers]
                assert ("★" in cell) == value["best"]
    for run in results["runs"]:
        for epoch in ("best", "last"):
            number = METRICS["margin"].format(run["test"][epoch]["raw"]["margin"])
            assert any(f"{number} " in row and f"{run['seed']} " in row for row in page.rows)


def test_settings_data_and_versions_are_shown(copy: Path) -> None:
    results, page = written(copy)
    settings = re.search(r"<pre>(.*?)</pre>", page.source, re.DOTALL)
    assert settings is not None
    assert yaml.safe_load(html.unescape(settings[1])) == results["config"]
    assert results["data"]["fingerprint"] in page.text
    assert "setosa, versicolor, virginica" in page.text
    for name, version in results["runs"][0]["versions"].items():
        assert f"{name}{version}" in page.text
    assert "different environments" not in page.text
    assert "penex report FOLDER" in page.text


def test_names_from_the_data_are_escaped(make: Callable[..., Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"<b>x</b>": rng.normal(size=45), "</style>": np.tile(HOSTILE, 15)})
    path = tmp_path / "<i>50% & $_{x}$.csv"
    frame.to_csv(path, index=False)
    folder = make(tmp_path / "out", data=str(path), target="</style>", seeds=1, epochs=1)
    _, page = written(folder)
    assert all(name in page.text for name in HOSTILE)
    assert "<i>50% & $_{x}$" in page.text
    assert page.tags.count("style") == 1
    assert not {"script", "img", "i"} & set(page.tags)
    assert page.tags.count("b") == 4  # our own: two curves, two reliability diagrams
    first, second = (folder / "table.tex").read_text(encoding="utf-8").splitlines()[1:3]
    assert first.startswith("% <i>50")
    assert second.startswith("% ")


def test_rebuilding_changes_no_byte(copy: Path) -> None:
    names = ("results.json", "table.tex", "report.html")
    report.write(copy)
    before = [(copy / name).read_bytes() for name in names]
    report.write(copy)
    assert [(copy / name).read_bytes() for name in names] == before
    moved = copy.rename(copy.with_name("moved"))
    report.write(moved)
    assert [(moved / name).read_bytes() for name in names] == before


def test_neither_torch_nor_pyplot_is_imported(copy: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from penex.compare.report import write;"
        "write(Path(sys.argv[1])); print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(copy)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_the_users_matplotlib_settings_are_neither_used_nor_changed(copy: Path) -> None:
    import matplotlib as mpl

    report.write(copy)
    before = (copy / "report.html").read_bytes()
    with mpl.rc_context({"axes.xmargin": 0.3, "xtick.major.size": 9, "font.size": 20}):
        set_by_user = dict(mpl.rcParams)
        report.write(copy)
        assert dict(mpl.rcParams) == set_by_user
    assert (copy / "report.html").read_bytes() == before


def test_unfinished(copy: Path) -> None:
    shutil.rmtree(run_folder(copy, "penex", 1))
    _, page = written(copy)
    assert "only 3 of 4 runs are in" in page.text
    assert "Without two seeds in common" in page.text
    shutil.rmtree(run_folder(copy, "penex", 0))
    _, page = written(copy)
    assert ["PENEX ", *["– "] * 7] in page.rows
    shutil.rmtree(copy / "runs")
    with pytest.raises(CompareError, match="no finished run"):
        report.write(copy)


# numpy leaves the file of a broken archive to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["logits.npz", "run.json", "curve.csv"])
def test_a_damaged_file_is_named_and_nothing_is_overwritten(copy: Path, name: str) -> None:
    report.write(copy)
    before = (copy / "report.html").read_bytes()
    path = run_folder(copy, "penex", 1) / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CompareError, match=re.escape(str(path))):
        report.write(copy)
    assert (copy / "report.html").read_bytes() == before


def test_a_curve_that_lacks_epochs_is_damaged(copy: Path) -> None:
    path = run_folder(copy, "penex", 1) / "curve.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(CompareError, match=r"curve\.csv is damaged.* of 3 epochs"):
        report.write(copy)


def test_diverged_at_the_end(copy: Path) -> None:
    spoil(copy, "penex", 0, "last")
    results, page = written(copy)
    assert "PENEX: 1 of 2 runs diverged" in page.text
    assert any(row[0] == "PENEX (1 of 2 diverged) " for row in page.rows)
    assert "diverged " in next(row for row in reversed(page.rows) if row[:2] == ["PENEX ", "0 "])
    assert results["summary"]["last"]["raw"]["nll"]["penex"]["n"] == 1


@pytest.mark.parametrize("spec", ["penex", "cross-entropy"])
def test_diverged_throughout(copy: Path, spec: str) -> None:
    for seed in range(2):
        spoil(copy, spec, seed, "best", "last")
        path = run_folder(copy, spec, seed) / "curve.csv"
        path.write_text(re.sub(r",[\d.]+", ",nan", path.read_text()))
    _, page = written(copy)
    assert page.tags.count("figure") == 4  # no reliability diagram of that loss
    assert "2 of 2 runs diverged" in page.text
    assert "nan" not in page.text
    expected = {"penex": "Without two seeds", "cross-entropy": "No run of cross-entropy"}
    assert expected[spec] in page.text


def test_everything_diverged(copy: Path) -> None:
    for spec in ("cross-entropy", "penex"):
        for seed in range(2):
            spoil(copy, spec, seed, "best", "last")
            path = run_folder(copy, spec, seed) / "curve.csv"
            path.write_text(re.sub(r",[\d.]+", ",nan", path.read_text()))
    _, page = written(copy)
    assert page.tags.count("figure") == 3


def test_other_versions_are_pointed_out(copy: Path) -> None:
    path = run_folder(copy, "penex", 0) / "run.json"
    record = json.loads(path.read_text())
    record["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(record))
    _, page = written(copy)
    assert "different environments (torch; see Versions)" in page.text
    assert "1.0; " in page.text


def test_one_seed_and_no_reference(make: Callable[..., Path], tmp_path: Path) -> None:
    losses = ("penex=0.03", "penex=0.3", "focal")
    folder = make(tmp_path / "out", losses=losses, seeds=1, epochs=2)
    results, page = written(folder)
    assert "Cross-entropy, which others are tested against, is not in this" in page.text
    assert "★" not in "".join("".join(row) for row in page.rows)
    assert "±" not in "".join("".join(row) for row in page.rows)
    looks = {(one.colour, one.dashes) for one in plots.gather(folder, results)}
    assert len(looks) == 3
    assert {"PENEX α=0.03 ", "PENEX α=0.3 ", "Focal "} <= {row[0] for row in page.rows}


# ---- published figures, and several comparisons ----------------------------------------------


def publish(folder: Path, *entries: dict[str, Any]) -> None:
    (folder / "published.json").write_text(json.dumps(list(entries)))


def entry(**values: Any) -> dict[str, Any]:
    told = {"loss": "penex", "metric": "accuracy", "at": "last", "value": 0.5, "source": "Table 1"}
    return told | values


def test_published_figures_stand_beside_ours(copy: Path) -> None:
    publish(
        copy,
        entry(),
        entry(metric="validation_nll", at="best", value=2.067, source="<i>a figure</i>"),
        entry(loss="focal"),  # not in this comparison
    )
    results, page = written(copy)
    assert len(results["published"]) == 2
    runs = [run for run in results["runs"] if run["loss"] == "penex"]
    ours = [np.mean([run["test"]["last"]["raw"]["accuracy"] for run in runs])]
    ours.append(np.mean([run["validation_nll"] for run in runs]))
    first, second = (row for row in page.rows if row[-1].strip() in ("Table 1", "<i>a figure</i>"))
    assert first[:3] == ["PENEX ", "Accuracy (test) % ", "Last epoch "]
    assert first[3].startswith(f"{100 * ours[0]:.1f}±")
    assert first[4] == "50.0 "
    assert second[:3] == ["PENEX ", "NLL (validation) ", "Best validation epoch "]
    assert float(second[3].split("±")[0]) == pytest.approx(ours[1], abs=6e-4)
    assert second[4] == "2.067 "
    assert "i" not in page.tags


def test_validation_nll_is_that_of_the_curve(copy: Path) -> None:
    for run in report.write(copy)["runs"]:
        nll = curves(copy, run["loss"], run["seed"])["validation_nll"]
        assert run["validation"]["last"] == pytest.approx(nll[-1], rel=1e-4)
        assert run["validation"]["best"] == pytest.approx(run["validation_nll"], rel=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [{"metric": "speed"}, {"at": "first"}, {"value": "high"}, {"loss": 3}, {"metric": None}],
    ids=str,
)
def test_published_figures_that_are_not_understood(copy: Path, wrong: dict[str, Any]) -> None:
    if "loss" in wrong:
        publish(copy, {"metric": "nll"})
    else:
        publish(copy, entry(**wrong))
    with pytest.raises(CompareError, match=r"published\.json: an entry is not understood"):
        report.write(copy)


@pytest.fixture
def several(copy: Path, make: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """The comparison and one of data, classes and losses with hostile names."""
    frame = pd.DataFrame({"x": np.arange(45.0) % 7, "y": np.tile(HOSTILE, 15)})
    path = tmp_path / "<i>50% & $_{x}$.csv"
    frame.to_csv(path, index=False)
    losses = ("cross-entropy", "penex=0.5", "focal")
    options = {"data": str(path), "target": "y", "losses": losses}
    return [copy, make(tmp_path / "other", **options, seeds=1, epochs=1)]


def test_several_on_one_page(several: list[Path], tmp_path: Path) -> None:
    publish(several[0], entry())
    out = tmp_path / "merged"
    results = report.merge(several, out)
    page = Page(out)
    assert not {"script", "link", "img", "iframe", "object", "base", "i"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "xlink:href", "src"):
            assert str(value).startswith("#")
    links = re.findall(r"(?:href=\"|url\()#([^\")]+)", page.source)
    assert len(set(page.ids)) == len(page.ids)
    assert set(links) <= set(page.ids)
    titles = tables.titles(results)
    assert titles[0] == "iris, 90 training rows, 2 seeds"
    for one, title in zip(results, titles, strict=True):
        assert [f"{title} "] in page.rows
        assert page.text.count(title) == 4  # verdict, two tables, section
        assert report.verdict(one) in page.text
    assert ["PENEX ", "Accuracy (test) % ", "Last epoch "] in [row[:3] for row in page.rows]
    # Curves and margins of both, and a reliability diagram of each loss.
    assert page.tags.count("figure") == 2 * 3 + 2 + 3
    before = [path.read_bytes() for path in sorted(out.iterdir())]
    report.merge(several, out)
    assert [path.read_bytes() for path in sorted(out.iterdir())] == before
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "table.md", "table.tex"]
    for folder in several:
        assert not (folder / "report.html").exists()


def test_merging_into_a_comparison_is_refused(several: list[Path]) -> None:
    with pytest.raises(CompareError, match="is a comparison of its own; choose another folder"):
        report.merge(several, several[1] / ".." / several[1].name)


def test_report_command_of_several(several: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    done = CliRunner().invoke(cli.app, ["report", *map(str, several), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "iris, 90 training rows, 2 seeds: best validation epoch" in done.stdout
    assert f"Report: {out / 'report.html'}" in done.stdout
    assert (out / "table.md").read_text(encoding="utf-8").startswith("Best validation epoch:")


# ---- the verdict -----------------------------------------------------------------------------


def findings(results: dict[str, Any], **cells: tuple[float, float | None]) -> dict[str, Any]:
    """`results` with other differences of PENEX (mean, half width) at the best epoch."""
    for key in (("accuracy", "raw"), ("nll", "raw"), ("nll", "scaled")):
        column = results["summary"]["best"][key[1]][key[0]]
        mean, half = cells.get("_".join(key), (0.0, 1.0))
        column["penex"]["difference"] = {"mean": mean, "half_width": half, "n": 5}
        higher = METRICS[key[0]].higher_is_better
        worse = half is not None and (mean < -half if higher else mean > half)
        column["cross-entropy"]["best"] = worse
    return results


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (
            {},
            "On accuracy and NLL, temperature scaled or not, no loss is clearly better than "
            "cross-entropy.",
        ),
        (
            {"nll_raw": (-0.041, 0.018)},
            "On accuracy no loss is clearly better than cross-entropy; on NLL PENEX "
            "(−0.041±0.018) is; on NLL after temperature scaling no loss is.",
        ),
        (
            {"accuracy_raw": (0.02, 0.01), "nll_scaled": (0.2, 0.1)},
            "On accuracy PENEX (+2.0±1.0 points) is clearly better than cross-entropy; on NLL no "
            "loss is; on NLL after temperature scaling cross-entropy is clearly better than every "
            "other loss.",
        ),
        (
            {"accuracy_raw": (-0.2, 0.1), "nll_raw": (0.2, 0.1), "nll_scaled": (0.2, 0.1)},
            "On accuracy and NLL, temperature scaled or not, cross-entropy is clearly better than "
            "every other loss.",
        ),
    ],
)
def test_verdict(finished: Path, cells: dict[str, Any], expected: str) -> None:
    assert report.verdict(findings(summarize(finished), **cells)) == expected


def test_a_loss_that_diverged_is_not_called_better_one_that_is_unfinished_may(
    finished: Path,
) -> None:
    results = findings(summarize(finished), nll_raw=(-0.041, 0.018))
    results["summary"]["best"]["raw"]["nll"]["penex"]["n"] -= 1
    assert "PENEX" not in report.verdict(results)
    results["losses"][1]["runs"] -= 1
    assert "PENEX" in report.verdict(results)


def test_verdict_on_the_reference_alone(finished: Path) -> None:
    results = summarize(finished)
    results["losses"] = results["losses"][:1]
    assert report.verdict(results).startswith("Only cross-entropy was trained")


# ---- pictures --------------------------------------------------------------------------------


def test_evidence_is_pooled_from_the_saved_logits(finished: Path) -> None:
    results = summarize(finished)
    one = next(e for e in plots.gather(finished, results) if e.spec == "penex")
    runs = [run for run in results["runs"] if run["loss"] == "penex"]
    saved = [read_logits(run_folder(finished, "penex", run["seed"])) for run in runs]
    logits = 1.1 * np.concatenate([each["test_best"] for each in saved]).astype(np.float64)
    target = np.concatenate([each["test_target"] for each in saved])
    bins = one.diagrams["raw"]
    some = bins.count > 0
    gap = bins.count[some] * np.abs(bins.accuracy - bins.confidence)[some]
    assert gap.sum() / len(target) == pytest.approx(ece(logits, target), abs=1e-12)
    right = logits.argmax(1) == target
    assert one.error == pytest.approx(1 - right.mean())
    prob = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    others = np.where(np.eye(3, dtype=bool)[target], 0, prob).max(1)
    expected = np.log(prob[np.arange(len(target)), target] / others)
    np.testing.assert_allclose(one.margins, np.sort(expected), atol=1e-9)
    # The curve's last point is the NLL of the network whose logits were saved.
    for run, each, nll in zip(runs, saved, one.curves["validation_nll"], strict=True):
        last = np.exp(1.1 * each["validation_last"].astype(np.float64))
        prob = last / last.sum(1, keepdims=True)
        assert nll[-1] == pytest.approx(log_loss(each["validation_target"], prob), rel=1e-4)
        assert nll[run["best_epoch"] - 1] == min(nll)


def test_colours_stay_with_their_loss(
    finished: Path, make: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make(tmp_path / "out", losses=("penex", "focal", "penex=0.5"), seeds=1, epochs=1)
    two = {one.spec: one for one in plots.gather(finished, summarize(finished))}
    three = {one.spec: one for one in plots.gather(folder, summarize(folder))}
    assert two["penex"].colour == three["penex"].colour
    assert three["penex"].dashes == ()
    assert three["penex=0.5"].dashes != ()
    assert len({one.colour for one in (*two.values(), *three.values())}) == 4


def test_overview(finished: Path, tmp_path: Path) -> None:
    plots.overview(finished, tmp_path / "a.svg")
    plots.overview(finished, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert ">PENEX<" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    plots.overview(finished, tmp_path / "a.png")
    assert imread(tmp_path / "a.png").std() > 0.05
