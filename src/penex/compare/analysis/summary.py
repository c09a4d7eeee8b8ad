"""The summary of a comparison from saved logits: metrics, means, intervals and differences.

No network is evaluated here. `summarize` may be called at any time on the runs finished so far.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from penex import __version__
from penex.compare.analysis.statistics import (
    Decision,
    Estimate,
    crossed_interval,
    decide,
    resplit_interval,
)
from penex.compare.config import Config, check_metric
from penex.compare.errors import CompareError
from penex.compare.files import read_json, reading
from penex.compare.finished_runs import read_logits, read_run
from penex.compare.output_folder import read_comparison, read_timing, run_folder
from penex.compare.registry import REFERENCE, parse_loss
from penex.compare.training.selection import SELECTIONS
from penex.metrics import (
    METRICS,
    calibration_floor,
    evaluate,
    fit_temperature,
    majority_baseline,
    row_values,
)

SCALINGS = {
    "link": "probabilities of the loss's link",
    "scaled": "the same after temperature scaling",
    "softmax": "plain softmax",
}
"""The ways to turn logits into probabilities, with their titles in reports."""
LEVEL = 0.95
PRINTED_STEP = 0.001
"""One unit of the last digit with which tables print a metric; for shares, 0.1 %."""
FLOOR_DRAWS = 20
SCHEMA = 2
GROUPS = 10
"""Number of groups of test rows for the interval of a metric that is not a mean over rows."""

Floats = NDArray[np.float64]
Key = tuple[str, int]
"""A run, by its loss and its seed."""


class Predictions(NamedTuple):
    """The predictions of a network on test rows at a selected epoch.

    Attributes:
        test: Log-probabilities of the link, shape (N, K).
        target: Labels, shape (N,).
        softmax: Log-probabilities of plain softmax, shape (N, K).
        temperature: Temperature fitted to the link's log-probabilities on validation rows.
    """

    test: Floats
    target: NDArray[np.int64]
    softmax: Floats
    temperature: float

    def scaled(self, scaling: str) -> Floats:
        """Logits whose softmax gives the probabilities of a scaling."""
        if scaling == "softmax":
            return self.softmax
        return self.test / self.temperature if scaling == "scaled" else self.test


def predictions(
    config: Config, record: Mapping[str, Any], saved: Mapping[str, NDArray[Any]], selection: str
) -> Predictions | None:
    """The predictions of a run at a selection.

    Args:
        config: The configuration of the comparison.
        record: The content of run.json.
        saved: The content of logits.npz.
        selection: One of :data:`~penex.compare.training.selection.SELECTIONS`.

    Returns:
        The predictions; None if no epoch had finite scores, or the logits of the selected epoch are
        not finite.
    """
    epoch = record["epochs"].get(selection)
    if epoch is None:
        return None
    logits = [saved[f"{part}_{epoch}"].astype(np.float64) for part in ("validation", "test")]
    if not all(np.isfinite(part).all() for part in logits):
        return None
    knob = math.nan if record["knob"] is None else record["knob"]
    link = parse_loss(record["loss"]).loss.link(knob, logits[0].shape[1])
    validation, test = (link(torch.from_numpy(part)).numpy() for part in logits)
    temperature = fit_temperature(validation, saved["validation_target"])
    softmax = torch.from_numpy(logits[1]).log_softmax(1).numpy()
    return Predictions(test, saved["test_target"], softmax, temperature)


def summarize(
    folder: Path, *, metric: str | None = None, min_difference: float | None = None
) -> dict[str, Any]:
    """Everything that tables and figures show, as plain values: the content of results.json.

    Args:
        folder: An output folder.
        metric: The metric that ranks losses, in place of the configuration's.
        min_difference: Its smallest difference that matters, in place of the configuration's.

    Raises:
        CompareError: `folder` contains no comparison, no finished run, or a damaged file; or there
            is no such metric.
    """
    config, data = read_comparison(folder)
    chosen = {"metric": metric, "min_difference": min_difference}
    config = config.model_copy(update={k: v for k, v in chosen.items() if v is not None})
    check_metric(config.metric)
    fixed_test = config.shares_test_rows(data["parts"])
    finished = [
        (spec, seed)
        for spec in config.losses
        for seed in range(config.seeds)
        if (run_folder(folder, spec, seed) / "run.json").exists()
    ]
    if not finished:
        raise CompareError(f"{folder} has no finished run yet; run penex compare first")
    runs = [_run(folder, config, *key, fixed_test=fixed_test) for key in finished]
    design = _Design(config, runs, fixed_test=fixed_test)
    summary = {
        selection: {
            scaling: {name: _column(design, selection, scaling, name)[0] for name in METRICS}
            for scaling in SCALINGS
        }
        for selection in SELECTIONS
    }
    return {
        "schema": SCHEMA,
        "penex": __version__,
        "config": config.settings(),
        "data": data,
        "planned_runs": len(config.losses) * config.seeds,
        "seeds": design.seeds,
        "losses": [_loss(spec, runs) for spec in config.losses],
        "summary": summary,
        "primary": _primary(design, summary),
        "baseline": _baseline(folder, design),
        "seconds_per_epoch": read_timing(folder),
        "published": _published(folder, config, runs),
        "runs": [run.record for run in runs],
    }


@dataclass(frozen=True)
class _Run:
    """The record of one run with its metrics, and further values that intervals need."""

    record: dict[str, Any]
    rows: dict[tuple[str, str], dict[str, Floats]]
    """By selection and scaling: for each row, the metrics that are means over rows."""
    groups: dict[tuple[str, str], dict[str, Floats]]
    """By selection and scaling: for each group of rows, the jackknife pseudo-values of a metric."""

    @property
    def key(self) -> Key:
        return self.record["loss"], self.record["seed"]


def _run(folder: Path, config: Config, spec: str, seed: int, *, fixed_test: bool) -> _Run:
    where = run_folder(folder, spec, seed)
    record, saved = read_run(where)
    if (record["loss"], record["seed"]) != (spec, seed):
        raise CompareError(f"{where / 'run.json'} is of another run; remove {where} and run again")
    record |= {"temperature": {}, "test": {}, "floor": {}, "extreme_rows": None}
    run = _Run(record, {}, {})
    known: dict[int | None, str] = {}  # selections often share an epoch
    for selection in SELECTIONS:
        same = known.setdefault(record["epochs"].get(selection), selection)
        if same == selection:
            _evaluate(run, selection, predictions(config, record, saved, selection))
            continue
        for column in (record["temperature"], record["test"]):
            column[selection] = column[same]
        for scaling in SCALINGS:
            if (same, scaling) in run.rows:
                run.rows[selection, scaling] = run.rows[same, scaling]
    found = predictions(config, record, saved, config.select)
    if found is not None:
        _examine(run, config.select, found, fixed_test)
    return run


def _evaluate(run: _Run, selection: str, found: Predictions | None) -> None:
    """Add the metrics of a run at a selection to its record; None if the run diverged."""
    record = run.record
    if found is None:
        record["temperature"][selection] = None
        record["test"][selection] = dict.fromkeys(SCALINGS)
        return
    record["temperature"][selection] = found.temperature
    record["test"][selection] = {}
    for scaling in SCALINGS:
        logits = found.scaled(scaling)
        record["test"][selection][scaling] = _finite(evaluate(logits, found.target))
        run.rows[selection, scaling] = row_values(logits, found.target)


def _examine(run: _Run, selection: str, found: Predictions, fixed_test: bool) -> None:
    """Add the values needed only at the selection on which the recommendation is based."""
    losses = np.sort(run.rows[selection, "link"]["nll"])[::-1]
    few = max(1, len(losses) // 100)
    run.record["extreme_rows"] = {
        "rows": few,
        "share": float(losses[:few].sum() / losses.sum()) if losses.sum() > 0 else 0.0,
        "largest": float(losses[0]),
    }
    for scaling in ("link", "scaled"):
        logits = found.scaled(scaling)
        run.record["floor"][scaling] = calibration_floor(logits, found.target, draws=FLOOR_DRAWS)
        if fixed_test:
            whole = run.record["test"][selection][scaling]
            run.groups[selection, scaling] = _pseudo_values(whole, logits, found.target)


def _pseudo_values(
    whole: Mapping[str, float | None], logits: Floats, target: NDArray[np.int64]
) -> dict[str, Floats]:
    """Jackknife pseudo-values by metric, one for each of :data:`GROUPS` groups of rows.

    A pseudo-value is G times the value on all rows minus G - 1 times the value without the group.
    For a metric that is not a mean over rows, the pseudo-values replace the per-row values in the
    interval (Tukey, 1958). They are shifted so that their mean is the value on all rows, because
    the tables show that value and not the bias-corrected estimate of the jackknife.
    """
    n = len(target)
    if n < 2 * GROUPS:
        return {}
    group = np.random.default_rng(0).permutation(n) % GROUPS
    without = [evaluate(logits[group != g], target[group != g]) for g in range(GROUPS)]
    found = {}
    for name, value in whole.items():
        if value is not None:
            deviation = -(GROUPS - 1) * np.array([each[name] for each in without])
            found[name] = value + deviation - deviation.mean()
    return found


class _Design:
    """The runs of a comparison, and how its seeds and test rows were drawn."""

    def __init__(self, config: Config, runs: Sequence[_Run], *, fixed_test: bool) -> None:
        self.config = config
        self.runs = {run.key: run for run in runs}
        self.losses = [spec for spec in config.losses if any(s == spec for s, _ in self.runs)]
        self.seeds = [
            seed
            for seed in range(config.seeds)
            if all((spec, seed) in self.runs for spec in self.losses)
        ]
        """The seeds at which every loss with a finished run has one."""
        self.fixed_test = fixed_test
        """Whether the test rows are the same at all seeds."""

    def values(self, spec: str, selection: str, scaling: str, metric: str) -> Floats:
        """The values of a metric by seed; NaN where the run diverged."""
        found = []
        for seed in self.seeds:
            result = self.runs[spec, seed].record["test"][selection][scaling]
            value = None if result is None else result[metric]
            found.append(math.nan if value is None else value)
        return np.array(found)

    def estimate(
        self, specs: Sequence[str], selection: str, scaling: str, metric: str
    ) -> Estimate | None:
        """The estimate of the metric of one loss, or of the difference between two losses.

        It is based on the seeds at which no run of these losses diverged; None if there are none.
        """
        values = np.array([self.values(spec, selection, scaling, metric) for spec in specs])
        sign = np.array([1.0, -1.0])[: len(specs)]
        known = np.isfinite(values).all(axis=0)
        if not known.any():
            return None
        low, high = METRICS[metric].bounds
        bounds = (low, high) if len(specs) == 1 else (low - high, high - low)
        if not self.fixed_test:
            share = self.config.test_size
            of_seed = sign @ values[:, known]
            return resplit_interval(of_seed, test_share=share, level=LEVEL, bounds=bounds)
        seeds = [seed for seed, has in zip(self.seeds, known, strict=True) if has]
        by_row = [
            sign
            @ np.array([self._rows((spec, seed), selection, scaling, metric) for spec in specs])
            for seed in seeds
        ]
        if any(not len(row) or not np.isfinite(row).all() for row in by_row):
            return Estimate(float((sign @ values[:, known]).mean()), len(seeds))
        return crossed_interval(np.array(by_row), level=LEVEL, bounds=bounds)

    def _rows(self, key: Key, selection: str, scaling: str, metric: str) -> Floats:
        run, where = self.runs[key], (selection, scaling)
        if metric in run.rows.get(where, {}):
            return run.rows[where][metric]
        return run.groups.get(where, {}).get(metric, np.empty(0))


def _column(
    design: _Design, selection: str, scaling: str, metric: str
) -> tuple[dict[str, Any], Decision]:
    """One metric for every loss: its interval and difference to the reference; and the decision.

    A column is one family of comparisons with the reference for Holm's correction.
    """

    def compare(first: str, second: str) -> Estimate:
        found = design.estimate([first, second], selection, scaling, metric)
        if found is None:
            raise ValueError(f"no value of {first} and {second}")
        return found

    values = {spec: design.values(spec, selection, scaling, metric) for spec in design.losses}
    facts = METRICS[metric]
    decision = decide(
        values,
        compare,
        reference=REFERENCE,
        higher_is_better=facts.higher_is_better,
        smallest_difference=_smallest(design.config, metric, values),
        printed_step=PRINTED_STEP,
        level=LEVEL,
    )
    column: dict[str, Any] = {}
    for spec in design.config.losses:
        own = design.estimate([spec], selection, scaling, metric) if spec in values else None
        difference = decision.differences.get(spec)
        column[spec] = {
            **_plain(own),
            "difference": None
            if difference is None
            else _plain(difference) | {"p": decision.p_adjusted.get(spec)},
            "sign": (spec in decision.better) - (spec in decision.worse),
            "best": False,
        }
    return column, decision


def _smallest(config: Config, metric: str, values: Mapping[str, Floats]) -> float:
    """The smallest difference in a metric that matters."""
    if metric == config.metric and config.min_difference is not None:
        return config.min_difference
    if METRICS[metric].percent:
        return 0.005
    reference = values.get(REFERENCE, np.empty(0))
    return 0.01 * abs(float(np.nanmean(reference))) if np.isfinite(reference).any() else 0.0


def _plain(estimate: Estimate | None) -> dict[str, Any]:
    if estimate is None:
        return {"mean": None, "low": None, "high": None, "n": 0}
    return {
        "mean": estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
        "n": estimate.seeds,
    }


def primary_scaling(selection: str) -> str:
    """The scaling in which the recommendation's metric is computed, given by the selection."""
    return "scaled" if selection == "refined" else "link"


