"""The report: results.json, table.tex, and report.html, which needs nothing but itself."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from penex.compare import plots, robustness, tables
from penex.compare.analysis import EPOCHS, SCALINGS, summarize
from penex.compare.errors import CompareError
from penex.compare.registry import LOSSES, REFERENCE
from penex.compare.robustness import NORMS
from penex.compare.store import room, write_json, write_text
from penex.metrics import METRICS

PEER = LOSSES[REFERENCE].label.lower()
VERDICT = {
    ("accuracy", "raw"): "accuracy",
    ("nll", "raw"): "NLL",
    ("nll", "scaled"): "NLL after temperature scaling",
}
"""What the verdict speaks of: metric and scaling, and their name in the sentence."""
WIDE, SQUARE = (4.4, 3.1), (3.5, 3.3)


def write(folder: Path) -> dict[str, Any]:
    """Rebuild everything from the saved files of a comparison, finished or not.

    Returns:
        The content of results.json.

    Raises:
        CompareError: `folder` holds no comparison, no finished run, or a damaged file; or the
            disk is full.
    """
    results = summarize(folder)
    page = _page(folder, results, plots.gather(folder, results))
    with room(folder):
        write_json(folder / "results.json", results)
        write_text(folder / "table.tex", tables.latex(results))
        write_text(folder / "report.html", page)
    return results


def merge(folders: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """One page of several comparisons, with their table as LaTeX and Markdown, from saved files.

    Args:
        folders: Output folders, in the order in which they are shown.
        out: The folder for report.html, table.tex and table.md, made if missing.

    Returns:
        What `summarize` says of each.

    Raises:
        CompareError: As :func:`write`; or `out` is one of `folders`.
    """
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise CompareError(f"out: {out} is a comparison of its own; choose another folder")
    several = [summarize(folder) for folder in folders]
    parts = []
    for number, (folder, results) in enumerate(zip(folders, several, strict=True), start=1):
        evidence, records = plots.gather(folder, results), robustness.read(folder)
        parts.append(
            {
                "caption": tables.caption(results),
                "caveats": caveats(results),
                "evidence": evidence,
                "pictures": _pictures(evidence, records, f"comparison{number}-"),
                "published": tables.published(results),
                "results": results,
                "robust": tables.robust(results, records),
                "title": tables.titles(several)[number - 1],
                "verdict": verdict(results),
            }
        )
    page = _render(
        "merged.html.jinja",
        several=parts,
        header=tables.merged_header(),
        tables={epoch: tables.merged(several, epoch) for epoch in EPOCHS},
        legend=tables.MERGED_LEGEND,
    )
    markdown = [f"{EPOCHS[epoch]}:\n\n{tables.merged_markdown(several, epoch)}" for epoch in EPOCHS]
    with room(out):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "table.tex", tables.merged_latex(several))
        write_text(out / "table.md", "\n\n".join([*markdown, tables.MERGED_LEGEND]) + "\n")
        write_text(out / "report.html", page)
    return several


def _page(folder: Path, results: dict[str, Any], evidence: list[plots.Evidence]) -> str:
    records = robustness.read(folder)
    return _render(
        "report.html.jinja",
        results=results,
        caption=tables.caption(results),
        verdict=verdict(results),
        caveats=caveats(results),
        scalings=SCALINGS,
        header=tables.header(),
        tables={epoch: list(tables.rows(results, epoch)) for epoch in EPOCHS},
        cell=tables.cell,
        legend=tables.LEGEND,
        published=tables.published(results),
        robust=tables.robust(results, records),
        evidence=evidence,
        pictures=_pictures(evidence, records),
        settings=yaml.safe_dump(results["config"], sort_keys=False, allow_unicode=True),
        versions=_versions(results),
    )


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("penex.compare", ""),
        autoescape=True,  # names come from the user's data
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(
        epochs=EPOCHS, metrics=METRICS, ink=plots.INK, robust_legend=tables.ROBUST_LEGEND, **values
    )


def _pictures(
    evidence: list[plots.Evidence], records: Sequence[dict[str, Any]], prefix: str = ""
) -> dict[str, Markup]:
    """The panels by name, not to be escaped: their text is ours, none comes from the data.

    Ids within them start with `prefix`, which is not in the names.
    """
    labels = ", ".join(one.label for one in evidence)
    drawn = {
        part: plots.svg(
            f"{prefix}{part}",
            f"NLL on {part} rows by epoch, mean and single runs, of {labels}",
            partial(plots.learning, evidence=evidence, column=f"{part}_nll"),
            WIDE,
        )
        for part in ("validation", "train")
    }
    for number, one in enumerate(evidence):
        if one.diagrams:
            description = f"Reliability diagram of {one.label}: accuracy against confidence"
            draw = partial(plots.diagram, one=one)
            drawn[one.spec] = plots.svg(f"{prefix}reliability{number}", description, draw, SQUARE)
    description = f"Cumulative distribution of test margins of {labels}"
    draw = partial(plots.distribution, evidence=evidence)
    drawn["margins"] = plots.svg(f"{prefix}margins", description, draw, WIDE)
    for norm in {record["norm"]: None for record in records}:
        description = f"Accuracy by radius of an attack in {NORMS[norm]}, of {labels}"
        draw = partial(plots.robust, evidence=evidence, records=records, norm=norm)
        drawn[norm] = plots.svg(f"{prefix}{norm}", description, draw, WIDE)
    return {name: Markup(text) for name, text in drawn.items()}  # noqa: S704


def verdict(results: dict[str, Any]) -> str:
    """What the comparison says of accuracy and NLL at the best validation epoch, in a sentence."""
    specs = [loss["spec"] for loss in results["losses"]]
    if REFERENCE not in specs:
        return (
            f"{PEER.capitalize()}, which others are tested against, is not in this comparison; "
            f"{_leaders(results)}, which may be chance."
        )
    if len(specs) == 1:
        return f"Only {PEER} was trained: there is nothing to compare it with."
    column = results["summary"]["best"]["raw"]["nll"]
    if column[REFERENCE]["mean"] is None:
        return f"No run of {PEER} gives numbers, so the others have nothing to be compared with."
    if not any(cell["difference"] and cell["difference"]["n"] > 1 for cell in column.values()):
        return (
            "Without two seeds in common no difference can be told from chance; "
            f"so far {_leaders(results)}."
        )
    findings = [_finding(results, *key) for key in VERDICT]
    if len(set(findings)) == 1:
        return f"On accuracy and NLL, temperature scaled or not, {' '.join(findings[0])}."
    parts, said = [], ""
    for name, (who, claim) in zip(VERDICT.values(), findings, strict=True):
        parts.append(f"on {name} {who}" if claim == said else f"on {name} {who} {claim}")
        said = claim
    return f"O{'; '.join(parts)[1:]}."


def _finding(results: dict[str, Any], name: str, scaling: str) -> tuple[str, str]:
    """Who is clearly better on a metric, and than what.

    A loss with fewer values than runs, because some diverged, is not called better: its mean leaves
    the worst ones out.
    """
    column = results["summary"]["best"][scaling][name]
    if column[REFERENCE]["best"]:
        return f"{PEER} is", "clearly better than every other loss"
    better = []
    for loss in results["losses"]:
        value = column[loss["spec"]]
        cell = tables.cell(name, value)
        if cell.sign > 0 and value["n"] == loss["runs"]:
            unit = " points" if METRICS[name].percent else ""
            better.append(f"{loss['label']} ({cell.difference}{unit})")
    who = f"{_listed(better)} {'are' if len(better) > 1 else 'is'}" if better else "no loss is"
    return who, f"clearly better than {PEER}"


def _leaders(results: dict[str, Any]) -> str:
    """Whose mean accuracy and NLL are best."""
    found = []
    for name, extreme in (("accuracy", "highest accuracy"), ("nll", "lowest NLL")):
        metric, column = METRICS[name], results["summary"]["best"]["raw"][name]
        means = {loss["label"]: column[loss["spec"]]["mean"] for loss in results["losses"]}
        known = {label: mean for label, mean in means.items() if mean is not None}
        if not known:
            return "every run diverged"
        best = max(known.values()) if metric.higher_is_better else min(known.values())
        who = _listed([label for label, mean in known.items() if mean == best])
        value = f"{metric.format(best)}{' %' if metric.percent else ''}"
        found.append(f"the {extreme} is that of {who} ({value})")
    return _listed(found)


def caveats(results: dict[str, Any]) -> list[str]:
    """What a reader should know before believing the tables, one sentence each."""
    runs, planned = results["runs"], results["planned_runs"]
    found = [
        f"{loss['label']}: {loss['diverged']} of {loss['runs']} runs diverged. They are left out "
        "of the means at the last epoch, which flatters those."
        for loss in results["losses"]
        if loss["diverged"]
    ]
    if len(runs) < planned:
        found.append(
            f"Unfinished: only {len(runs)} of {planned} runs are in; the verdict may change."
        )
    fitted = [run["temperature"][epoch] for run in runs for epoch in EPOCHS]
    if untold := fitted.count(1.0):
        found.append(
            f"In {untold} of {len(fitted)} cases the validation rows cannot tell the temperature; "
            "there it is 1, and values marked (T) are not scaled."
        )
    mixed = [name for name, values in _versions(results).items() if len(values) > 1]
    if mixed:
        found.append(f"Runs were made in different environments ({_listed(mixed)}; see Versions).")
    return found


def _versions(results: dict[str, Any]) -> dict[str, list[str]]:
    """Every version that made a run, by package."""
    names = results["runs"][0]["versions"]
    return {name: sorted({run["versions"][name] for run in results["runs"]}) for name in names}


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
