"""Draws the pictures of "How PENEX works" from data made on the spot; `make pictures` calls it."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Self

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import penex
from penex.compare.analysis.plots import INK, STYLE
from penex.compare.data.arrays import two_gaussians
from penex.functional import estimate_penalty, margin, penex_loss
from penex.metrics import margin_bound

IMAGES = Path(__file__).parent / "images"
SENSITIVITIES = {0.1: "#0072b2", 0.5: "#d55e00", 1.0: "#009e73"}
ALPHA = 0.5
EARLY = 8
"""Epochs after which the outlying group is still on the wrong side."""

PICTURES: dict[str, Callable[[Axes], None]] = {}


def picture(draw: Callable[[Axes], None]) -> Callable[[Axes], None]:
    """Register a picture; its file is named as its function."""
    PICTURES[draw.__name__.replace("_", "-")] = draw
    return draw


def legend_above(axes: Axes) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


# Two classes, by the formula


def binary(alpha: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Margin, loss and slope at logits (m/2, -m/2): of cross-entropy, or of PENEX over alpha.

    The penalty is what the batch suggests at m = 0. A constant is added to PENEX, so that both
    losses are log 2 there.
    """
    m = torch.linspace(-6, 10, 400, dtype=torch.float64, requires_grad=True)
    logits, target = torch.stack([m / 2, -m / 2], 1), torch.zeros(len(m), dtype=torch.long)
    if alpha is None:
        loss = nn.functional.cross_entropy(logits, target, reduction="none")
    else:
        rows = penex_loss(logits, target, sensitivity=alpha, penalty=alpha / 2, reduction="none")
        loss = (rows - (1 + alpha)) / alpha + np.log(2)
    (slope,) = torch.autograd.grad(loss.sum(), m)
    return m.detach(), loss.detach(), slope


def binary_curves(axes: Axes, part: int) -> None:
    m, *curves = binary(None)
    axes.plot(m, curves[part], color=INK, label="Cross-entropy")
    for alpha, colour in SENSITIVITIES.items():
        m, *curves = binary(alpha)
        axes.plot(m, curves[part], color=colour, label=f"PENEX / α, α = {alpha:g}")
    axes.axvline(0, color=INK, linewidth=0.6, alpha=0.5)
    axes.set_xlabel("Margin of the logits, f(label) − f(other)")
    legend_above(axes)


@picture
def binary_loss(axes: Axes) -> None:
    binary_curves(axes, 0)
    axes.set(ylim=(-0.5, 8), ylabel="Loss")


@picture
def binary_slope(axes: Axes) -> None:
    binary_curves(axes, 1)
    axes.axhline(0, color=INK, linewidth=0.6, alpha=0.5)
    axes.set(ylim=(-3, 1.5), ylabel="Slope of the loss")


@picture
def pull(axes: Axes) -> None:
    """1 - p of cross-entropy, and (1 - p) e^{-alpha f} of PENEX at logits with r = 1."""
    p = np.logspace(-3, np.log10(0.99), 300)
    axes.loglog(p, 1 - p, color=INK, label="Cross-entropy")
    for alpha, colour in SENSITIVITIES.items():
        weight = p ** (-alpha / (1 + alpha))
        axes.loglog(p, weight * (1 - p), color=colour, label=f"PENEX, α = {alpha:g}")
    axes.set(xlabel="Probability of the label", ylabel="Pull on the label's logit", ylim=(0.01, 40))
    axes.legend(loc="lower left")


# Two Gaussians and digits, trained


