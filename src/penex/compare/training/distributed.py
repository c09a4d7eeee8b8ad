"""One run on several devices: the processes that torchrun starts, and how they cooperate.

All of them execute the same comparison. Only the process of rank zero displays progress, locks the
output folder and writes to it; the others follow its decisions.
"""

import contextlib
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from penex.compare.config import Execution
from penex.compare.errors import CompareError

T = TypeVar("T")


def world_size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def devices_and_nodes() -> tuple[int, int]:
    """Numbers of devices per machine and of machines under torchrun; 1 and 1 without it."""
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1
    return here, world_size() // here


def start(execution: Execution, command: list[str]) -> int:
    """Run `command` (arguments of Python) under torchrun, on the devices of this machine.

    Returns:
        The exit status, which is that of the first process to fail.

    Raises:
        CompareError: `execution` needs other machines, where processes cannot be started from here.
    """
    if execution.nodes > 1:
        raise CompareError(
            f"nodes: to share runs between {execution.nodes} machines, start on each of them: "
            f"torchrun --nnodes {execution.nodes} --nproc-per-node {execution.devices} "
            "--rdzv-backend c10d --rdzv-endpoint HOST:PORT -m penex.cli ..."
        )
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable()  # torchrun's own; the process of rank zero reports errors
    try:
        torchrun.main(["--standalone", f"--nproc-per-node={execution.devices}", *command])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode
    except SignalException:  # passed on to the processes; that of rank zero has reported it
        return 130
    return 0


def is_rank_zero() -> bool:
    """Whether this process is the one that displays progress and writes the output folder."""
    return world_size() == 1 or int(os.environ["RANK"]) == 0


@contextlib.contextmanager
def default_process_group() -> Iterator[None]:
    """Set up the default process group of the processes, which Lightning then uses."""
    if world_size() == 1:
        yield
        return
    import torch

    exit_with_parent(os.getppid())
    cuda = torch.cuda.is_available()
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        # A sharded network is a reference cycle that holds the group; outliving it would abort.
        gc.collect()
        torch.distributed.destroy_process_group()


def exit_with_parent(parent: int) -> None:
    """End this process when its parent has ended, which may have been killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def on_rank_zero(function: Callable[[], T]) -> T:
    """Call `function` on rank zero, and return its result, or raise its error, on all ranks."""
    if world_size() == 1:
        return function()
    from torch.distributed import broadcast_object_list

    outcome: list[Any] = [None, None]
    if is_rank_zero():
        try:
            outcome[0] = function()
        except Exception as error:  # of any kind: otherwise the other ranks would wait forever
            outcome[1] = error
    broadcast_object_list(outcome, src=0)
    result, raised = outcome
    if raised is not None:
        raise raised
    value: T = result
    return value
