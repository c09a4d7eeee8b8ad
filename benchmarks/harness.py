"""What the benchmarks share: one timing primitive, the machine, and the files of results."""

import argparse
import ctypes
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field

import penex

RESULTS = Path(__file__).parent / "results"
BLOCK_SECONDS = 0.02
"""A block goes on for this long, and for CALLS calls at least, or FEW if one takes longer."""
CALLS = 5
FEW = 3
BLOCKS = 5
"""At least so many blocks of each function."""


class Strict(BaseModel):
    """The schema of a part of a results file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Timing(Strict):
    """Seconds of one call: median and quartiles over the blocks."""

    median: float = Field(gt=0)
    q1: float = Field(gt=0)
    q3: float = Field(gt=0)
    blocks: int = Field(ge=2)
    inner: int = Field(ge=1, description="calls of a block, whose mean is one sample")


class Machine(Strict):
    device: str
    kind: Literal["cpu", "cuda"]
    processor: str
    cores: int
    threads: int
    system: str
    python: str
    torch: str
    penex: str


class Skipped(Strict):
    what: str
    reason: str


Row = TypeVar("Row", bound=Strict)


class Results(Strict, Generic[Row]):
    """A file of results."""

    name: str
    machine: Machine
    quick: bool = Field(description="a trial run; its numbers mean little")
    rows: list[Row] = Field(min_length=1)
    skipped: list[Skipped] = []

    def save(self, folder: Path) -> Path:
        """Write the file, which must pass the schema as it stands on disk."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}-{slug(self.machine)}.json"
        text = self.model_dump_json(indent=1) + "\n"
        type(self).model_validate_json(text)
        path.write_text(text, encoding="utf-8")
        print(path)
        return path


def slug(machine: Machine) -> str:
    """The device's name in file names; every CPU is "cpu", so that a new run replaces the old."""
    if machine.kind == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", machine.device.lower()).strip("-")


def machine(device: torch.device) -> Machine:
    processor = _processor()
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        kind=device.type,
        processor=processor,
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        penex=penex.__version__,
    )


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"^model name\s*: (.*)$", information.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def compare(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    blocks: int = BLOCKS,
    calls: int = CALLS,
) -> dict[str, Timing]:
    """Time functions against each other: blocks of calls of one, interleaved with the others'.

    A block first calls its function once untimed, which takes away what the function before it
    left in the caches and in the allocator, and then at least `calls` times, or FEW. The order of
    the functions is reversed every other round.

    Args:
        functions: What to call, by name.
        device: Where they work.
        seconds: Go on for so long, all functions together.
        blocks: At least so many blocks of each, >= 2.
        calls: At least so many calls to a block.
    """
    inner = {}
    for name, function in functions.items():
        for _ in range(2):  # the first call pays for whatever is made only once
            once = _block(function, 1, device)
        least = calls if once < BLOCK_SECONDS else min(calls, FEW)
        inner[name] = max(least, round(BLOCK_SECONDS / once))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order, end = list(functions), time.perf_counter() + seconds
    while len(samples[order[0]]) < blocks or time.perf_counter() < end:
        for name in order:
            samples[name].append(_block(functions[name], inner[name], device))
        order.reverse()
    return {name: _timing(times, inner[name]) for name, times in samples.items()}


def _block(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds of a call, the mean of `calls`."""
    function()
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def _timing(times: list[float], inner: int) -> Timing:
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median=median, q1=q1, q3=q3, blocks=len(times), inner=inner)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--quick", action="store_true", help="a trial run; its numbers mean little")
    result.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    result.add_argument("--threads", type=int, default=2, help="threads of torch on the CPU")
    result.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    return result


def keep_memory() -> None:
    """Let the process keep what it frees, so that no function's time depends on the one before.

    Else the C library gives memory back to the system when the freed piece happens to lie last, and
    its pages must be mapped again. Pieces above 32 MiB it always gives back: they are new memory
    each time, for every function.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3  # of malloc.h
        for option, value in ((trim_threshold, 2**31 - 1), (mmap_threshold, 2**25)):
            if not libc.mallopt(option, value):
                raise OSError(f"mallopt({option}, {value}) was refused")


def start(options: argparse.Namespace) -> Machine:
    """Set threads, seed and allocator; the machine, for the results."""
    torch.set_num_threads(options.threads)
    keep_memory()
    torch.manual_seed(0)
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device.index or 0)
    return machine(options.device)
