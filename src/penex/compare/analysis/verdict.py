"""The verdict in words: which loss to train with, and warnings about unreliable results.

Both are derived from the content of results.json alone.
"""

import re
from collections.abc import Sequence
from statistics import median
from typing import Any

from penex.compare.analysis.statistics import MIN_SEEDS
from penex.compare.registry import LOSSES, REFERENCE
from penex.compare.training.selection import LAST
from penex.metrics import METRICS, Metric

REFERENCE_NAME = LOSSES[REFERENCE].label.lower()
MIN_VALIDATION_ROWS = 200
"""With fewer validation rows, temperatures and selected epochs are uncertain."""
LATE = 0.95
"""Epochs from this share of training on count as the end of training."""
TEMPERATURES = (0.2, 5.0)
"""The range outside which a fitted temperature means that probabilities are far off."""
EXTREME_NLL = 10.0
"""The NLL of a row, in nats, above which the row is extreme: a probability below 5e-5."""
ABSURD_NLL = 50.0
"""The NLL of a row, in nats, that warrants a warning even if it occurs in one run only."""
EXTREME_SHARE = 0.5
"""The share of the NLL above which the worst hundredth of the rows dominate it."""
NEAR_MAJORITY = 0.02
"""The largest gain over the majority class that is considered negligible, in accuracy."""


def recommendation(results: dict[str, Any]) -> str:
    """State which loss to train with, by how much it is better, how certain that is, and how long.

    Args:
        results: A result of :func:`penex.compare.analysis.summary.summarize`.
    """
    missing = _why_none(results)
    if missing is not None:
        return f"{missing}{_best_so_far(results)}"
    spec = recommended(results)
    if spec == REFERENCE:
        return _keep(results)
    best = results["primary"]["best"]
    return _switch(results, spec) if spec == best else _consider(results, spec)


def recommended(results: dict[str, Any]) -> str:
    """The loss that :func:`recommendation` recommends; else the reference or the best so far."""
    primary, column = results["primary"], primary_column(results)
    better = primary["better"]
    if _why_none(results) is None and better:
        if primary["best"] in better:
            return str(primary["best"])
        return str(min(better, key=lambda spec: _rank(results, spec)))
    if REFERENCE in column and column[REFERENCE]["mean"] is not None:
        return REFERENCE
    return str(primary["best"] or results["losses"][0]["spec"])


def _why_none(results: dict[str, Any]) -> str | None:
    """Why there is no recommendation; None if there is one."""
    primary, seeds = results["primary"], len(results["seeds"])
    losses = [loss["spec"] for loss in results["losses"]]
    started = [loss["spec"] for loss in results["losses"] if loss["runs"]]
    if REFERENCE not in losses:
        return (
            f"No recommendation: {REFERENCE_NAME}, the loss that the others are compared with, is "
            "not part of this comparison."
        )
    if len(losses) == 1:
        return f"No recommendation: {REFERENCE_NAME} is the only loss."
    if REFERENCE not in started or len(started) == 1:
        absent = REFERENCE_NAME if REFERENCE not in started else "any other loss"
        return f"No recommendation yet: no run of {absent} has finished."
    if seeds < MIN_SEEDS:
        return (
            f"No recommendation yet: the losses have {seeds} seed{'s' * (seeds != 1)} in common, "
            f"and a confidence interval needs at least {MIN_SEEDS}."
        )
    if REFERENCE in primary["incomplete"]:
        return (
            f"No recommendation: {REFERENCE_NAME}, the loss that the others are compared with, "
            "diverged in some runs. Lower its learning rate and run the comparison again."
        )
    return None


def _best_so_far(results: dict[str, Any]) -> str:
    """A space and a sentence with the best mean so far; empty if fewer than two losses have one."""
    best, column = results["primary"]["best"], primary_column(results)
    if best is None or sum(cell["mean"] is not None for cell in column.values()) < 2:
        return ""
    value = with_unit(results["primary"]["metric"], column[best]["mean"])
    return f" {_capital(_named(results, [best]))} has the best {_metric_name(results)}: {value}."


