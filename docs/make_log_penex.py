"""Draws the picture of docs/log-penex.md: the weights of the samples in two dimensions.

A network is trained on the paper's example of two Gaussians with an outlying group, by
cross-entropy and by the loss in the log domain. A panel shows the training set and the border
between the classes, with areas in proportion to one of the two weights that the gradient of the
loss in the log domain is made of. Run it from anywhere: python docs/make_log_penex.py
"""

from pathlib import Path

import matplotlib.style
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from penex import LogPENEX
from penex.compare.analysis.plots import COLOURS, STYLE
from penex.compare.data.arrays import two_gaussians

PICTURE = Path(__file__).parent / "images" / "log-penex.svg"
ALPHA, BETA = 0.5, 1.0
"""Sensitivity and power: those of PENEX in the paper's example."""
NETWORKS = (("cross-entropy", 0.0, 0.0), (f"α = {ALPHA:g}, β = {BETA:g}", ALPHA, BETA))
ROWS, EPOCHS = 100, 20
SIZES = 5
"""Areas are multiples of this, so that the file has few shapes."""


def weights(logits: torch.Tensor, y: torch.Tensor) -> dict[str, np.ndarray]:
    """v and w of the gradient."""
    label = logits.gather(1, y[:, None]).squeeze(1)
    return {
        "v": (-ALPHA * label).softmax(0).numpy(),
        "w": (BETA * logits.logsumexp(1)).softmax(0).numpy(),
    }


def train(x: torch.Tensor, y: torch.Tensor, alpha: float, beta: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 50), nn.ReLU(), nn.Linear(50, 2))
    criterion = LogPENEX(sensitivity=alpha, power=beta)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(EPOCHS):
        optimiser.zero_grad()
        criterion(model(x), y).backward()
        optimiser.step()
    return model


def main() -> None:
    content = two_gaussians()
    x = torch.as_tensor(content.features[:ROWS])
    y = torch.as_tensor(np.asarray(content.target[:ROWS]), dtype=torch.int64)
    side = torch.linspace(-7, 7, 57)
    grid = torch.cartesian_prod(side, side)
    with matplotlib.style.context([*STYLE, {"svg.hashsalt": "log-penex"}]):
        figure = Figure(figsize=(6.5, 6.5), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True, sharey=True)
        for column, (name, alpha, beta) in zip(axes.T, NETWORKS, strict=True):
            model = train(x, y, alpha, beta)
            with torch.no_grad():
                found = weights(model(x), y)
                scores = model(grid) @ torch.tensor([-1.0, 1.0])
            for panel, (symbol, share) in zip(column, found.items(), strict=True):
                border = scores.reshape(len(side), -1).T
                panel.contour(side, side, border, [0.0], colors=COLOURS[0], linewidths=1)
                areas = SIZES * np.ceil(2000 / SIZES * share)
                for label, area in sorted({*zip(y.tolist(), areas.tolist(), strict=True)}):
                    mine = (y.numpy() == label) & (areas == area)
                    style = {"color": COLOURS[1 + label], "alpha": 0.5, "markeredgewidth": 0}
                    panel.plot(*x.numpy()[mine].T, "o", markersize=area**0.5, **style)
                panel.set_aspect("equal")
                even = 1 / float((share**2).sum())
                panel.set_xlabel(f"${symbol}$: as on {even:.0f} of {ROWS} samples alone")
            column[0].set_title(f"Trained with {name}")
        figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
