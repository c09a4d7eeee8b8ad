"""The report shows the saved results and is self-contained."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import yaml
from folders import TEST, VERSIONS, calibrated, write
from matplotlib.image import imread
from scipy.special import softmax
from typer.testing import CliRunner

from penex import cli
from penex.compare.analysis import plots, report, tables, verdict
from penex.compare.analysis.summary import SCALINGS
from penex.compare.errors import CompareError
from penex.compare.files import read_json, write_json
from penex.compare.finished_runs import read_logits
from penex.compare.output_folder import run_folder
from penex.compare.training.selection import SELECTIONS
from penex.metrics import METRICS, ece

HOSTILE = ('<script>alert("1")</script>', "a & b_{c} $x$ 50 %", "'><img src=x onerror=alert(2)>")
VOID = {"br", "input", "meta"}


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


SPECS = ("cross-entropy", "focal=0", "penex")


def drawn(specs: tuple[str, ...] = SPECS, seeds: int = 3) -> dict[str, list[Any]]:
    """Test logits of losses that differ a little."""
    return {
        spec: [calibrated(TEST, 1.4 + 0.3 * place, seed) for seed in range(seeds)]
        for place, spec in enumerate(specs)
    }


def leading(folder: Path) -> Path:
    """Three losses at three seeds; penex has a clear lead."""
    test = drawn() | {"penex": [(2 + 0.05 * seed) * np.eye(3)[TEST] for seed in range(3)]}
    return write(folder, test, seconds=dict.fromkeys(SPECS, 0.01))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return leading(tmp_path / "out")


def written(folder: Path, **options: Any) -> tuple[dict[str, Any], Page]:
    comparison = plots.read(folder, **options)
    report.write(comparison)
    return comparison.results, Page(folder)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Page]:
    """What results.json and report.html of that folder hold."""
    folder = leading(tmp_path_factory.mktemp("shown") / "out")
    _, page = written(folder)
    return json.loads((folder / "results.json").read_text(encoding="utf-8")), page


def spoil(folder: Path, spec: str, seed: int, *epochs: int) -> None:
    """Make a run one that diverged, at some epochs."""
    path = run_folder(folder, spec, seed) / "logits.npz"
    arrays = read_logits(path.parent)
    for epoch in epochs:
        arrays[f"test_{epoch}"][0, 0] = np.nan
    np.savez(path, **arrays)


def diverge(folder: Path, spec: str) -> None:
    """Make all runs of a loss ones that diverged before their first epoch ended."""
    for path in (folder / "runs" / spec).iterdir():
        record = read_json(path / "run.json")
        nothing = {"epochs": {"last": 20}, "validation": {"last": None}}
        write_json(path / "run.json", record | nothing)
        spoil(folder, spec, record["seed"], 20)
        lines = (path / "curve.csv").read_text().splitlines()
        values = [re.sub(r",[^,]+", ",nan", line) for line in lines[1:]]
        (path / "curve.csv").write_text("\n".join([lines[0], *values]) + "\n")


def test_of_real_training(finished: Path, tmp_path: Path) -> None:
    """The whole, once: what was trained is what is shown."""
    folder = Path(shutil.copytree(finished, tmp_path / "out"))
    results, page = written(folder)
    assert verdict.recommendation(results) in page.text
    assert "No recommendation yet: the losses have 2 seeds in common" in page.text
    for run in results["runs"]:
        saved = read_logits(run_folder(folder, run["loss"], run["seed"]))
        scale = 1.1 if run["loss"] == "penex" else 1.0
        for part in ("validation", "test"):
            p = softmax(scale * saved[f"{part}_3"].astype(np.float64), axis=1)
            target = saved[f"{part}_target"]
            nll = -np.log(p[np.arange(len(target)), target]).mean()
            shown = run["validation"]["last"] if part == "validation" else None
            shown = run["test"]["last"]["link"] if shown is None else shown
            assert shown["nll"] == pytest.approx(nll, rel=1e-5)
    assert all(f"{loss['label']} " in [row[0] for row in page.rows] for loss in results["losses"])


def test_the_report_is_self_contained(shown: tuple[dict[str, Any], Page]) -> None:
    _, page = shown
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "xlink:href", "src", "action", "data"):
            assert str(value).startswith("#")
        if not name.startswith("xmlns"):
            assert "//" not in str(value)
    assert all(link.startswith("#") for link in re.findall(r"url\((.*?)\)", page.source))
    assert "@import" not in page.source


def test_ids_are_unique_and_links_resolve(shown: tuple[dict[str, Any], Page]) -> None:
    _, page = shown
    links = re.findall(r"(?:href=\"|url\()#([^\")]+)", page.source)
    assert len(links) > 20
    assert len(set(page.ids)) == len(page.ids)
    assert set(links) <= set(page.ids)


def test_every_picture_is_described(shown: tuple[dict[str, Any], Page]) -> None:
    _, page = shown
    described = [value for name, value in page.attributes if name == "aria-label"]
    pictures = len([value for name, value in page.attributes if (name, value) == ("role", "img")])
    assert pictures == page.tags.count("figure") == 2 + 3 + 1
    assert len(described) >= pictures
    assert all(described)


def test_it_begins_with_the_recommendation(folder: Path) -> None:
    results, page = written(folder)
    text = page.text
    assert verdict.recommendation(results).startswith("Train with PENEX (α = 0.1, lr = 0.001): ")
    assert text.index(verdict.recommendation(results)) < text.index("Results on test rows")
    for line in (tables.caption, tables.legend, tables.floor, tables.timing):
        assert line(results) in text
    assert f"smaller than {verdict.smallest_difference(results)} in the metric" in text
    path = run_folder(folder, "penex", 0) / "run.json"
    write_json(path, read_json(path) | {"versions": VERSIONS | {"torch": "1.0"}})
    results, page = written(folder)
    (warning,) = verdict.warnings(results)
    assert page.text.index(warning) < page.text.index("Results on test rows")
    assert "1.0; 2.13.0" in page.text


def test_tables_show_the_content_of_results_json(shown: tuple[dict[str, Any], Page]) -> None:
    results, page = shown
    lines = iter(page.rows)
    title = [f"{name} " for name in ("Loss", *tables.header())]
    for selection in ("refined", *[name for name in SELECTIONS if name != "refined"]):
        while next(lines)[: len(title)] != title:
            pass
        for row in tables.rows(results, selection):
            cells = next(lines)
            facts = [*filter(None, row.settings.split(", ")), row.epochs]
            assert cells[0].replace(",", "").split() == " ".join([row.label, *facts]).split()
            for cell, text in zip(row.cells, cells[1:], strict=False):
                star = "★ " if cell.best else ""
                change = f"{cell.difference} " if cell.difference else ""
                assert text == f"{star}{cell.value} {change}"
    stars = [row for row in page.rows if "★" in "".join(row)]
    assert len(stars) == 2  # in the table, and among all metrics
    for label, found in tables.selections(results):
        for number, one in enumerate(found):
            line = [f"{text} " for text in (one.title, one.epochs, *one.values)]
            assert ([f"{label} "] * (number == 0) + line) in page.rows
    for run in results["runs"]:
        for selection in SELECTIONS:
            number = METRICS["margin"].format(run["test"][selection]["link"]["margin"])
            assert any(f"{number} " in row and f"{run['seed']} " in row for row in page.rows)


def test_plain_softmax_is_shown_where_it_differs(
    shown: tuple[dict[str, Any], Page], tmp_path: Path
) -> None:
    results, page = shown
    assert "softmax" in page.ids  # of the box that shows the column
    column = [row[-1] for row in page.rows if len(row) == len(tables.header()) + 2]
    assert column[0] == "NLL, softmax ↓ "
    cell = results["summary"]["refined"]["softmax"]["nll"]["penex"]
    assert column[1:4] == ["– "] * 3  # the majority class, cross-entropy and focal at gamma 0
    assert column[4].startswith(METRICS["nll"].format(cell["mean"]))
    _, page = written(write(tmp_path / "same", drawn(SPECS[:2])))
    assert "softmax" not in page.ids
    assert "NLL, softmax" not in page.text


def test_settings_data_and_versions_are_shown(shown: tuple[dict[str, Any], Page]) -> None:
    results, page = shown
    settings = re.search(r"<pre>(.*?)</pre>", page.source, re.DOTALL)
    assert settings is not None
    assert yaml.safe_load(html.unescape(settings[1])) == results["config"]
    assert results["data"]["fingerprint"] in page.text
    assert "3: a, b, c" in page.text
    for name, version in VERSIONS.items():
        assert f"{name}{version}" in page.text
    assert "different environments" not in page.text
    assert "penex report FOLDER" in page.text
    assert {f"{title}, {how}" for title in SELECTIONS.values() for how in SCALINGS.values()} <= {
        value for name, value in page.attributes if name == "aria-label"
    }


def test_names_from_the_data_are_escaped(folder: Path) -> None:
    described = read_json(folder / "comparison.json")
    described["data"] |= {"name": "<i>50% & $_{x}$", "classes": list(HOSTILE)}
    described["config"]["target"] = "</style>"
    write_json(folder / "comparison.json", described)
    _, page = written(folder)
    assert all(name in page.text for name in HOSTILE)
    assert "<i>50% & $_{x}$" in page.text
    assert page.tags.count("style") == 1
    assert not {"script", "img", "i"} & set(page.tags)
    assert page.tags.count("b") == 5  # our own: two curves, three reliability diagrams
    first, second = (folder / "table.tex").read_text(encoding="utf-8").splitlines()[1:3]
    assert first.startswith("% <i>50")
    assert second.startswith("% ")


def test_rebuilding_is_byte_identical(folder: Path) -> None:
    names = ("results.json", "table.tex", "report.html")
    written(folder)
    before = [(folder / name).read_bytes() for name in names]
    moved = folder.rename(folder.with_name("moved"))
    with mpl.rc_context({"axes.xmargin": 0.3, "xtick.major.size": 9, "font.size": 20}):
        set_by_user = dict(mpl.rcParams)
        written(moved)
        assert dict(mpl.rcParams) == set_by_user
    assert [(moved / name).read_bytes() for name in names] == before


def test_unfinished(folder: Path) -> None:
    shutil.rmtree(run_folder(folder, "penex", 1))
    _, page = written(folder)
    assert "Unfinished: 8 of 9 runs have finished." in page.text
    assert "No recommendation yet: the losses have 2 seeds in common" in page.text
    for seed in (0, 2):
        shutil.rmtree(run_folder(folder, "penex", seed))
    _, page = written(folder)
    assert ["PENEX ", *["– "] * 7] in [row[:8] for row in page.rows]
    shutil.rmtree(folder / "runs")
    with pytest.raises(CompareError, match="no finished run"):
        written(folder)


def test_no_seed_in_common(tmp_path: Path) -> None:
    (first, *_), second = drawn(SPECS[:1])["cross-entropy"], drawn(("penex",))["penex"]
    test = {"cross-entropy": [first, None], "penex": [None, second[0]]}
    _, page = written(write(tmp_path / "out", test))
    assert "No recommendation yet: the losses have 0 seeds in common" in page.text
    assert page.tags.count("figure") == 5


# numpy leaves the file of a broken archive to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["logits.npz", "run.json", "curve.csv"])
def test_a_damaged_file_is_named_and_nothing_is_overwritten(folder: Path, name: str) -> None:
    (folder / "report.html").write_text("before")
    path = run_folder(folder, "penex", 1) / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CompareError, match=re.escape(str(path))):
        written(folder)
    assert (folder / "report.html").read_text() == "before"


def test_a_curve_that_lacks_epochs_is_damaged(folder: Path) -> None:
    path = run_folder(folder, "penex", 1) / "curve.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(CompareError, match=r"curve\.csv is damaged.* of 20 epochs"):
        written(folder)


def test_diverged_at_the_end(folder: Path) -> None:
    spoil(folder, "penex", 0, 20)
    results, page = written(folder)
    assert "PENEX: 1 of 3 runs diverged. Lower its learning rate." in page.text
    assert any(row[0].startswith("PENEX (1 of 3 diverged) ") for row in page.rows)
    every = [row for row in page.rows if row[:2] == ["PENEX ", "0 "]]
    assert ["diverged " in row for row in every] == [False, False, False, True]
    assert results["summary"]["last"]["link"]["nll"]["penex"]["n"] == 2


@pytest.mark.parametrize("specs", [("penex",), ("cross-entropy",), SPECS], ids=len)
def test_diverged_throughout(folder: Path, specs: tuple[str, ...]) -> None:
    for spec in specs:
        diverge(folder, spec)
    results, page = written(folder)
    assert page.tags.count("figure") == 6 - len(specs)  # no reliability diagrams of these
    assert page.text.count("3 of 3 runs diverged, so it is not ranked.") == len(specs)
    assert "nan" not in page.text
    assert ("No recommendation: " in page.text) == ("cross-entropy" in specs)
    assert all(run["temperature"]["last"] is None for run in results["runs"][:3]) == (
        "cross-entropy" in specs
    )


def test_one_seed_and_no_reference(tmp_path: Path) -> None:
    test = drawn(("penex=0.03", "penex=0.3", "focal=0"), seeds=1)
    results, page = written(write(tmp_path / "out", test))
    assert "is not part of this comparison" in page.text
    cells = "".join("".join(row) for row in page.rows)
    assert "★" not in cells
    assert "±" not in cells
    looks = {(one.colour, one.dashes) for one in plots.gather(tmp_path / "out", results)}
    assert len(looks) == 3
    labels = {row[0].split(" lr")[0].strip() for row in page.rows}
    assert {"PENEX α=0.03", "PENEX α=0.3", "Focal γ=0"} <= labels


def test_command(folder: Path) -> None:
    options = ["report", str(folder), "--metric", "accuracy", "--min-difference", "0.01"]
    done = CliRunner().invoke(cli.app, options)
    assert done.exit_code == 0, done.output
    results = read_json(folder / "results.json")
    assert results["config"]["metric"] == results["primary"]["metric"] == "accuracy"
    assert results["primary"]["threshold"] == 0.01
    words = " ".join(done.stdout.split())
    assert words.startswith(verdict.recommendation(results))
    for line in (tables.caption, tables.legend, tables.floor, tables.timing):
        assert " ".join(line(results).split()) in words
    assert f"Report: {folder / 'report.html'}" in words
    page = Page(folder)
    assert "smaller than 1 points" in page.text
    refused = CliRunner().invoke(cli.app, ["report", str(folder), "--metric", "speed"])
    assert refused.exit_code == 2
    assert "metric: expected one of accuracy, " in refused.stderr


# ---- published values, and several comparisons -----------------------------------------------


def publish(folder: Path, *entries: dict[str, Any]) -> None:
    (folder / "published.json").write_text(json.dumps(list(entries)))


def entry(**values: Any) -> dict[str, Any]:
    told = {"loss": "penex", "metric": "accuracy", "at": "last", "value": 0.5, "source": "Table 1"}
    return told | values


def test_published_values_are_shown_with_ours(folder: Path) -> None:
    publish(
        folder,
        entry(),
        entry(metric="validation_nll", at="nll", value=2.067, source="<i>a figure</i>"),
        entry(metric="nll", scaling="softmax", value=1.5, source="Table 2"),
        entry(loss="z-loss"),  # not in this comparison
    )
    results, page = written(folder)
    assert len(results["published"]) == 3
    runs = [run for run in results["runs"] if run["loss"] == "penex"]
    ours = [np.mean([run["test"]["last"]["link"]["accuracy"] for run in runs])]
    ours.append(np.mean([run["validation"]["nll"]["nll"] for run in runs]))
    ours.append(np.mean([run["test"]["last"]["softmax"]["nll"] for run in runs]))
    sources = ("Table 1", "<i>a figure</i>", "Table 2")
    lines = [row for row in page.rows if row[-1].strip() in sources]
    assert lines == [
        [
            "PENEX ",
            "Accuracy (test) % ",
            "Last epoch ",
            f"{100 * ours[0]:.1f} ",
            "50.0 ",
            "Table 1 ",
        ],
        [
            *("PENEX ", "NLL (validation) ", "Lowest validation NLL ", f"{ours[1]:.3f} "),
            *("2.067 ", "<i>a figure</i> "),
        ],
        ["PENEX ", "NLL (test) ", "Last epoch ", f"{ours[2]:.3f} ", "1.500 ", "Table 2 "],
    ]
    assert "i" not in page.tags


@pytest.mark.parametrize(
    "wrong",
    [
        *({"metric": "speed"}, {"at": "first"}, {"value": "high"}, {"loss": 3}, {"metric": None}),
        {"scaling": "scaled"},
    ],
    ids=str,
)
def test_invalid_published_values_are_refused(folder: Path, wrong: dict[str, Any]) -> None:
    if "loss" in wrong:
        publish(folder, {"metric": "nll"})
    else:
        publish(folder, entry(**wrong))
    with pytest.raises(CompareError, match=r"published\.json: an entry is invalid"):
        written(folder)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[plots.Comparison]:
    """The comparison; one of data with a hostile name and another loss; two on a third data set."""
    root = tmp_path_factory.mktemp("several")
    first = leading(root / "a")
    publish(first, entry())
    folders = [
        first,
        write(root / "b", drawn(("cross-entropy", "penex", "z-loss")), data=HOSTILE[0]),
    ]
    folders += [
        write(root / f"c{noise}", drawn(), data="third", label_noise=noise) for noise in (0.0, 0.2)
    ]
    return [plots.read(folder) for folder in folders]


def test_several_on_one_page(several: list[plots.Comparison], tmp_path: Path) -> None:
    results = [one.results for one in several]
    out = tmp_path / "merged"
    report.merge(several, out)
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
    assert titles[0] == "made-up, 480 training rows, 3 seeds"
    for one, title in zip(results, titles, strict=True):
        assert [f"{title} "] in page.rows
        assert page.text.count(title) == 4  # recommendation, two tables, section
        assert verdict.recommendation(one) in page.text
    assert ["PENEX ", "Accuracy (test) % ", "Last epoch "] in [row[:3] for row in page.rows]
    # Curves, margins and a reliability diagram of each loss; and four leaderboards.
    assert page.tags.count("figure") == 4 * (3 + 3) + 4
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "table.md", "table.tex"]
    assert not any((one.folder / "report.html").exists() for one in several)


def test_leaderboards(several: list[plots.Comparison]) -> None:
    """One for the metric of the recommendation, and one for each of a few more."""
    results = [one.results for one in several]
    boards = report.leaderboards(results)
    titles = [METRICS[name].label for name in ("nll", "accuracy", "smooth_ece", "aurc")]
    assert [board.title for board in boards] == titles
    for board in boards:
        assert {line[0] for line in board.lines} == {"Cross-entropy", "PENEX"}  # in all of them
        assert board.summary == "4 comparisons of 3 data sets"
        assert board.picture.startswith('<svg role="img" aria-label="Average ranks by ')
        assert plots.INK not in board.picture  # it takes the colour of the text around it
    nll = {
        title: [
            each["summary"]["refined"]["scaled"]["nll"][spec]["mean"]
            for spec in ("cross-entropy", "penex")
        ]
        for title, each in zip("abcd", results, strict=True)
    }
    wins = np.mean([penex < reference for reference, penex in nll.values()])
    line = next(line for line in boards[0].lines if line[0] == "PENEX")
    assert line[3].startswith(f"{100 * wins:.0f} [")
    # One data set, or no loss in common, has none.
    assert report.leaderboards(results[2:]) == []
    alone = [one | {"losses": [one["losses"][n]]} for n, one in enumerate(results[:2])]
    assert report.leaderboards(alone) == []


def test_merging_into_a_comparison_is_refused(several: list[plots.Comparison]) -> None:
    folder = several[1].folder
    with pytest.raises(CompareError, match="is a comparison of its own; choose another folder"):
        report.merge(several, folder / ".." / folder.name)


def test_command_with_several(several: list[plots.Comparison], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    folders = [str(one.folder) for one in several[:2]]
    options = ["report", *folders, "--out", str(out), "--metric", "brier"]
    done = CliRunner().invoke(cli.app, options)
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    assert "made-up, 480 training rows, 3 seeds: Train with PENEX" in words
    assert "test Brier score after temperature scaling" in words
    assert "3 seeds: lowest validation NLL after temperature scaling" in words
    assert f"Report: {out / 'report.html'}" in words
    start = "Lowest validation NLL after temperature scaling:"
    assert (out / "table.md").read_text(encoding="utf-8").startswith(start)
    assert Page(out).tags.count("h3") > 4


# ---- pictures --------------------------------------------------------------------------------


def test_evidence_is_pooled_from_the_saved_logits(folder: Path) -> None:
    results = plots.read(folder).results
    one = next(e for e in plots.gather(folder, results) if e.spec == "focal=0")
    logits = np.concatenate(drawn()["focal=0"])
    target = np.tile(TEST, 3)
    bins = one.diagrams["link"]
    some = bins.count > 0
    gap = bins.count[some] * np.abs(bins.accuracy - bins.confidence)[some]
    assert gap.sum() / len(target) == pytest.approx(ece(logits, target), abs=1e-6)
    right = logits.argmax(1) == target
    assert one.error == pytest.approx(1 - right.mean())
    prob = softmax(logits, axis=1)
    others = np.where(np.eye(3, dtype=bool)[target], 0, prob).max(1)
    expected = np.log(prob[np.arange(len(target)), target] / others)
    np.testing.assert_allclose(one.margins, np.sort(expected), atol=1e-5)
    errors = 1 - prob[np.arange(len(target)), target]
    np.testing.assert_allclose(one.errors, np.sort(errors), atol=1e-6)
    scores = [run["validation"]["refined"]["nll"] for run in results["runs"][:3]]
    assert one.selected == [(8, pytest.approx(score)) for score in scores]


def test_each_loss_keeps_its_colour(folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", drawn(("penex", "focal", "penex=0.5"), seeds=1))
    three, more = ({e.spec: e for e in plots.read(each).loss_results} for each in (folder, other))
    assert three["penex"].colour == more["penex"].colour
    assert more["penex"].dashes == ()
    assert more["penex=0.5"].dashes != ()
    assert len({one.colour for one in (*three.values(), *more.values())}) == 4


def test_overview(folder: Path, tmp_path: Path) -> None:
    comparison = plots.read(folder)
    plots.overview(comparison, tmp_path / "a.svg")
    plots.overview(comparison, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert ">PENEX<" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    plots.overview(comparison, tmp_path / "a.png")
    assert imread(tmp_path / "a.png").std() > 0.05