def _primary(design: _Design, summary: dict[str, Any]) -> dict[str, Any]:
    """The decision for the primary metric; a starred loss is also marked in `summary`."""
    metric, selection = design.config.metric, design.config.select
    scaling = primary_scaling(selection)
    _, decision = _column(design, selection, scaling, metric)
    if decision.starred is not None:
        summary[selection][scaling][metric][decision.starred]["best"] = True
    return {
        "metric": metric,
        "selection": selection,
        "scaling": scaling,
        "best": decision.best,
        "starred": decision.starred,
        "best_group": list(decision.best_group),
        "better": list(decision.better),
        "worse": list(decision.worse),
        "incomplete": list(decision.incomplete),
        "threshold": decision.threshold,
        "fixed_test": design.fixed_test,
    }


def _baseline(folder: Path, design: _Design) -> dict[str, float | None]:
    """The metrics of predicting the class frequencies of the training rows, mean over seeds."""
    spec = design.losses[0]
    found = []
    for seed in [seed for s, seed in design.runs if s == spec]:
        target = read_logits(run_folder(folder, spec, seed))["test_target"]
        counts = design.runs[spec, seed].record["class_counts"]
        labels = np.repeat(np.arange(len(counts)), counts)
        found.append(majority_baseline(labels, target, len(counts)))
    means = {name: float(np.mean([each[name] for each in found])) for name in METRICS}
    return _finite(means)


