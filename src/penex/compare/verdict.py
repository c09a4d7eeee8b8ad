"""The answer in words: what to train with, and what in the results should not be believed.

Both are made from the content of results.json alone.
"""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from penex.compare.registry import LOSSES, REFERENCE
from penex.compare.selection import LAST
from penex.compare.statistics import MIN_SEEDS
from penex.metrics import METRICS

REFERENCE_NAME = LOSSES[REFERENCE].label.lower()
MIN_VALIDATION_ROWS = 200
"""With fewer validation rows, temperatures and selected epochs are uncertain."""
LATE = 0.95
"""An epoch in the last 5 % of training counts as its end."""
TEMPERATURES = (0.2, 5.0)
"""A temperature outside says that the probabilities need more than a correction."""
EXTREME_NLL = 10.0
"""A row with a larger NLL, in nats, was given a probability below 5e-5."""
EXTREME_SHARE = 0.5
"""If the worst hundredth of the rows make more than this share of the NLL, they decide it."""
NEAR_MAJORITY = 0.02
"""Accuracy no more than this above that of the majority class."""


def recommendation(results: dict[str, Any]) -> str:
    """Which loss to train with, by how much it is better, how certain that is, and how to train.

    Args:
        results: Of :func:`penex.compare.analysis.summarize`.
    """
    primary, column = results["primary"], primary_column(results)
    if REFERENCE not in column:
        best = primary["best"]
        lead = f" The best value so far is that of {_named(results, [best])}." if best else ""
        return (
            f"No recommendation: {REFERENCE_NAME}, with which the other losses are compared, is "
            f"not among the losses.{lead}"
        )
    if len(column) == 1:
        return f"No recommendation: {REFERENCE_NAME} is the only loss."
    if column[REFERENCE]["mean"] is None or REFERENCE in primary["incomplete"]:
        return (
            f"No recommendation: runs of {REFERENCE_NAME} diverged, so there is nothing to compare "
            "the other losses with. Lower the learning rate."
        )
    if len(results["seeds"]) < MIN_SEEDS:
        best, n = primary["best"], len(results["seeds"])
        return (
            f"No recommendation yet: {n} seed{'s' * (n != 1)} in common, and at least {MIN_SEEDS} "
            f"are needed to tell a difference from chance. {_sentence_of_best(results, best)}"
        )
    spec = recommended(results)
    if spec == REFERENCE:
        return _keep(results)
    return _switch(results, spec) if spec == primary["best"] else _consider(results, spec)


def recommended(results: dict[str, Any]) -> str:
    """The loss that :func:`recommendation` names; without one, the reference or the best so far."""
    primary, column = results["primary"], primary_column(results)
    better = primary["better"]
    if len(results["seeds"]) >= MIN_SEEDS and better:
        if primary["best"] in better:
            return str(primary["best"])
        return str(min(better, key=lambda spec: _rank(results, spec)))
    if REFERENCE in column and column[REFERENCE]["mean"] is not None:
        return REFERENCE
    return str(primary["best"] or results["losses"][0]["spec"])


def _rank(results: dict[str, Any], spec: str) -> float:
    value = float(primary_column(results)[spec]["mean"])
    return -value if METRICS[results["primary"]["metric"]].higher_is_better else value


def _switch(results: dict[str, Any], best: str) -> str:
    """The best loss is better than the reference."""
    primary = results["primary"]
    text = f"Train with {_with_settings(results, best)}: {_improvement(results, best)}."
    others = [spec for spec in primary["best_group"] if spec != best]
    if others:
        text += f" It cannot be distinguished from {_named(results, others)}."
    also = [spec for spec in primary["better"] if spec != best and spec not in others]
    if also:
        text += f" Also better than {REFERENCE_NAME}: {_named(results, also)}."
    return f"{text} {_how_to_stop(results, best)}"


def _consider(results: dict[str, Any], spec: str) -> str:
    """A loss is better than the reference, but the best one is not, as it varies too much."""
    best = results["primary"]["best"]
    value = METRICS[results["primary"]["metric"]].format(primary_column(results)[best]["mean"])
    return (
        f"Consider {_with_settings(results, spec)}: {_improvement(results, spec)}. The best value, "
        f"{value}, is that of {_named(results, [best])}, whose difference to {REFERENCE_NAME} is "
        f"not certain; more seeds may tell. {_how_to_stop(results, spec)}"
    )


