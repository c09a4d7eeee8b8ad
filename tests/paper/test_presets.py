"""The presets state the paper's protocol and numbers, and nothing that was not published."""

import math
import re
from importlib.resources import files
from typing import Any

import pytest

from penex.compare.config import Config
from penex.compare.data.load import load
from penex.compare.data.split import draw_rows
from penex.compare.errors import CompareError
from penex.paper.figures import FIGURES
from penex.paper.presets import NAMES, Preset, preset

EVERY = [(name, experiment) for name in NAMES for experiment in preset(name).experiments]
SHARED = {
    **{"lr": 1e-4, "batch_size": 64, "optimizer": "adam", "schedule": "constant", "augment": ()},
    "gradient_scale": "own",
}
# What the paper and the authors' configuration files say, by preset; of several experiments, that
# which they have in common. Losses: smoothing, strength, gamma, alpha.
PROTOCOL: dict[str, dict[str, Any]] = {
    "cifar10": {**SHARED, "model": "convnet", "epochs": 200, "gradient_clip": 5},
    "cifar10-noisy": {
        **{"label_noise": 0.1, "noise_parts": "training+validation", "noise_classes": "uniform"},
        **{**SHARED, "gradient_clip": 5},
    },
    "cifar100": {**SHARED, "model": "convnet", "epochs": 200, "gradient_clip": 15},
    "cifar100-long": {**SHARED, "model": "convnet", "epochs": 800, "gradient_clip": 15},
    "cifar10-vit": {**SHARED, "model": "vit", "epochs": 200, "gradient_clip": 5},
    "cifar100-vit": {**SHARED, "model": "vit", "epochs": 800, "gradient_clip": 15},
    "pathmnist": {**SHARED, "epochs": 200, "gradient_clip": 10, "train_size": 8000},
    "imagenet": {
        **{"model": "vit-b-16", "image_size": 224, "optimizer": "adamw", "weight_decay": 0.3},
        **{"batch_size": 512, "epochs": 300, "warmup_epochs": 10, "schedule": "cosine"},
        **{"gradient_clip": 1, "lr": 1e-3, "lr_of": {"penex=1": 1e-5}},
        "augment": ("resized-crop", "flip"),
    },
    "bbc-news": {
        **{"model": "transformers:FacebookAI/roberta-base", "train_size": 200, "epochs": 200},
        **{"lr": 5e-6, "batch_size": 8, "accumulate": 2, "model_options": {"max_length": 512}},
    },
    "tabular": {**SHARED, "epochs": 500, "hidden": (128, 128, 64)},
    "two-gaussians": {"lr": 0.05, "epochs": 100, "hidden": (50,), "train_size": 100},
    "ablations": {**SHARED, "epochs": 200},
    "sensitivity": {**SHARED, "epochs": 200},
    "calibration": {**SHARED, "epochs": 200},
    "robustness": {**SHARED, "epochs": 200},
    "runtime": {**SHARED, "epochs": 5},
}
TUNED = {
    "cifar10": (0.039, 0.25, 2.74, None),
    "cifar10-noisy": (0.18, 0.39, 4.59, 0.025),
    "cifar10-vit": (0.07, 0.31, 0.96, None),
    "cifar100": (0.13, 0.38, 4.7, 0.085),
    "cifar100-long": (0.13, 0.38, 4.7, 0.085),
    "cifar100-vit": (None, None, None, 0.1),
    "pathmnist": (0.037, 0.25, 2.74, 0.058),
    "imagenet": (0.1, 0.1, 2.0, 1.0),
    "bbc-news": (0.0019, 0.21, 1.2, 0.0037),
}


def values(config: Config, name: str) -> list[float]:
    return [float(spec.partition("=")[2]) for spec in config.losses if spec.startswith(f"{name}=")]


def test_every_file_is_a_preset() -> None:
    found = {path.name for path in (files("penex.paper") / "presets").iterdir()}
    curves = {facts.curves.file for facts in map(preset, NAMES) if facts.curves}
    assert found == {f"{name}.yaml" for name in (*NAMES, "defaults")} | curves


@pytest.mark.parametrize("name", NAMES)
def test_the_protocol(name: str) -> None:
    for config in preset(name).configs().values():
        stated = {setting: getattr(config, setting) for setting in PROTOCOL[name]}
        assert stated == PROTOCOL[name]


@pytest.mark.parametrize("name", TUNED)
def test_the_tuned_hyperparameters(name: str) -> None:
    (config,) = preset(name).configs().values()
    losses = ("label-smoothing", "confidence-penalty", "focal", "penex")
    assert config.losses[0] == "cross-entropy"
    for loss, published in zip(losses, TUNED[name], strict=True):
        (value,) = values(config, loss)
        if published is None:  # a stand-in is declared
            assert "stands in" in str(preset(name).deviations) or "are those" in str(
                preset(name).deviations
            )
        else:
            assert value == published