def _rank(results: dict[str, Any], spec: str) -> float:
    value = float(primary_column(results)[spec]["mean"])
    return -value if METRICS[results["primary"]["metric"]].higher_is_better else value


def _switch(results: dict[str, Any], best: str) -> str:
    """The recommendation if the best loss is better than the reference."""
    primary = results["primary"]
    text = f"Train with {_with_settings(results, best)}: {_improvement(results, best)}."
    others = [spec for spec in primary["best_group"] if spec != best]
    if others:
        text += (
            f" The difference between it and {_named(results, others, 'or')} is not significant."
        )
    also = [spec for spec in primary["better"] if spec != best and spec not in others]
    if also:
        text += f" Also better than {REFERENCE_NAME}: {_named(results, also)}."
    return f"{text} {_how_to_stop(results, best)}"


def _consider(results: dict[str, Any], spec: str) -> str:
    """The recommendation if a loss is better than the reference, but the best mean is not."""
    best = results["primary"]["best"]
    value = with_unit(results["primary"]["metric"], primary_column(results)[best]["mean"])
    return (
        f"Consider {_with_settings(results, spec)}: {_improvement(results, spec)}. "
        f"{_capital(_named(results, [best]))} has the best mean, {value}, but its difference from "
        f"{REFERENCE_NAME} is not significant; more seeds may show which is better. "
        f"{_how_to_stop(results, spec)}"
    )


def _keep(results: dict[str, Any]) -> str:
    """The recommendation if no loss is better than the reference."""
    primary = results["primary"]
    start = f"Keep {_with_settings(results, REFERENCE)}: "
    rivals = [
        loss["spec"]
        for loss in results["losses"]
        if loss["runs"] and loss["spec"] not in (REFERENCE, *primary["incomplete"])
    ]
    if not rivals:
        reason = "every other loss diverged in some runs"
    elif set(rivals) <= set(primary["worse"]):
        others = "every other loss has" if len(rivals) > 1 else f"{_named(results, rivals)} has"
        reason = f"{others} a significantly worse {_metric_name(results)}"
    else:
        least = smallest_difference(results)
        reason = (
            f"no loss improves the {_metric_name(results)} significantly and by at least {least}"
        )
        best = primary["best"]
        if best != REFERENCE:
            reason += f" ({_named(results, [best])}: {_improvement(results, best)})"
    return f"{start}{reason}. {_how_to_stop(results, REFERENCE)}"


def _how_to_stop(results: dict[str, Any], spec: str) -> str:
    """A sentence on how long to train."""
    selection = results["primary"]["selection"]
    total = results["config"]["epochs"]
    until = f"Train for {total} epoch{'s' * (total != 1)}"
    if selection == LAST:
        return f"{until}."
    epochs = [epoch for epoch in _loss(results, spec)["epochs"][selection] if epoch is not None]
    about = round(median(epochs))
    if about >= LATE * total:
        return f"{until} or more: the best epoch is at the end of training."
    how = {
        "refined": "with the lowest validation NLL after temperature scaling",
        "nll": "with the lowest validation NLL",
        "accuracy": "with the highest validation accuracy",
    }[selection]
    then = ", and apply temperature scaling" if selection == "refined" else ""
    return f"Use the epoch {how} (here about {about} of {total}){then}."


def _improvement(results: dict[str, Any], spec: str) -> str:
    """The values of a loss and of the reference, with the interval of the difference."""
    column, name = primary_column(results), results["primary"]["metric"]
    ours, reference = column[spec], column[REFERENCE]
    text = (
        f"{_metric_name(results)} {with_unit(name, ours['mean'])} instead of "
        f"{with_unit(name, reference['mean'])}"
    )
    difference = ours["difference"]
    if difference is None or difference["low"] is None:
        return text
    metric = METRICS[name]
    mean, low, high = (signed(metric, difference[end]) for end in ("mean", "low", "high"))
    points = " points" if metric.percent else ""
    text += f" (difference {mean}{points}, 95 % interval [{low}, {high}]"
    if difference["p"] is not None:
        p = difference["p"]
        text += f", adjusted p {'< 0.001' if p < 0.001 else f'= {p:.2g}'}"
    return f"{text})"