def _keep(results: dict[str, Any]) -> str:
    """No loss is better than the reference."""
    primary, column = results["primary"], primary_column(results)
    metric = METRICS[primary["metric"]]
    start = f"Keep {_with_settings(results, REFERENCE)}: "
    worse = [spec for spec in primary["worse"] if spec in column]
    if len(worse) == len(column) - 1:
        reason = f"every other loss has a worse {_metric_name(results)}"
    else:
        reason = (
            f"no loss improves the {_metric_name(results)} by a difference that is both certain "
            f"and at least {_amount(metric, primary['threshold'])}"
        )
        best = primary["best"]
        if best not in (None, REFERENCE):
            reason += f" ({_improvement(results, best)} with {_named(results, [best])})"
    return f"{start}{reason}. {_how_to_stop(results, REFERENCE)}"


def _how_to_stop(results: dict[str, Any], spec: str) -> str:
    """At which epoch, and with what gain over training to the end."""
    selection = results["primary"]["selection"]
    total = results["config"]["epochs"]
    if selection == LAST:
        return f"Train for {total} epochs."
    loss = _loss(results, spec)
    epochs = [epoch for epoch in loss["epochs"][selection] if epoch is not None]
    about = round(mean(epochs))
    if about >= LATE * total:
        return f"Train for {total} epochs or longer: the best epoch is at the end of training."
    how = {
        "refined": "the lowest validation NLL after temperature scaling, and scale the temperature",
        "nll": "the lowest validation NLL",
        "accuracy": "the highest validation accuracy",
    }[selection]
    return f"Stop early, at {how} (here about epoch {about} of {total})."


def _improvement(results: dict[str, Any], spec: str) -> str:
    """The value of a loss beside that of the reference, with the interval of the difference."""
    column = primary_column(results)
    metric = METRICS[results["primary"]["metric"]]
    ours, reference = column[spec], column[REFERENCE]
    unit = " %" if metric.percent else ""
    text = (
        f"{_metric_name(results)} {metric.format(ours['mean'])}{unit} instead of "
        f"{metric.format(reference['mean'])}{unit}"
    )
    difference = ours["difference"]
    if difference is None or difference["low"] is None:
        return text
    interval = f"[{_signed(metric, difference['low'])}, {_signed(metric, difference['high'])}]"
    points = " points" if metric.percent else ""
    text += f" (difference {_signed(metric, difference['mean'])}{points}, 95 % interval {interval}"
    if difference["p"] is not None:
        p = difference["p"]
        text += f", adjusted p {'< 0.001' if p < 0.001 else f'= {p:.2g}'}"
    return f"{text})"


def _sentence_of_best(results: dict[str, Any], best: str | None) -> str:
    if best is None:
        return "Every run diverged."
    metric = METRICS[results["primary"]["metric"]]
    value = metric.format(primary_column(results)[best]["mean"])
    unit = " %" if metric.percent else ""
    return f"So far {_named(results, [best])} has the best {_metric_name(results)} ({value}{unit})."


def _with_settings(results: dict[str, Any], spec: str) -> str:
    loss = _loss(results, spec)
    return f"{_label(loss)} ({settings(loss)})"


def settings(loss: dict[str, Any]) -> str:
    """Hyperparameter and learning rate of a loss, as in "α = 0.1, lr = 0.001"."""
    values = [(loss["symbol"], loss["value"]), ("lr", loss["lr"])]
    return ", ".join(f"{name} = {value:.3g}" for name, value in values if value is not None)


