"""The report: results.json, table.tex, and report.html, which needs nothing but itself."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from penex.compare.analysis import plots, robustness, tables, verdict
from penex.compare.analysis.leaderboard import critical_difference_diagram, leaderboard
from penex.compare.analysis.robustness import NORMS
from penex.compare.analysis.summary import SCALINGS
from penex.compare.errors import CompareError
from penex.compare.files import write_json, write_text
from penex.compare.output_folder import report_full_disk
from penex.compare.training.selection import LAST, SELECTIONS
from penex.metrics import METRICS

RANKED = ("accuracy", "smooth_ece", "aurc")
"""Metrics of the leaderboards, besides that of the recommendation."""
WIDE, SQUARE = (4.4, 3.1), (3.5, 3.3)
SMALL_GROUP = 2
"""Comparisons that a leaderboard needs at least."""


def write(comparison: plots.Comparison) -> None:
    """Write results.json, table.tex and report.html into the folder of a comparison.

    Raises:
        CompareError: The disk is full.
    """
    folder, results = comparison.folder, comparison.results
    content = page(comparison)
    with report_full_disk(folder):
        write_json(folder / "results.json", results)
        write_text(folder / "table.tex", tables.latex(results))
        write_text(folder / "report.html", content)


def merge(comparisons: Sequence[plots.Comparison], out: Path) -> None:
    """One page of several comparisons, with their table as LaTeX and Markdown.

    Args:
        comparisons: In the order in which they are shown.
        out: The folder for report.html, table.tex and table.md, made if missing.

    Raises:
        CompareError: `out` is the folder of one of the comparisons, or the disk is full.
    """
    if out.resolve() in [one.folder.resolve() for one in comparisons]:
        raise CompareError(f"out: {out} is a comparison of its own; choose another folder")
    several = [one.results for one in comparisons]
    parts = []
    for number, (one, title) in enumerate(
        zip(comparisons, tables.titles(several), strict=True), start=1
    ):
        records = robustness.read(one.folder)
        parts.append(
            {
                "caption": tables.caption(one.results),
                "loss_results": one.loss_results,
                "pictures": _pictures(one.loss_results, records, f"comparison{number}-"),
                "published": tables.published(one.results),
                "recommendation": verdict.recommendation(one.results),
                "results": one.results,
                "robust": tables.robust(one.results, records),
                "title": title,
                "warnings": verdict.warnings(one.results),
            }
        )
    selections = list(dict.fromkeys([results["config"]["select"] for results in several]))
    content = _render(
        "merged.html.jinja",
        several=parts,
        header=tables.merged_header(),
        tables={name: tables.merged(several, name) for name in (*selections, LAST)},
        legend=tables.MERGED_LEGEND,
        leaderboards=leaderboards(several),
    )
    markdown = [
        f"{SELECTIONS[name]}:\n\n{tables.merged_markdown(several, name)}"
        for name in dict.fromkeys((*selections, LAST))
    ]
    with report_full_disk(out):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "table.tex", tables.merged_latex(several))
        write_text(out / "table.md", "\n\n".join([*markdown, tables.MERGED_LEGEND]) + "\n")
        write_text(out / "report.html", content)


def leaderboards(several: Sequence[dict[str, Any]]) -> list[tables.Ranking]:
    """A leaderboard over comparisons for each of a few metrics; none for fewer than two data sets.

    Settings of one data set (label noise, training size) are one block.
    """
    metrics = dict.fromkeys([*(results["primary"]["metric"] for results in several), *RANKED])
    found = []
    for metric in metrics:
        table = tables.tidy(several, metric)
        try:
            board = leaderboard(table, higher_is_better=METRICS[metric].higher_is_better)
        except ValueError:  # fewer than two losses or no data set in common
            continue
        if board.blocks < SMALL_GROUP:
            continue
        title = METRICS[metric].label
        picture = plots.embedded(
            f"ranks-{metric}",
            f"Average ranks by {title}: {', '.join(map(str, board.ranks.index))}",
            partial(critical_difference_diagram, board, title=title),
        )
        found.append(tables.ranking(title, board, Markup(picture)))  # noqa: S704
    return found


def page(comparison: plots.Comparison) -> str:
    """The content of report.html."""
    results, loss_results = comparison.results, comparison.loss_results
    records = robustness.read(comparison.folder)
    selected = results["config"]["select"]
    return _render(
        "report.html.jinja",
        results=results,
        caption=tables.caption(results),
        recommendation=verdict.recommendation(results),
        warnings=verdict.warnings(results),
        scalings=SCALINGS,
        header=tables.header(),
        selected=selected,
        tables={
            name: list(tables.rows(results, name))
            for name in sorted(SELECTIONS, key=lambda name: name != selected)
        },
        side_by_side=list(tables.selections(results)),
        side_by_side_header=tables.selections_header(),
        smallest_difference=verdict.smallest_difference(results),
        softmax=tables.softmax(results, selected),
        legend=tables.legend(results),
        timing=tables.timing(results),
        floor=tables.floor(results),
        published=tables.published(results),
        robust=tables.robust(results, records),
        loss_results=loss_results,
        pictures=_pictures(loss_results, records),
        settings=yaml.safe_dump(results["config"], sort_keys=False, allow_unicode=True),
        versions=verdict.versions(results),
    )


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("penex.compare.analysis", ""),
        autoescape=True,  # names come from the user's data
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(
        selections=SELECTIONS,
        metrics=METRICS,
        cell=tables.cell,
        ink=plots.INK,
        robust_legend=tables.ROBUST_LEGEND,
        **values,
    )


def _pictures(
    loss_results: list[plots.LossResults], records: Sequence[dict[str, Any]], prefix: str = ""
) -> dict[str, Markup]:
    """The panels by name, not to be escaped: their text is ours, none comes from the data.

    Ids within them start with `prefix`, which is not in the names.
    """
    labels = ", ".join(one.label for one in loss_results)
    drawn = {
        part: plots.svg(
            f"{prefix}{part}",
            f"NLL on {part} rows by epoch, mean and single runs, of {labels}",
            partial(plots.learning, loss_results=loss_results, column=f"{part}_nll"),
            WIDE,
        )
        for part in ("validation", "train")
    }
    for number, one in enumerate(loss_results):
        if one.diagrams:
            description = f"Reliability diagram of {one.label}: accuracy against confidence"
            draw = partial(plots.diagram, one=one)
            drawn[one.spec] = plots.svg(f"{prefix}reliability{number}", description, draw, SQUARE)
    description = f"Cumulative distribution of test margins of {labels}"
    draw = partial(plots.distribution, loss_results=loss_results)
    drawn["margins"] = plots.svg(f"{prefix}margins", description, draw, WIDE)
    for norm in {record["norm"]: None for record in records}:
        description = f"Accuracy by radius of an attack in {NORMS[norm]}, of {labels}"
        draw = partial(plots.robust, loss_results=loss_results, records=records, norm=norm)
        drawn[norm] = plots.svg(f"{prefix}{norm}", description, draw, WIDE)
    return {name: Markup(text) for name, text in drawn.items()}  # noqa: S704