class Training:
    """A network in training, and what was seen of it on the way.

    Args:
        x, y: All rows of the training set.
        widths: Of the network's layers.
        criterion: The loss.
        lr: Adam's learning rate.
        batch_size: None for all rows at once.

    Attributes:
        penalties: For every step the estimate of its batch, and the running penalty after it.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        widths: tuple[int, ...],
        criterion: nn.Module,
        *,
        lr: float,
        batch_size: int | None = None,
    ) -> None:
        self.x, self.y, self.criterion = x, y, criterion
        self.batch_size = batch_size or len(x)
        self.generator = torch.manual_seed(0)
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1])
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=lr)
        self.penalties: list[tuple[float, float]] = []

    def epochs(self, number: int) -> Self:
        for _ in range(number):
            order = torch.randperm(len(self.x), generator=self.generator)
            for rows in order.split(self.batch_size):
                logits, target = self.model(self.x[rows]), self.y[rows]
                self.optimiser.zero_grad()
                self.criterion(logits, target).backward()
                self.optimiser.step()
                if isinstance(self.criterion, penex.PENEX):
                    alpha = self.criterion.sensitivity
                    estimate = estimate_penalty(logits, target, sensitivity=alpha)
                    self.penalties.append((estimate.item(), self.criterion.penalty.item()))
        return self

    @torch.no_grad()
    def logits(self, x: Tensor | None = None) -> Tensor:
        return self.model(self.x if x is None else x)


def on_two_gaussians(criterion: nn.Module, lr: float = 0.05) -> Training:
    """As in the paper: 100 rows, one hidden layer, full batches."""
    content = two_gaussians()
    x, y = torch.from_numpy(content.features[:100]), torch.from_numpy(content.target[:100]).long()
    return Training(x, y, (2, 50, 2), criterion, lr=lr)


def on_digits(alpha: float) -> Training:
    """As `make demo`: 300 rows of digits, 100 epochs."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images[:300]).float(), torch.from_numpy(labels[:300])
    x = (x - x.mean()) / x.std()
    criterion = penex.PENEX(sensitivity=alpha)
    return Training(x, y, (64, 128, 128, 10), criterion, lr=0.001, batch_size=64).epochs(100)


def weighted_rows(axes: Axes, trained: Training, weight: Tensor) -> None:
    """The training rows, as large as they weigh, and the border between the predictions.

    Rows of negative weight are hollow.
    """
    size = 20 * weight.abs() / weight.abs().mean()
    for label, colour in enumerate(("#0072b2", "#c56fa0")):
        for sign, face in ((1, colour), (-1, "none")):
            rows = (trained.y == label) & (weight.sign() == sign)
            look = {"facecolor": face, "edgecolor": colour, "alpha": 0.7, "linewidth": 0.8}
            axes.scatter(*trained.x[rows].T, s=size[rows], **look)
    grid = torch.linspace(-6, 6, 200)
    x = torch.cartesian_prod(grid, grid)
    lead = trained.logits(x).diff(dim=1).reshape(200, 200).T
    axes.contour(grid, grid, lead, levels=[0], colors=[INK], linewidths=1)
    axes.set(xlim=(-6, 6), ylim=(-6, 6), xticks=[], yticks=[], aspect="equal")
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)


@picture
def weights_cross_entropy(axes: Axes) -> None:
    trained = on_two_gaussians(nn.CrossEntropyLoss()).epochs(EARLY)
    p = trained.logits().softmax(1).gather(1, trained.y[:, None]).squeeze(1)
    weighted_rows(axes, trained, 1 - p)
    axes.set_title("Cross-entropy: 1 − p(label)")


@picture
def weights_penex(axes: Axes) -> None:
    training, f = early()
    weighted_rows(axes, training, torch.exp(-ALPHA * f))
    axes.set_title(f"PENEX: exp(−α f(label)), α = {ALPHA:g}")


@picture
def pull_penex(axes: Axes) -> None:
    training, f = early()
    rho = training.criterion.penalty
    weighted_rows(axes, training, ALPHA * torch.exp(-ALPHA * f) - rho * f.exp())
    axes.set_title("PENEX: less what the penalty takes back")


def early() -> tuple[Training, Tensor]:
    """PENEX on two Gaussians, and the logits of the labels."""
    training = on_two_gaussians(penex.PENEX(sensitivity=ALPHA)).epochs(EARLY)
    return training, training.logits().gather(1, training.y[:, None]).squeeze(1)