def _with_settings(results: dict[str, Any], spec: str) -> str:
    loss = _loss(results, spec)
    return f"{_label(loss)} ({settings(loss)})"


def settings(loss: dict[str, Any]) -> str:
    """Hyperparameter, unless the label shows it, and learning rate: "α = 0.1, lr = 0.001"."""
    values = [("lr", loss["lr"])]
    if "=" not in loss["spec"]:
        values.insert(0, (loss["symbol"], loss["value"]))
    return ", ".join(f"{name} = {value:.3g}" for name, value in values if value is not None)


def warnings(results: dict[str, Any]) -> list[str]:
    """Reasons to distrust the results of this comparison, each in a sentence or two."""
    found = []
    done, planned = len(results["runs"]), results["planned_runs"]
    finished = {(run["loss"], run["seed"]) for run in results["runs"]}
    missing = [
        f"{loss['label']} (seed {seed})"
        for seed in range(results["config"]["seeds"])
        for loss in results["losses"]
        if (loss["spec"], seed) not in finished
    ]
    if done < planned:
        found.append(
            f"Unfinished: {done} of {planned} runs have finished. The recommendation may change. "
            f"Missing: {', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}."
        )
    found += _diverged(results)
    found += _late(results)
    rows = results["runs"][0]["rows"]
    if rows["validation"] < MIN_VALIDATION_ROWS:
        found.append(
            f"Only {rows['validation']} validation rows. With fewer than {MIN_VALIDATION_ROWS}, "
            "the selected epochs and temperatures are unreliable."
        )
    found += _unreasonable_temperatures(results)
    found += _extreme_rows(results)
    found += _near_majority(results)
    mixed = [name for name, values in versions(results).items() if len(values) > 1]
    if mixed:
        found.append(
            "Runs were made in different environments; they differ in "
            f"{_listed(mixed)} (see Versions in the report)."
        )
    return found


def _diverged(results: dict[str, Any]) -> list[str]:
    found = []
    for loss in results["losses"]:
        if loss["diverged"]:
            unranked = loss["spec"] in results["primary"]["incomplete"]
            found.append(
                f"{loss['label']}: {loss['diverged']} of {loss['runs']} runs diverged"
                f"{', so it is not ranked' * unranked}. Lower its learning rate."
            )
    return found


def _late(results: dict[str, Any]) -> list[str]:
    selection, total = results["primary"]["selection"], results["config"]["epochs"]
    if selection == LAST:
        selection = "refined"
    late = []
    for loss in results["losses"]:
        epochs = [epoch for epoch in loss["epochs"][selection] if epoch is not None]
        if epochs and sum(epoch >= LATE * total for epoch in epochs) > len(epochs) / 2:
            late.append(loss["label"])
    if not late:
        return []
    return [
        f"{_listed(late)}: in most runs the best epoch is at the end of training. Train longer "
        "(--epochs) before you compare."
    ]


def _unreasonable_temperatures(results: dict[str, Any]) -> list[str]:
    selection, found = results["primary"]["selection"], []
    for loss in results["losses"]:
        values = [t for t in _of_runs(results, loss, "temperature", selection) if t is not None]
        outside = [t for t in values if not TEMPERATURES[0] <= t <= TEMPERATURES[1]]
        if outside:
            worst = max(outside, key=lambda t: max(t, 1 / t))
            found.append(
                f"{loss['label']}: in {len(outside)} of {len(values)} runs the fitted temperature "
                f"is outside {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g} (the most extreme is "
                f"{worst:.3g}). Without temperature scaling its probabilities are far off."
            )
    return found


