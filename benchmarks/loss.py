"""Times PENEX against cross-entropy and others: shapes x options x modes, eager and compiled."""

import argparse
import itertools
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Results, Skipped, Strict, Timing
from penex import PENEX, LogPENEX
from penex._passes import LOG2E, pieces
from penex.losses import (
    ConfidencePenaltyLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
    ZLoss,
)

SHAPES = [(64, 10), (128, 100), (1024, 1000), (4096, 1000), (1024, 32000), (4, 21, 128, 128)]
COMPILED = [(64, 10), (1024, 1000), (4096, 1000)]
SMALL = [(64, 10), (128, 100)]
"""The shapes at which time goes into calls, not arithmetic."""
PARTS = [(4096, 1000), (1024, 32000)]
"""The shapes at which single operations are timed."""
OPTIONS = ("plain", "weight", "ignored", "smoothing", "bfloat16")
MODES = ("running", "auto", "fixed")
REFERENCE = "cross-entropy"
WORKS = ("forward+backward", "forward")

Loss = Callable[[Tensor, Tensor], Tensor]


class LossRow(Strict):
    """One loss in one situation."""

    shape: tuple[int, ...]
    option: Literal["plain", "weight", "ignored", "smoothing", "bfloat16"]
    work: Literal["forward", "forward+backward"]
    how: Literal["eager", "compiled", "operation", "floor"]
    loss: str
    timing: Timing
    ratio: float | None
    """To cross-entropy in the same situation, of medians."""
    passes: float
    """Median, in times of reading the logits once and writing one tensor of their size."""
    fresh_passes: float
    """The same, for a pass that writes to new memory, which the system must first provide."""


def naive(logits: Tensor, target: Tensor, alpha: float = 0.1) -> Tensor:
    """The published formula with the penalty of the batch, term by term."""
    exponential = torch.exp(-alpha * logits.gather(1, target.unsqueeze(1))).squeeze(1)
    partition = torch.exp(logits).sum(1)
    penalty = alpha * exponential.detach().mean() / partition.detach().mean()
    return exponential.mean() + penalty * partition.mean()


