"""One run over several devices: the processes that torchrun starts, and what they agree on.

All of them go through the same comparison. One leads: it alone shows, claims and writes, and the
others do what it decided.
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
    """Devices on each machine, and machines, as torchrun has them; 1 and 1 without it."""
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1
    return here, world_size() // here


def start(execution: Execution, command: list[str]) -> int:
    """Run `command` (arguments of Python) under torchrun, on the devices of this machine.

    Returns:
        Its exit status, which is that of the first process to fail.

    Raises:
        CompareError: Other machines are needed, where nothing can be started from here.
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

    logging.disable()  # of torchrun's own: the first of the processes says what there is to say
    try:
        torchrun.main(["--standalone", f"--nproc-per-node={execution.devices}", *command])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode
    except SignalException:  # passed on to the processes, of which the first has said so
        return 130
    return 0


def is_rank_zero() -> bool:
    """Whether this process is the one that shows, claims and writes."""
    return world_size() == 1 or int(os.environ["RANK"]) == 0


@contextlib.contextmanager
def default_process_group() -> Iterator[None]:
    """Let the processes talk to each other; Lightning takes this group as it finds it."""
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
        # A sharded network is a cycle that holds the group, which aborts if it outlives this.
        gc.collect()
        torch.distributed.destroy_process_group()


def exit_with_parent(parent: int) -> None:
    """End this process when its parent has ended, because it was killed: nobody waits for it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def on_rank_zero(make: Callable[[], T]) -> T:
    """What `make` returns or raises where it is called, that is in the leading process."""
    if world_size() == 1:
        return make()
    from torch.distributed import broadcast_object_list

    made: list[Any] = [None, None]
    if is_rank_zero():
        try:
            made[0] = make()
        except Exception as error:  # whatever it is: the others must not wait for ever
            made[1] = error
    broadcast_object_list(made, src=0)
    result, refusal = made
    if refusal is not None:
        raise refusal
    value: T = result
    return value
