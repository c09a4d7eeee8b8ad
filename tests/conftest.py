"""What every test shares: one seed, one Hypothesis profile, and the `gpu` marker."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("penex", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("penex")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # a file to a worker, but for what is its own group
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
