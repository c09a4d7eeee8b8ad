"""From saved logits to numbers: metrics of every run, then means, intervals and differences.

No model runs here. `summarize` may be called at any time on whatever runs are finished.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from penex import __version__
from penex.compare.config import Config
from penex.compare.errors import CompareError
from penex.compare.registry import REFERENCE, contender
from penex.compare.store import read_comparison, read_json, read_logits, run_folder
from penex.metrics import METRICS, bootstrap, evaluate, fit_temperature, nll

EPOCHS = {"best": "Best validation epoch", "last": "Last epoch"}
SCALINGS = {"raw": "as trained", "scaled": "temperature scaled"}
LEVEL = 0.95
SCHEMA = 1


def summarize(folder: Path) -> dict[str, Any]:
    """Everything that tables and pictures show, as plain values: the content of results.json.

    Raises:
        CompareError: `folder` holds no comparison, no finished run, or a damaged file.
    """
    config, data = read_comparison(folder)
    runs = [
        _run(folder, spec, seed)
        for spec in config.losses
        for seed in range(config.seeds)
        if (run_folder(folder, spec, seed) / "run.json").exists()
    ]
    if not runs:
        raise CompareError(f"{folder} has no finished run yet; run penex compare first")
    return {
        "schema": SCHEMA,
        "penex": __version__,
        "config": config.settings(),
        "data": data,
        "planned_runs": len(config.losses) * config.seeds,
        "losses": [_loss(spec, runs) for spec in config.losses],
        "summary": {
            epoch: {
                scaling: {name: _column(config, runs, epoch, scaling, name) for name in METRICS}
                for scaling in SCALINGS
            }
            for epoch in EPOCHS
        },
        "published": _published(folder, config, runs),
        "runs": runs,
    }


def _published(
    folder: Path, config: Config, runs: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The entries of published.json, if there is one, each with our interval as "ours".

    An entry is of a loss and has a metric (as in :data:`METRICS`, on test rows; or validation_nll),
    the epoch "at" which it was taken, "best" or "last", the published value and its source.
    """
    path = folder / "published.json"
    if not path.exists():
        return []
    found = []
    for entry in read_json(path):
        try:
            spec, metric, at = entry["loss"], entry["metric"], entry["at"]
            if metric != "validation_nll" and metric not in METRICS:
                raise ValueError(f"metric {metric!r}")
            if at not in EPOCHS:
                raise ValueError(f"at {at!r}")
            told = {"value": float(entry["value"]), "source": str(entry["source"])}
        except (KeyError, TypeError, ValueError) as error:
            raise CompareError(f"{path}: an entry is not understood ({error})") from None
        if spec not in config.losses:
            continue
        results = [run["test"][at]["raw"] for run in runs if run["loss"] == spec]
        values = [result[metric] for result in results if result and metric in result]
        if metric == "validation_nll":
            values = [run["validation"][at] for run in runs if run["loss"] == spec]
        ours = interval([value for value in values if value is not None])
        found.append(
            {"loss": spec, "label": contender(spec).label, "metric": metric, "at": at}
            | told
            | {"ours": ours}
        )
    return found


def _run(folder: Path, spec: str, seed: int) -> dict[str, Any]:
    """The record of one run with its test metrics; None in their place where it diverged."""
    where = run_folder(folder, spec, seed)
    record: dict[str, Any] = read_json(where / "run.json")
    logits = read_logits(where)
    record["temperature"], record["test"], record["interval"] = {}, {}, {}
    record["validation"] = {}
    for epoch in EPOCHS:
        validation = record["scale"] * logits[f"validation_{epoch}"].astype(np.float64)
        test = record["scale"] * logits[f"test_{epoch}"].astype(np.float64)
        if not (np.isfinite(validation).all() and np.isfinite(test).all()):
            record["temperature"][epoch] = None
            record["test"][epoch] = dict.fromkeys(SCALINGS)
            record["interval"][epoch] = record["validation"][epoch] = None
            continue
        temperature = fit_temperature(validation, logits["validation_target"])
        target = logits["test_target"]
        record["temperature"][epoch] = temperature
        record["validation"][epoch] = nll(validation, logits["validation_target"])
        record["test"][epoch] = {
            "raw": _finite(evaluate(test, target)),
            "scaled": _finite(evaluate(test / temperature, target)),
        }
        record["interval"][epoch] = bootstrap(test, target, level=LEVEL)
    return record


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _loss(spec: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    who = contender(spec)
    own = [run for run in runs if run["loss"] == spec]
    diverged = sum(run["test"]["last"]["raw"] is None for run in own)
    seconds = [run["seconds_per_epoch"] for run in own]
    return {
        "spec": spec,
        "label": who.label,
        "knob": who.loss.knob.name if who.loss.knob else None,
        "value": own[0]["knob"] if own else None,
        "lr": own[0]["lr"] if own else None,
        "runs": len(own),
        "diverged": diverged,
        "seconds_per_epoch": interval(seconds) | {"least": min(seconds, default=None)},
        "best_epoch": [run["best_epoch"] for run in own],
    }


def _column(
    config: Config, runs: Sequence[dict[str, Any]], epoch: str, scaling: str, metric: str
) -> dict[str, Any]:
    """One metric for every loss: its interval, its difference to the reference, and the mark."""
    values: dict[str, dict[int, float]] = {spec: {} for spec in config.losses}
    for run in runs:
        result = run["test"][epoch][scaling]
        if result is not None and result[metric] is not None:
            values[run["loss"]][run["seed"]] = result[metric]
    reference = values.get(REFERENCE, {})
    column: dict[str, Any] = {}
    for spec, by_seed in values.items():
        shared = sorted(by_seed.keys() & reference.keys())
        difference = None
        if spec != REFERENCE and shared:
            difference = interval([by_seed[seed] - reference[seed] for seed in shared])
        column[spec] = interval(list(by_seed.values()))
        column[spec] |= {"difference": difference, "best": False}
    best = _best(column, METRICS[metric].higher_is_better)
    if best is not None:
        column[best]["best"] = True
    return column


def _best(column: dict[str, Any], higher_is_better: bool) -> str | None:
    """The loss with the best mean, if that is more than chance; else none.

    More than chance: the interval of the paired difference between it and the reference excludes
    zero; if the reference itself is ahead, that of every other loss does. A loss with fewer values
    than another, because runs diverged, is not considered: its mean leaves the worst ones out.
    """
    sign = 1 if higher_is_better else -1
    most = max(cell["n"] for cell in column.values())
    known = {spec: sign * cell["mean"] for spec, cell in column.items() if cell["n"] == most > 0}
    if REFERENCE not in known:
        return None
    best = max(known, key=lambda spec: known[spec])
    rivals = [best] if best != REFERENCE else [spec for spec in known if spec != REFERENCE]
    return best if rivals and all(clear(column[spec]["difference"]) for spec in rivals) else None


def clear(difference: dict[str, Any] | None) -> bool:
    """Whether an interval excludes zero."""
    if difference is None or difference["half_width"] is None:
        return False
    return bool(abs(difference["mean"]) > difference["half_width"])


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and half the width of its 95 % t-interval over seeds; None where there is no such."""
    n = len(values)
    mean = float(np.mean(values)) if n else None
    half = None
    if n > 1:
        half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return {"mean": mean, "half_width": half, "n": n}


def curves(folder: Path, spec: str, seed: int) -> dict[str, NDArray[np.float64]]:
    """The columns of a run's curve.csv."""
    path = run_folder(folder, spec, seed) / "curve.csv"
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise CompareError(
            f"{path} is damaged ({error}); remove {path.parent} and run again"
        ) from None
