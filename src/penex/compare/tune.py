"""Tuning with the same budget for every loss: its learning rate and its one knob, by TPE.

The state of a study is its finished trials on disk. It is rebuilt from them before every trial, by
the same code whether the search was interrupted or not, so a restart proposes what would have been
proposed.
"""

import math
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution

from penex.compare.config import Config, Task
from penex.compare.data import Dataset
from penex.compare.registry import Contender, contender
from penex.compare.store import read_json, trial_folder

LR_SPAN = 30.0
"""The learning rate is searched from `lr` / LR_SPAN to `lr` * LR_SPAN."""


def tune(folder: Path, spec: str, config: Config, dataset: Dataset) -> None:
    """Run the trials of one loss that are not finished yet, `config.tune` in all.

    The first trial has the untuned values, so tuning can only improve the score: the validation
    NLL of the loss's own probabilities at the best epoch, at seed 0.
    """
    from penex.compare.train import run  # torch and Lightning: only the process that trains

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    who = contender(spec)
    space = _space(who, config)
    for number in range(config.tune):
        if trial_folder(folder, spec, number).exists():
            continue
        study = _study(folder, spec, number, space)
        if number == 0:
            study.enqueue_trial({"lr": config.lr, "knob": who.untuned})
        values = study.ask(space).params
        knob = values.get("knob", who.untuned)
        task = Task(trial_folder(folder, spec, number), spec, 0, values["lr"], knob)
        run(task, config, dataset)


def best_trial(folder: Path, spec: str, config: Config) -> dict[str, float]:
    """`lr` and `knob` of the best finished trial; of the first one if all diverged."""
    trials = [read_json(trial_folder(folder, spec, n) / "run.json") for n in range(config.tune)]
    best = min(trials, key=_score)
    return {"lr": best["lr"], "knob": math.nan if best["knob"] is None else best["knob"]}


def _space(who: Contender, config: Config) -> dict[str, BaseDistribution]:
    space: dict[str, BaseDistribution] = {
        "lr": FloatDistribution(config.lr / LR_SPAN, config.lr * LR_SPAN, log=True)
    }
    knob = who.loss.knob
    if knob is not None and who.value is None:
        space["knob"] = FloatDistribution(knob.low, knob.high, log=knob.log)
    return space


def _study(
    folder: Path, spec: str, number: int, space: dict[str, BaseDistribution]
) -> optuna.Study:
    """The study as it stands before trial `number`."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=number))
    for earlier in range(number):
        record = read_json(trial_folder(folder, spec, earlier) / "run.json")
        params = {name: record[name] for name in space}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=space, value=_score(record))
        )
    return study


def _score(record: dict[str, float | None]) -> float:
    nll = record["validation_nll"]
    return math.inf if nll is None else nll