def warnings(results: dict[str, Any]) -> list[str]:
    """Why numbers of this comparison should not be believed, a sentence each."""
    found = []
    done, planned = len(results["runs"]), results["planned_runs"]
    if done < planned:
        found.append(f"Unfinished: {done} of {planned} runs. The recommendation may change.")
    found += [
        f"{loss['label']}: {loss['diverged']} of {loss['runs']} runs diverged. Lower its learning "
        "rate; until then it is not ranked."
        for loss in results["losses"]
        if loss["diverged"]
    ]
    found += _late(results)
    rows = results["runs"][0]["rows"]
    if rows["validation"] < MIN_VALIDATION_ROWS:
        found.append(
            f"Only {rows['validation']} validation rows: with fewer than {MIN_VALIDATION_ROWS}, "
            "selected epochs and temperatures are uncertain."
        )
    found += _unreasonable_temperatures(results)
    found += _extreme_rows(results)
    found += _near_majority(results)
    mixed = [name for name, values in versions(results).items() if len(values) > 1]
    if mixed:
        found.append(
            f"Runs were made in different environments ({', '.join(mixed)}; see Versions)."
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
        f"The best epoch of {_listed(late)} is at the end of training in most runs. Train longer "
        "(--epochs) before comparing."
    ]


def _unreasonable_temperatures(results: dict[str, Any]) -> list[str]:
    selection, found = results["primary"]["selection"], []
    for loss in results["losses"]:
        values = [t for t in _of_runs(results, loss, "temperature", selection) if t is not None]
        outside = [t for t in values if not TEMPERATURES[0] <= t <= TEMPERATURES[1]]
        if outside:
            worst = max(outside, key=lambda t: max(t, 1 / t))
            found.append(
                f"{loss['label']}: the fitted temperature is as extreme as {worst:.3g} "
                f"({len(outside)} of {len(values)} runs outside {TEMPERATURES[0]:g} to "
                f"{TEMPERATURES[1]:g}). Its probabilities before scaling mean little."
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
        decided = [
            each
            for each in extreme
            if each["share"] > EXTREME_SHARE and each["largest"] > EXTREME_NLL
        ]
        if decided:
            worst = max(decided, key=lambda each: float(each["share"]))
            rows = worst["rows"]
            found.append(
                f"{loss['label']}: in {len(decided)} of {len(extreme)} runs 1 % of the test rows "
                f"make most of its NLL (in one, {rows} row{'s' * (rows != 1)} "
                f"{worst['share']:.0%}; the largest NLL of a row is {worst['largest']:.0f}). Look "
                "for outliers among the inputs."
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
        f"No loss is much more accurate than the majority class ({100 * max(known):.1f} % and "
        f"{100 * majority:.1f} %). Look at balanced accuracy and macro-F1."
    ]


def _of_runs(results: dict[str, Any], loss: dict[str, Any], name: str, key: str) -> list[Any]:
    return [run[name].get(key) for run in results["runs"] if run["loss"] == loss["spec"]]


def versions(results: dict[str, Any]) -> dict[str, list[str]]:
    """Every version that made a run, by package."""
    names = results["runs"][0]["versions"]
    return {name: sorted({run["versions"][name] for run in results["runs"]}) for name in names}


def primary_column(results: dict[str, Any]) -> dict[str, Any]:
    """The column of the summary that the recommendation is based on."""
    primary = results["primary"]
    column: dict[str, Any] = results["summary"][primary["selection"]][primary["scaling"]][
        primary["metric"]
    ]
    return column


def _metric_name(results: dict[str, Any]) -> str:
    primary = results["primary"]
    label = METRICS[primary["metric"]].label
    name = label if label[:2].isupper() else label[0].lower() + label[1:]
    scaled = primary["scaling"] == "scaled" and primary["metric"] != "accuracy"
    return f"test {name}" + (" after temperature scaling" if scaled else "")


def _amount(metric: Any, value: float) -> str:
    return f"{metric.format(value)}{' points' if metric.percent else ''}"


def _signed(metric: Any, value: float) -> str:
    return f"{'−' if value < 0 else '+'}{metric.format(abs(value))}"


def _loss(results: dict[str, Any], spec: str) -> dict[str, Any]:
    found: dict[str, Any] = next(loss for loss in results["losses"] if loss["spec"] == spec)
    return found


def _label(loss: dict[str, Any]) -> str:
    """The name of a loss in a sentence: names of the field stay, words are in lower case."""
    label: str = loss["label"]
    return label if label[1:2].isupper() or label[0].islower() else label[0].lower() + label[1:]


def _named(results: dict[str, Any], specs: Sequence[str]) -> str:
    return _listed([_label(_loss(results, spec)) for spec in specs])


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