def data(shape: tuple[int, ...], option: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Standard normal logits, and uniform labels."""
    logits = torch.randn(shape, device=device)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    if option == "bfloat16":
        logits = logits.bfloat16()
    if option == "ignored":
        target[torch.rand(target.shape, device=device) < 0.1] = -100
    return logits, target


def losses(classes: int, option: str, device: torch.device) -> dict[str, Loss]:
    """Cross-entropy and both PENEX with the same option; the others have no part in the options."""
    weight = torch.rand(classes, device=device) + 0.5 if option == "weight" else None
    smoothing = 0.1 if option == "smoothing" else 0.0
    result: dict[str, Loss] = {
        REFERENCE: nn.CrossEntropyLoss(weight, label_smoothing=smoothing).to(device)
    }
    for mode in MODES:
        penalty = 1e-3 if mode == "fixed" else None
        criterion = PENEX(weight, penalty_mode=mode, penalty=penalty, label_smoothing=smoothing)
        result[f"penex {mode}"] = criterion.to(device)
    result["log-penex"] = LogPENEX(weight, power=4.0, label_smoothing=smoothing).to(device)
    if option == "plain":
        result |= {
            "naive": naive,
            "cross-entropy by rows": CrossEntropyLoss(),
            "z-loss": ZLoss(),
            "generalised cross-entropy": GeneralizedCrossEntropyLoss(),
            "focal": FocalLoss(),
            "confidence penalty": ConfidencePenaltyLoss(),
        }
    return result


def call(loss: Loss, logits: Tensor, target: Tensor, work: str) -> Callable[[], object]:
    """What is timed: the value as in validation, or the value and its gradient as in training."""
    if work == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return loss(logits, target)

        return forward
    leaf = logits.detach().requires_grad_()
    return lambda: torch.autograd.grad(loss(leaf, target), leaf)


def single_passes(logits: Tensor) -> dict[str, Callable[[], object]]:
    """Reading the logits once and writing one tensor of their size, old or new."""
    written = torch.empty_like(logits)
    return {
        "pass": lambda: torch.add(logits, 1.0, out=written),
        "fresh pass": lambda: torch.add(logits, 1.0),
    }


def operations(logits: Tensor) -> dict[str, Callable[[], object]]:
    """What a loss is made of."""
    out = torch.empty_like(logits)

    def whole() -> Tensor:
        return torch.mul(logits, LOG2E, out=out).exp2_().sum()

    def in_pieces() -> list[Tensor]:
        return [
            torch.mul(logits[piece], LOG2E, out=out[piece]).exp2_().sum()
            for piece in pieces(logits)
        ]

    return {
        "exp": lambda: torch.exp(logits, out=out),
        "mul, exp2": lambda: torch.mul(logits, LOG2E, out=out).exp2_(),
        "mul, exp2, sum": whole,
        "mul, exp2, sum, in pieces": in_pieces,
        "mul in place": lambda: out.mul_(1.0),
        "log_softmax": lambda: torch.log_softmax(logits, 1),
    }


class _Nothing(torch.autograd.Function):
    """A hand-written backward that has nothing to do."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.gradient = torch.empty_like(logits)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.gradient


class _Bare(torch.autograd.Function):
    """PENEX's operations on tensors: no option, no check, one dtype, no second backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, constants: tuple[Tensor, ...]) -> Tensor:
        alpha, log2e = constants
        labels = target.unsqueeze(1)
        exponential = logits.gather(1, labels).mul_(-alpha).exp_()
        powers = torch.mul(logits, log2e).exp2_()
        sum_a, sum_s = exponential.sum().item(), powers.sum().item()
        rho = 0.1 * sum_a / sum_s
        ctx.saved = labels, exponential, powers, rho, alpha
        return torch.scalar_tensor((sum_a + rho * sum_s) / len(target))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        labels, exponential, powers, rho, alpha = ctx.saved
        share = grad.item() / len(labels)
        powers.mul_(rho * share)
        return powers.scatter_add_(1, labels, exponential.mul_(-alpha * share)), None, None


def floor(logits: Tensor, target: Tensor) -> dict[str, Callable[[], object]]:
    """Below what a small batch cannot go with a backward written in Python."""
    leaf, constants = logits.detach().requires_grad_(), (torch.tensor(0.1), torch.tensor(LOG2E))
    return {
        REFERENCE: call(nn.CrossEntropyLoss(), logits, target, "forward+backward"),
        "nothing": lambda: torch.autograd.grad(_Nothing.apply(leaf), leaf),
        "bare": lambda: torch.autograd.grad(_Bare.apply(leaf, target, constants), leaf),
        "penex running": call(PENEX(), logits, target, "forward+backward"),
    }


def rows(
    times: dict[str, Timing], shape: tuple[int, ...], option: str, work: str, how: str
) -> Iterator[LossRow]:
    once, fresh = times["pass"].median, times["fresh pass"].median
    for name, timing in times.items():
        if how == "eager" or name not in ("pass", "fresh pass"):
            yield LossRow(
                shape=shape,
                option=option,
                work=work,
                how=how,
                loss=name,
                timing=timing,
                ratio=timing.median / times[REFERENCE].median if REFERENCE in times else None,
                passes=timing.median / once,
                fresh_passes=timing.median / fresh,
            )


def eager(shapes: list[tuple[int, ...]], options: argparse.Namespace) -> Iterator[LossRow]:
    for shape in shapes:
        for option in OPTIONS[:1] if options.quick else OPTIONS:
            logits, target = data(shape, option, options.device)
            contenders = losses(shape[1], option, options.device)
            for work in WORKS:
                functions = single_passes(logits) | {
                    name: call(loss, logits, target, work) for name, loss in contenders.items()
                }
                times = harness.compare(functions, options.device, **options.effort)
                yield from rows(times, shape, option, work, "eager")
            print("x".join(map(str, shape)), option, flush=True)


def compiled(shapes: list[tuple[int, ...]], options: argparse.Namespace) -> Iterator[LossRow]:
    for shape in shapes:
        torch.compiler.reset()
        logits, target = data(shape, "plain", options.device)
        contenders = losses(shape[1], "plain", options.device)
        functions = single_passes(logits)
        for name in (REFERENCE, "penex running", "log-penex"):
            loss = torch.compile(contenders[name], fullgraph=True, dynamic=False)
            functions[name] = call(loss, logits, target, "forward+backward")
        times = harness.compare(functions, options.device, **options.effort)
        yield from rows(times, shape, "plain", "forward+backward", "compiled")
        print("x".join(map(str, shape)), "compiled", flush=True)


def parts(shapes: list[tuple[int, ...]], options: argparse.Namespace) -> Iterator[LossRow]:
    for shape in shapes:
        logits, _ = data(shape, "plain", options.device)
        functions = single_passes(logits) | operations(logits)
        times = harness.compare(functions, options.device, **options.effort)
        yield from rows(times, shape, "plain", "forward", "operation")


def floors(shapes: list[tuple[int, ...]], options: argparse.Namespace) -> Iterator[LossRow]:
    for shape in shapes:
        logits, target = data(shape, "plain", options.device)
        functions = single_passes(logits) | floor(logits, target)
        times = harness.compare(functions, options.device, **options.effort)
        yield from rows(times, shape, "plain", "forward+backward", "floor")


def typical(runs: list[Results[LossRow]]) -> Iterator[LossRow]:
    """Of what was timed together, the rows of the process in which PENEX's ratio is the median."""
    groups: dict[tuple[object, ...], list[list[LossRow]]] = {}
    for run in runs:
        for key, rows in itertools.groupby(
            run.rows, lambda row: (row.shape, row.option, row.work, row.how)
        ):
            groups.setdefault(key, []).append(list(rows))
    for candidates in groups.values():
        candidates.sort(key=_ratio)
        yield from candidates[len(candidates) // 2]


def _ratio(rows: list[LossRow]) -> float:
    """PENEX's to cross-entropy; the same for all where neither was timed."""
    return next((row.ratio for row in rows if row.loss == "penex running" and row.ratio), 1.0)


def in_processes(options: argparse.Namespace) -> None:
    """Measure in several processes, one after the other, and keep what is typical of them.

    Where the pages of a tensor lie in memory, and so how well the cache holds them, is drawn once
    for a process.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--device={options.device}", f"--threads={options.threads}", "--processes=1"]
        arguments += ["--quick"] * options.quick + [f"--shape={x}" for x in options.shape or []]
        runs = []
        for process in range(options.processes):
            out = Path(folder, str(process))
            command = [sys.executable, "-m", "benchmarks.loss", *arguments, f"--out={out}"]
            subprocess.run(command, check=True)
            (file,) = out.iterdir()
            runs.append(Results[LossRow].model_validate_json(file.read_text(encoding="utf-8")))
    runs[0].model_copy(update={"rows": list(typical(runs))}).save(options.out)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shape", action="append", help="only this shape, such as 64x10")
    parser.add_argument("--processes", type=int, default=3, help="on the CPU, measure in so many")
    options = parser.parse_args()
    if options.processes > 1 and options.device.type == "cpu":
        in_processes(options)
        return
    options.effort = {"seconds": 1.5}
    if options.quick:
        options.effort = {"seconds": 0.0, "blocks": 3, "calls": 1}
    machine = harness.start(options)
    shapes = [shape for shape in SHAPES if not options.quick or math.prod(shape) < 1 << 24]
    if options.shape:
        shapes = [tuple(map(int, shape.split("x"))) for shape in options.shape]
    found, skipped = list(eager(shapes, options)), []
    found += parts([shape for shape in PARTS if shape in shapes], options)
    if options.device.type == "cpu":
        found += floors([shape for shape in SMALL if shape in shapes], options)
    reason = None
    if options.quick:
        reason = "a trial run"
    elif not any(map(shutil.which, ("g++", "clang++", "c++"))):
        reason = "no C++ compiler was found"
    if reason is None:
        found += compiled([shape for shape in COMPILED if shape in shapes], options)
    else:
        skipped.append(Skipped(what="torch.compile", reason=reason))
    results = Results[LossRow](
        name="loss", machine=machine, quick=options.quick, rows=found, skipped=skipped
    )
    results.save(options.out)


if __name__ == "__main__":
    main()