def _loss(spec: str, runs: Sequence[_Run]) -> dict[str, Any]:
    candidate = parse_loss(spec)
    knob = candidate.loss.knob
    own = [run.record for run in runs if run.record["loss"] == spec]
    return {
        "spec": spec,
        "label": candidate.label,
        "knob": knob.name if knob else None,
        "symbol": knob.symbol if knob else None,
        "value": own[0]["knob"] if own else None,
        "lr": own[0]["lr"] if own else None,
        "runs": len(own),
        "diverged": sum(any(at["link"] is None for at in run["test"].values()) for run in own),
        "epochs": {name: [run["epochs"].get(name) for run in own] for name in SELECTIONS},
    }


def _published(folder: Path, config: Config, runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """The entries of published.json, if there is one, each with our mean over seeds as "ours".

    An entry has a "loss", a "metric" (one of :data:`METRICS`, on test rows; or validation_nll), the
    selection "at" which the metric was computed, the "scaling" of the probabilities, the published
    "value" and its "source".
    """
    path = folder / "published.json"
    if not path.exists():
        return []
    found = []
    remedy = "remove it, or run penex reproduce again"
    entries = read_json(path, remedy)
    with reading(path, remedy):
        entries = list(entries)
    for entry in entries:
        try:
            spec, metric, at = entry["loss"], entry["metric"], entry["at"]
            scaling = entry.get("scaling", "link")
            if scaling not in ("link", "softmax"):
                raise ValueError(f"scaling {scaling!r}")
            if metric != "validation_nll" and metric not in METRICS:
                raise ValueError(f"metric {metric!r}")
            if at not in SELECTIONS:
                raise ValueError(f"at {at!r}")
            published = {"value": float(entry["value"]), "source": str(entry["source"])}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CompareError(f"{path}: an entry is invalid ({error})") from None
        if spec not in config.losses:
            continue
        own = [run.record for run in runs if run.record["loss"] == spec]
        if metric == "validation_nll":
            results = [run["validation"].get(at) for run in own]
            name = "softmax_nll" if scaling == "softmax" else "nll"
        else:
            results, name = [run["test"][at][scaling] for run in own], metric
        values = [result[name] for result in results if result and result[name] is not None]
        ours = {"mean": float(np.mean(values)) if values else None, "n": len(values)}
        found.append(
            {"loss": spec, "label": parse_loss(spec).label, "metric": metric, "at": at}
            | published
            | {"ours": ours}
        )
    return found


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