def test_the_sweeps() -> None:
    alphas = [1e-5, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2]
    for config in preset("sensitivity").configs().values():
        assert values(config, "penex") == alphas
    for config in preset("calibration").configs().values():
        assert values(config, "penex") == alphas[:-1]
        # Strength 0 is cross-entropy.
        assert "cross-entropy" in config.losses
        smoothing = values(config, "label-smoothing")
        assert smoothing == pytest.approx([0.05 * step for step in range(1, 7)])
        assert values(config, "confidence-penalty") == [0.1, 0.2, 0.3, 0.4, 0.5]
        assert values(config, "focal") == [1, 2, 3, 4, 5]
    ablations = preset("ablations").configs()
    assert values(ablations["constraint"], "conex-squared") == [773.46, 1]
    assert values(ablations["constraint"], "conex-lagrangian") == [753.83, 1]
    assert values(ablations["constraint"], "logsumexp-penalty") == [0.23]
    assert values(ablations["constraint"], "exponential") == [0.03]
    assert ablations["deep-supervision"].model_options == {"deep_supervision": True}


def test_only_published_numbers_are_called_published() -> None:
    best = {("cross-entropy", 2.296, 41), ("label-smoothing=0.13", 2.225, 75)}
    best |= {("penex=0.085", 2.067, 540)}
    last = {("cross-entropy", 3.63), ("label-smoothing=0.13", 2.27), ("penex=0.085", 2.09)}
    for name in NAMES:
        published = preset(name).published
        assert {(one.loss, one.value) for one in published if one.selection == "last"} == (
            last if name == "cifar100-long" else set()
        )
        found = {one for one in published if one.selection == "nll"}
        assert {(one.loss, one.value) for one in found} == (
            {entry[:2] for entry in best} if name in ("cifar100", "cifar100-long") else set()
        )
        for one in published:
            assert one.scaling == ("link" if one.loss.startswith("penex") else "softmax")
        for one in found:
            assert (one.loss, one.value, int(re.findall("epoch (.*) of", one.source)[0])) in best


@pytest.mark.parametrize("name", NAMES)
def test_the_figures_can_be_drawn(name: str) -> None:
    assert set(preset(name).figures) <= FIGURES.keys()


@pytest.mark.parametrize(("name", "experiment"), EVERY)
def test_a_smoke_run_differs_in_size_only(name: str, experiment: str) -> None:
    whole = preset(name).configs()[experiment]
    small = preset(name).configs(smoke=True)[experiment]
    assert preset(name).steps(experiment, small) < 250
    assert set(small.losses) <= set(whole.losses)
    noise = ("label_noise", "noise_parts", "noise_classes")
    kept = ("data", "target", "text", "optimizer", "schedule", "lr", *noise)
    for setting in kept:
        assert getattr(small, setting) == getattr(whole, setting)


@pytest.mark.parametrize("name", ["tabular", "two-gaussians"])
def test_the_number_of_training_rows_is_that_of_the_split(name: str) -> None:
    for experiment, config in preset(name).configs().items():
        if experiment == "sonar":
            continue  # has to be downloaded
        rows = draw_rows(load(config), 0, config)
        assert preset(name).training_rows(experiment) == len(rows[0])


def test_the_number_of_steps() -> None:
    facts = preset("bbc-news")
    config = facts.configs(tune=10)["bbc-news"]
    # 200 rows are 25 batches and 13 steps an epoch; 3 runs and 10 trials of 5 losses.
    assert facts.steps("bbc-news", config) == 13 * 200 * 5 * 13
    config = preset("cifar100").configs(seeds=1, epochs=7)["cifar100"]
    assert preset("cifar100").steps("cifar100", config) == 7 * 6 * math.ceil(40_000 / 64)


def test_overrides_are_for_all_experiments() -> None:
    configs = preset("tabular").configs(seeds=7, epochs=None)
    assert {config.seeds for config in configs.values()} == {7}
    assert {config.epochs for config in configs.values()} == {500}


def test_a_choice_of_losses() -> None:
    facts = preset("ablations")
    configs = facts.configs(losses=["conex-hard", "penex", "penex-cosine-schedule=0.2"])
    assert {name: config.losses for name, config in configs.items()} == {
        "constraint": ("conex-hard", "penex=0.03"),
        "schedule": ("penex-cosine-schedule=0.2", "penex=0.2"),
        "deep-supervision": ("penex=0.085",),
    }
    assert list(facts.configs(losses=["exponential"])) == ["constraint"]
    assert preset("imagenet").configs(losses=["cross-entropy"])["imagenet"].lr_of == {}
    with pytest.raises(CompareError, match="no 'penex=0.5' in this preset; it has conex-hard, "):
        facts.configs(losses=["exponential", "penex=0.5"])


def test_an_unknown_preset() -> None:
    with pytest.raises(CompareError, match="'cifar01'. Did you mean 'cifar10'"):
        preset("cifar01")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiment": "cifar"}, "no experiment 'cifar'"),
        ({"loss": "penex=0.5"}, "no loss 'penex=0.5'"),
    ],
)
def test_published_numbers_belong_to_losses_of_the_experiment(
    change: dict[str, str], message: str
) -> None:
    facts = preset("cifar100").model_dump()
    facts["published"] = [{**facts["published"][0], **change}]
    with pytest.raises(ValueError, match=message):
        Preset(**facts)