def _extreme_rows(results: dict[str, Any]) -> list[str]:
    found = []
    for loss in results["losses"]:
        extreme = [
            run["extreme_rows"]
            for run in results["runs"]
            if run["loss"] == loss["spec"] and run["extreme_rows"] is not None
        ]
        dominated = [
            each
            for each in extreme
            if each["share"] > EXTREME_SHARE and each["largest"] > EXTREME_NLL
        ]
        blown_up = any(each["largest"] > ABSURD_NLL for each in dominated)
        if blown_up or len(dominated) > len(extreme) / 2:
            worst = max(dominated, key=lambda each: float(each["share"]))
            rows = worst["rows"]
            found.append(
                f"{loss['label']}: in {len(dominated)} of {len(extreme)} runs a few test rows make "
                f"up most of the NLL (in one run {rows} row{'s' * (rows != 1)} "
                f"{100 * worst['share']:.0f} % of it; the largest NLL of a row is "
                f"{worst['largest']:.0f}). Look for outliers in the features of these rows."
            )
    return found


def _near_majority(results: dict[str, Any]) -> list[str]:
    selection = results["primary"]["selection"]
    column = results["summary"][selection]["link"]["accuracy"]
    known = [cell["mean"] for cell in column.values() if cell["mean"] is not None]
    majority = results["baseline"]["accuracy"]
    if not known or max(known) - majority > NEAR_MAJORITY:
        return []
    return [
        f"The best accuracy ({100 * max(known):.1f} %) is hardly above that of always predicting "
        f"the majority class ({100 * majority:.1f} %). Look at balanced accuracy and macro-F1."
    ]


def _of_runs(results: dict[str, Any], loss: dict[str, Any], name: str, key: str) -> list[Any]:
    return [run[name].get(key) for run in results["runs"] if run["loss"] == loss["spec"]]


def versions(results: dict[str, Any]) -> dict[str, list[str]]:
    """The versions with which runs were made, by package."""
    names = results["runs"][0]["versions"]
    return {name: sorted({run["versions"][name] for run in results["runs"]}) for name in names}


def primary_column(results: dict[str, Any]) -> dict[str, Any]:
    """The column of the summary on which the recommendation is based."""
    primary = results["primary"]
    column: dict[str, Any] = results["summary"][primary["selection"]][primary["scaling"]][
        primary["metric"]
    ]
    return column


def _metric_name(results: dict[str, Any]) -> str:
    primary = results["primary"]
    metric = METRICS[primary["metric"]]
    name = {"brier": "Brier score"}.get(primary["metric"], _in_sentence(metric.label))
    # Temperature scaling changes no predicted class, and so no metric in percent.
    scaled = primary["scaling"] == "scaled" and not metric.percent
    return f"test {name}" + (" after temperature scaling" if scaled else "")


def with_unit(name: str, value: float) -> str:
    """Format a value of a metric with its unit."""
    return f"{METRICS[name].format(value)}{' %' if METRICS[name].percent else ''}"


def smallest_difference(results: dict[str, Any]) -> str:
    """The smallest difference that counts in the recommendation's metric, with its unit."""
    primary = results["primary"]
    metric, least = METRICS[primary["metric"]], primary["threshold"]
    return f"{100 * least:.2g} points" if metric.percent else f"{least:.2g}"


def signed(metric: Metric, value: float) -> str:
    """Format a difference with its sign; without one if it is printed as zero."""
    text = metric.format(abs(value))
    if float(text) == 0:
        return text
    return f"{'−' if value < 0 else '+'}{text}"


def _loss(results: dict[str, Any], spec: str) -> dict[str, Any]:
    found: dict[str, Any] = next(loss for loss in results["losses"] if loss["spec"] == spec)
    return found


def _label(loss: dict[str, Any]) -> str:
    return _in_sentence(loss["label"])


def _in_sentence(name: str) -> str:
    """Format a name for use within a sentence: lower case, except for abbreviations."""
    first = re.split("[ -]", name, maxsplit=1)[0]
    return name if first[1:] != first[1:].lower() else name[0].lower() + name[1:]


def _capital(text: str) -> str:
    """Capitalise the start of a sentence, except for names such as log-PENEX."""
    return text if text.startswith(("log-", "z-")) else text[0].upper() + text[1:]


def _named(results: dict[str, Any], specs: Sequence[str], word: str = "and") -> str:
    return _listed([_label(_loss(results, spec)) for spec in specs], word)


def _listed(names: Sequence[str], word: str = "and") -> str:
    return f" {word} ".join(filter(None, (", ".join(names[:-1]), names[-1])))
