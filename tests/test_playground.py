"""The interactive example of the documentation computes what the losses compute."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import penex

SCRIPT = Path(__file__).parent.parent / "docs" / "_static" / "playground.js"
OTHERS = [[2.0, -1.0, -1.0], [0.0, 1.5, -1.5], [0.5, 0.0, -0.5]]
LABELS = torch.tensor([0, 0, 1, 2])


@pytest.mark.parametrize(
    ("logits", "alpha", "beta"),
    [([-1.0, 1.0, 0.0], 0.1, 1.0), ([4.0, -4.0, 2.5], 1.0, 8.0), ([-4.0, 3.0, 3.0], 0.01, 0.25)],
)
def test_values_of_the_interactive_example(logits: list[float], alpha: float, beta: float) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    call = f"require({str(SCRIPT)!r}).evaluate({logits}, {alpha}, {beta})"
    done = subprocess.run(
        [node, "-p", f"JSON.stringify({call})"], capture_output=True, text=True, check=True
    )
    shown = json.loads(done.stdout)

    f = torch.tensor([logits, *OTHERS], dtype=torch.float64, requires_grad=True)
    criteria: dict[str, nn.Module] = {
        "Cross-entropy": penex.losses.CrossEntropyLoss(reduction="none"),
        "PENEX": penex.PENEX(
            sensitivity=alpha, penalty_mode="auto", normalize=True, reduction="none"
        ),
        "log-PENEX": penex.LogPENEX(sensitivity=alpha, power=beta, reduction="none"),
    }
    boost = (-alpha * f.gather(1, LABELS[:, None])).exp().flatten()
    for name, criterion in criteria.items():
        rows = criterion(f, LABELS)
        (gradient,) = torch.autograd.grad(rows.sum(), f)
        weight = 1.0 if name == "Cross-entropy" else (boost[0] / boost.mean()).item()
        assert shown[name]["value"] == pytest.approx(rows[0].item(), rel=1e-6)
        assert shown[name]["gradient"] == pytest.approx(gradient[0].tolist(), rel=1e-6, abs=1e-9)
        assert shown[name]["p"] == pytest.approx(criterion.predict_proba(f)[0].tolist(), rel=1e-6)
        assert shown[name]["weight"] == pytest.approx(weight, rel=1e-6)
