"""Times a training step of a small convolutional network with PENEX and with cross-entropy."""

from collections.abc import Callable

import torch
from torch import nn

from benchmarks import harness
from benchmarks.harness import Results, Strict, Timing
from penex import PENEX

BATCH, CLASSES = 64, 100


class StepRow(Strict):
    loss: str
    timing: Timing
    ratio: float
    """To cross-entropy, of medians."""


def network() -> nn.Sequential:
    """For images of CIFAR's shape, 3 x 32 x 32."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Dropout(0.5), nn.Linear(2048, 256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, CLASSES))


def step(criterion: nn.Module, device: torch.device) -> Callable[[], None]:
    """One step on random images, by Adam; so slow that the network stays what it is."""
    torch.manual_seed(0)
    model = network().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-7)
    images = torch.randn(BATCH, 3, 32, 32, device=device)
    target = torch.randint(CLASSES, (BATCH,), device=device)

    def one() -> None:
        optimizer.zero_grad()
        criterion(model(images), target).backward()
        optimizer.step()

    return one


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    machine = harness.start(options)
    losses = {"cross-entropy": nn.CrossEntropyLoss(), "penex running": PENEX()}
    functions = {
        name: step(loss.to(options.device), options.device) for name, loss in losses.items()
    }
    seconds = 1.0 if options.quick else 40.0
    times = harness.compare(functions, options.device, seconds=seconds)
    reference = times["cross-entropy"].median
    rows = [
        StepRow(loss=name, timing=timing, ratio=timing.median / reference)
        for name, timing in times.items()
    ]
    Results[StepRow](name="step", machine=machine, quick=options.quick, rows=rows).save(options.out)


if __name__ == "__main__":
    main()
