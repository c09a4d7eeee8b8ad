"""Measures the most memory that forward and backward hold at one time."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import torch
from pydantic import Field
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness
from benchmarks.harness import Results, Strict
from benchmarks.loss import OPTIONS, SHAPES, call, data, losses


class MemoryRow(Strict):
    """One loss in one situation."""

    shape: tuple[int, ...]
    option: str
    loss: str
    extra: float = Field(ge=0)
    """Most bytes held beyond logits and labels, the gradient included, in sizes of the logits."""


def peak(function: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that are held at one time beyond what is held before."""
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event["name"] == "[memory]"]
    memory.sort(key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in memory), initial=0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that the profiler's C++ part writes to stderr at start and stop."""
    stderr, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nothing)


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    machine = harness.start(options)
    rows = []
    for shape in SHAPES[:2] if options.quick else SHAPES:
        for option in OPTIONS:
            logits, target = data(shape, option, options.device)
            for name, loss in losses(shape[1], option, options.device).items():
                most = peak(call(loss, logits, target, "forward+backward"), options.device)
                extra = most / logits.nbytes
                rows.append(MemoryRow(shape=shape, option=option, loss=name, extra=extra))
    Results[MemoryRow](name="memory", machine=machine, quick=options.quick, rows=rows).save(
        options.out
    )


if __name__ == "__main__":
    main()
