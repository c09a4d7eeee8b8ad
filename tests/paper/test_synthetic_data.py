"""Random data can be read by the readers of the real data and used by the presets."""

from pathlib import Path

import numpy as np
import pytest

from penex.compare.data.images import Images
from penex.compare.data.load import load
from penex.compare.data.split import draw_rows
from penex.paper.presets import NAMES, preset
from penex.paper.synthetic_data import SAMPLES, sample

CONFIGS = [
    pytest.param(config, id=f"{name}-{experiment}")
    for name in NAMES
    for experiment, config in preset(name).configs(smoke=True).items()
]
SHAPES = {
    "hub:uoft-cs/cifar10": (10, (3, 32, 32)),
    "hub:uoft-cs/cifar100": (100, (3, 32, 32)),
    "hub:ILSVRC/imagenet-1k": (4, (3, 32, 32)),
    "pathmnist": (9, (3, 64, 64)),
    "sonar": (2, (60,)),
    "hub:SetFit/bbc-news": (5, None),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENEX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("config", CONFIGS)
def test_samples_are_enough_for_a_smoke_run(config, tmp_path: Path) -> None:
    if config.data in SAMPLES:
        sample(config.data, tmp_path / "data")
        config = config.model_copy(update={"data_dir": str(tmp_path / "data")})
    dataset = load(config)
    train, validation, test = draw_rows(dataset, 0, config)
    assert min(len(train), len(validation), len(test)) >= len(dataset.classes)
    if config.data in SAMPLES:
        classes, shape = SHAPES[config.data]
        assert len(dataset.classes) == classes
        if shape is None:
            assert len(dataset.features.take([0])[0].split()) == 12
        else:
            images = isinstance(dataset.features, Images)
            assert (dataset.features.shape if images else dataset.features.shape[1:]) == shape


@pytest.mark.parametrize("data", SAMPLES)
def test_a_sample_is_reproducible_and_written_once(data: str, tmp_path: Path) -> None:
    for name in ("one", "other"):
        sample(data, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "other").iterdir())
    for name in files:
        one, other = tmp_path / "one" / name, tmp_path / "other" / name
        if name.endswith(".npz"):
            with np.load(one) as first, np.load(other) as second:
                assert all(np.array_equal(first[key], second[key]) for key in first)
        else:
            assert one.read_bytes() == other.read_bytes()
    before = {name: (tmp_path / "one" / name).stat().st_mtime_ns for name in files}
    sample(data, tmp_path / "one")
    assert before == {name: (tmp_path / "one" / name).stat().st_mtime_ns for name in files}
    assert {path.name for path in tmp_path.iterdir()} == {"one", "other"}
