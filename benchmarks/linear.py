"""Times heads with very many classes, and measures their memory, forward and backward."""

import argparse
import importlib
import importlib.util
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Results, Skipped, Strict, Timing
from benchmarks.memory import peak
from penex._matmul import by_onednn
from penex.functional import linear_penex_loss, penex_loss

REFERENCE, COMPILED = "cross-entropy", "cross-entropy, compiled"
LOGITS, HEAD = "penex of the logits", "penex without logits"
PLAIN = "penex without logits, oneDNN off"
"""With the products from the library that cross-entropy's come from."""
LIGER, APPLE = "liger", "cut cross-entropy"

SHAPES = [(4096, 256, 32768), (8192, 768, 50257), (2048, 1024, 131072)]
"""Rows, hidden size, classes."""
LARGE = (8192, 2304, 256000)
"""On CUDA alone, in bfloat16."""
QUICK = (40, 8, 300)
CURVES = {
    "rows": [(rows, 256, 16384) for rows in (512, 1024, 2048, 4096, 8192)],
    "classes": [(2048, 256, classes) for classes in (4096, 8192, 16384, 32768, 65536)],
}
Head = Callable[[Tensor, Tensor, Tensor], Tensor]


class LinearRow(Strict):
    """One head at one shape: value and the gradients of hidden states and weight."""

    shape: tuple[int, int, int]
    dtype: Literal["float32", "bfloat16"]
    part: Literal["table", "rows", "classes"]
    head: str
    timing: Timing
    ratio: float
    """To cross-entropy of the same shape, of medians."""
    extra: int = Field(ge=0)
    """Most bytes held at one time beyond hidden states, weight and labels; less the gradients."""
    gradients: int = Field(gt=0)
    """Bytes of the gradients, which every head makes."""


def cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def of_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return penex_loss(F.linear(hidden, weight), target)


def without_onednn(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration", UserWarning)  # nobody asked for it
        with torch.backends.mkldnn.flags(enabled=False):
            return linear_penex_loss(hidden, weight, target)


def heads(options: argparse.Namespace, part: str) -> tuple[dict[str, Head], list[Skipped]]:
    """The heads to compare, and those that cannot be had here."""
    found: dict[str, Head] = {REFERENCE: cross_entropy, HEAD: linear_penex_loss}
    if part != "table":
        return found, []
    found[LOGITS], skipped = of_logits, []
    cuda = options.device.type == "cuda"
    if by_onednn(torch.ones(1, device=options.device)):
        found[PLAIN] = without_onednn
    elif not cuda:
        skipped.append(Skipped(what=PLAIN, reason="oneDNN is not used here"))
    if options.quick:
        skipped.append(Skipped(what=COMPILED, reason="a trial run"))
    elif not cuda and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        skipped.append(Skipped(what=COMPILED, reason="no C++ compiler was found"))
    else:
        found[COMPILED] = torch.compile(cross_entropy, dynamic=False)
    for name, module in ((LIGER, "liger_kernel"), (APPLE, "cut_cross_entropy")):
        if not cuda:
            skipped.append(Skipped(what=name, reason="it needs a CUDA device"))
        elif importlib.util.find_spec(module) is None:
            skipped.append(Skipped(what=name, reason=f"{module} is not installed"))
        elif name == LIGER:
            fused = importlib.import_module(
                "liger_kernel.transformers"
            ).LigerFusedLinearCrossEntropyLoss()
            found[name] = lambda hidden, weight, target, fused=fused: fused(weight, hidden, target)
        else:
            found[name] = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return found, skipped


def call(head: Head, hidden: Tensor, weight: Tensor, target: Tensor) -> Callable[[], None]:
    def both() -> None:
        torch.autograd.grad(head(hidden, weight, target), (hidden, weight))

    return both


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, part: str, options: argparse.Namespace
) -> tuple[list[LinearRow], list[Skipped]]:
    rows, size, classes = shape
    hidden = torch.randn(rows, size, device=options.device, dtype=dtype).requires_grad_()
    weight = torch.randn(classes, size, device=options.device) / size**0.5
    weight = weight.to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,), device=options.device)
    contenders, skipped = heads(options, part)
    functions = {name: call(head, hidden, weight, target) for name, head in contenders.items()}
    times = harness.compare(
        functions, options.device, seconds=0, blocks=2 if options.quick else 3, calls=1
    )
    gradients = hidden.nbytes + weight.nbytes
    found = [
        LinearRow(
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            part=part,
            head=name,
            timing=times[name],
            ratio=times[name].median / times[REFERENCE].median,
            extra=max(peak(function, options.device) - gradients, 0),
            gradients=gradients,
        )
        for name, function in functions.items()
    ]
    print(
        "x".join(map(str, shape)),
        part,
        *(f"{row.head} {row.ratio:.2f}" for row in found),
        sep=", ",
        flush=True,
    )
    return found, skipped


def situations(
    options: argparse.Namespace,
) -> Iterator[tuple[tuple[int, int, int], torch.dtype, str]]:
    if options.quick or options.shape:
        shapes = [tuple(map(int, shape.split("x"))) for shape in options.shape or []]
        for shape in shapes or [QUICK]:
            yield shape, torch.float32, "table"
        return
    for shape in SHAPES:
        yield shape, torch.float32, "table"
    if options.device.type == "cuda":
        for shape in [*SHAPES, LARGE]:
            yield shape, torch.bfloat16, "table"
    for part, shapes in CURVES.items():
        for shape in shapes:
            yield shape, torch.float32, part


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shape", action="append", help="as 4096x256x32768; instead of all")
    options = parser.parse_args()
    machine = harness.start(options)
    found: list[LinearRow] = []
    skipped: dict[str, Skipped] = {}
    for situation in situations(options):
        rows, missing = measure(*situation, options)
        found += rows
        skipped |= {part.what: part for part in missing}
    Results[LinearRow](
        name="linear",
        machine=machine,
        quick=options.quick,
        rows=found,
        skipped=list(skipped.values()),
    ).save(options.out)


if __name__ == "__main__":
    main()
