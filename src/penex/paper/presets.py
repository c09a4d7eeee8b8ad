"""The experiments of the paper: their data, settings and published results.

A preset is a YAML file in the folder ``presets``. Each of its experiments is a comparison. A
setting is taken from the first of four places that has it: the experiment, the data set it is
`like`, the settings of all experiments, and the defaults of
:class:`~penex.compare.config.Config`.
"""

import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from penex.compare.config import Config
from penex.compare.errors import CompareError, did_you_mean

NAMES = (
    *("cifar10", "cifar10-noisy", "cifar100", "cifar100-long", "cifar10-vit", "cifar100-vit"),
    *("pathmnist", "imagenet", "bbc-news", "tabular", "two-gaussians", "ablations", "sensitivity"),
    *("calibration", "robustness", "runtime"),
)
"""Names of the presets."""
_FOLDER = files("penex.paper") / "presets"


class Published(BaseModel):
    """A published validation NLL."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experiment: str
    loss: str
    """The loss, as written in the experiment's losses."""
    selection: Literal["nll", "last"]
    scaling: Literal["link", "softmax"] = "softmax"
    """The source of the probabilities: the authors use the link for PENEX, softmax otherwise."""
    value: float
    source: str


class PublishedCurves(BaseModel):
    """Published validation NLL by epoch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experiment: str
    file: str
    """A CSV file next to the preset, with the epoch, from 1, and a column named after each loss."""
    link: tuple[str, ...]
    """The losses whose probabilities are those of the link; for the others, of plain softmax."""
    source: str


class Preset(BaseModel):
    """Description of one or several experiments."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    paper: str
    """The place in the paper."""
    experiments: dict[str, dict[str, Any]]
    """By name: `like`, a data set of the defaults, and settings that override those of `like`."""
    figures: tuple[str, ...]
    published: tuple[Published, ...] = ()
    curves: PublishedCurves | None = None
    """Published curves of one of the experiments, if there are any."""
    deviations: tuple[str, ...] = ()
    """Differences from the paper, with reasons."""
    smoke: dict[str, Any]
    """Settings with which every experiment takes seconds; `losses` lists the losses to keep."""

    @model_validator(mode="after")
    def _published_of_its_experiments(self) -> "Preset":
        named = [one.experiment for one in self.published]
        if self.curves is not None:
            named.append(self.curves.experiment)
        for experiment in named:
            if experiment not in self.experiments:
                raise ValueError(f"published: there is no experiment {experiment!r}")
        for one in self.published:
            if one.loss not in self.configs()[one.experiment].losses:
                raise ValueError(f"published: {one.experiment} has no loss {one.loss!r}")
        return self

    def configs(
        self, *, smoke: bool = False, losses: Sequence[str] | None = None, **overrides: Any
    ) -> dict[str, Config]:
        """The configuration of each experiment's comparison.

        Args:
            smoke: Whether to use a slice of the data, so that an experiment takes seconds.
            losses: The losses to keep of each experiment, as written there or without their
                hyperparameter; an experiment that has none of them is left out. None: all.
            overrides: Settings that replace those of all experiments, unless None.

        Raises:
            CompareError: No experiment has one of `losses`.
        """
        chosen = {name: value for name, value in overrides.items() if value is not None}
        configs = {}
        for name in self.experiments:
            settings = self._settings(name)
            settings.pop("rows", None)
            if smoke:
                small = _defaults()["smoke"] | self.smoke
                settings["losses"] = _selected(settings["losses"], small.pop("losses", None))
                settings |= small
            settings |= chosen
            settings["losses"] = specs = _selected(settings["losses"], losses)
            rates = settings.get("lr_of", {})
            settings["lr_of"] = {spec: lr for spec, lr in rates.items() if spec in specs}
            if specs:
                configs[name] = Config(**settings)
        for wanted in losses or ():
            if not any(_selected(config.losses, [wanted]) for config in configs.values()):
                known = {spec for config in self.configs().values() for spec in config.losses}
                raise CompareError(
                    f"losses: there is no {wanted!r} in this preset; it has "
                    f"{', '.join(sorted(known))}"
                )
        return configs

    def training_rows(self, name: str) -> int:
        """The number of training rows of an experiment, without loading the data."""
        settings = self._settings(name)
        return int(settings.get("train_size") or settings["rows"])

    def steps(self, name: str, config: Config) -> int:
        """The number of optimiser steps of all runs of an experiment, tuning included.

        Args:
            name: The name of the experiment.
            config: Its configuration, from :meth:`configs`.
        """
        rows = config.train_size or self.training_rows(name)
        batches = math.ceil(rows / config.batch_size)
        runs = len(config.losses) * (config.seeds + config.tune)
        return runs * config.epochs * math.ceil(batches / config.accumulate)

    def _settings(self, name: str) -> dict[str, Any]:
        own = dict(self.experiments[name])
        defaults = _defaults()
        return {**defaults["settings"], **defaults["data_sets"][own.pop("like")], **own}


def _selected(specs: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """The elements of `specs` that `names` contains, with or without their hyperparameter."""
    if names is None:
        return list(specs)
    return [spec for spec in specs if spec in names or spec.partition("=")[0] in names]


@cache
def preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        CompareError: There is no such preset.
    """
    if name not in NAMES:
        raise CompareError(
            f"reproduce: no preset is called {name!r}.{did_you_mean(name, NAMES)} "
            f"Known: {', '.join(NAMES)}."
        )
    return Preset(**_read(name))


@cache
def _defaults() -> dict[str, Any]:
    return _read("defaults")


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return content