@picture
def margins(axes: Axes) -> None:
    """Margins of the training rows, in the logits of the probabilities, over training."""
    marks = np.unique(np.geomspace(1, 2000, 40).astype(int))
    for criterion, scale, colour, label in (
        (nn.CrossEntropyLoss(), 1, INK, "Cross-entropy"),
        (penex.PENEX(sensitivity=ALPHA), 1 + ALPHA, "#d55e00", f"PENEX, α = {ALPHA:g}"),
    ):
        training = on_two_gaussians(criterion, lr=0.01)
        seen = []
        for before, now in pairwise([0, *marks]):
            training.epochs(now - before)
            m = scale * margin(training.logits(), training.y)
            seen.append(m.quantile(torch.tensor([0.1, 0.5, 0.9])))
        low, middle, high = torch.stack(seen).T
        axes.semilogx(marks, middle, color=colour, label=label)
        axes.fill_between(marks, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.6, alpha=0.5)
    axes.set(xlabel="Epoch", ylabel="Margin, log p(label) − log p(next)", xlim=(1, 2000))
    axes.legend(loc="upper left")


@picture
def margin_share(axes: Axes) -> None:
    """Share of the training rows below a margin, and what the loss says it is at most."""
    training = on_two_gaussians(penex.PENEX(sensitivity=ALPHA)).epochs(EARLY)
    logits, rho = training.logits(), training.criterion.penalty.item()
    loss = penex_loss(logits, training.y, sensitivity=ALPHA, penalty=rho).item()
    gammas = np.linspace(-10, 4, 400)
    found = margin(logits, training.y).numpy()
    shares = [(found <= gamma).mean() for gamma in gammas]
    bound = [margin_bound(loss, gamma, ALPHA, rho) for gamma in gammas]
    axes.plot(gammas, shares, color="#d55e00", label="Training rows")
    axes.plot(gammas, bound, "--", color=INK, label="At most, by the loss")
    axes.set(xlim=(-10, 4), ylim=(0, 1.02), xlabel="Margin γ", ylabel="Share with a margin ≤ γ")
    axes.legend(loc="upper left")


@picture
def penalty_running(axes: Axes) -> None:
    estimates, running = np.array(on_digits(0.1).penalties).T
    axes.plot(estimates, color="#0072b2", alpha=0.6, linewidth=0.7, label="Of this batch alone")
    axes.plot(running, color=INK, label="Running")
    axes.axhline(0.1 / 10, color=INK, linewidth=0.8, linestyle=":", label="α / K")
    axes.set(xlabel="Step", ylabel="ρ, for α = 0.1", xlim=(0, len(running)), ylim=(0, None))
    axes.legend()


@picture
def penalty_sensitivity(axes: Axes) -> None:
    for alpha, colour in SENSITIVITIES.items():
        running = np.array(on_digits(alpha).penalties)[:, 1]
        axes.plot(running / (alpha / 10), color=colour, label=f"α = {alpha:g}")
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set(xlabel="Step", ylabel="Running ρ over α / K", xlim=(0, len(running)), ylim=(0, None))
    axes.legend()


@picture
def shift(axes: Axes) -> None:
    """The loss of a batch as one constant is added to all of its logits."""
    torch.manual_seed(0)
    logits, target = torch.randn(64, 5), torch.randint(5, (64,))
    estimate = estimate_penalty(logits, target, sensitivity=ALPHA)
    shifts = torch.linspace(-3, 3, 200)
    for factor, style in ((0.25, "--"), (1.0, "-"), (4.0, ":")):
        losses = [
            penex_loss(logits + c, target, sensitivity=ALPHA, penalty=factor * estimate)
            for c in shifts
        ]
        name = "the estimate" if factor == 1 else f"{factor:g} × the estimate"
        axes.plot(
            shifts, losses, style, color=INK if factor == 1 else "#d55e00", label=f"ρ = {name}"
        )
    axes.axvline(0, color=INK, linewidth=0.6, alpha=0.5)
    axes.set(xlabel="Constant added to all logits", ylabel="Loss", ylim=(0, 6))
    legend_above(axes)


def main() -> None:
    for name, draw in PICTURES.items():
        with matplotlib.style.context([*STYLE, {"svg.hashsalt": name, "font.size": 10}]):
            figure = Figure(figsize=(4.6, 3.6), layout="constrained")
            draw(figure.subplots())
            figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
