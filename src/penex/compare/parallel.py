"""Independent pieces of work side by side, on processes of this machine or on a Ray cluster."""

import contextlib
import functools
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from penex.compare.config import Execution
from penex.compare.errors import CompareError
from penex.compare.training.distributed import exit_with_parent, world_size
from penex.compare.user_objects import with_user_objects

Each = Callable[[Callable[..., Any], Sequence[Any]], Iterator[Any]]


@dataclass(frozen=True)
class Workers:
    """Processes that work for us."""

    jobs: int
    """How many pieces at a time."""
    each: Each
    """``each(work, items)``: what ``work(item, *shared)`` returns for the items, as they finish."""


@contextlib.contextmanager
def workers(
    execution: Execution, folder: Path, *shared: Any, user_objects: Iterable[str] = ()
) -> Iterator[Workers]:
    """Processes that work for as long as the context is open.

    Args:
        execution: How many, and where.
        folder: The output folder, which must be the same one for all of them.
        shared: What every piece of work needs, sent once to each host.
        user_objects: Names of the losses and networks, defined by the user, that it needs.

    Raises:
        CompareError: They cannot be had, or do not see `folder`.
    """
    if world_size() != execution.devices * execution.nodes:
        raise CompareError(
            f"devices: {execution.devices} on each of {execution.nodes} machine(s) were asked "
            f"for, but there are {world_size()} processes; start them with torchrun"
        )
    if execution.backend == "ray":
        if world_size() > 1:
            raise CompareError("backend: a run over several devices has them all; leave out ray")
        from penex.compare.training.ray_cluster import cluster

        with cluster(execution, folder, shared) as (jobs, each):
            yield Workers(jobs, _with_objects(each, user_objects))
    else:
        jobs = 1 if world_size() > 1 else execution.jobs or _default_jobs()
        yield Workers(jobs, _with_objects(functools.partial(_each, jobs, shared), user_objects))


def _with_objects(each: Each, names: Iterable[str]) -> Each:
    return lambda work, items: each(with_user_objects(work, names), items)


def _default_jobs() -> int:
    """One for each core; where there is a GPU, all runs would be on that one, so one."""
    if shutil.which("nvidia-smi") is not None:  # else torch, seconds to import, is not asked
        import torch

        if torch.cuda.is_available():
            return 1
    return int(joblib.cpu_count())


def _each(
    jobs: int, shared: tuple[Any, ...], work: Callable[..., Any], items: Sequence[Any]
) -> Iterator[Any]:
    """On local processes; on any exception they are stopped first."""
    if not items:
        return
    parallel = joblib.Parallel(min(jobs, len(items)), return_as="generator_unordered", batch_size=1)
    calls = (joblib.delayed(_run_in_worker)(work, item, *shared) for item in items)
    with contextlib.closing(parallel(calls)) as results:
        try:
            yield from results
        except TerminatedWorkerError:
            raise CompareError(
                "jobs: the system ended a worker process, as a rule because memory ran out. "
                "Finished runs are kept; the same command with fewer --jobs continues."
            ) from None


def _run_in_worker(work: Callable[..., Any], *arguments: Any) -> Any:
    _tie_to_parent()
    return work(*arguments)


@functools.cache  # once per process
def _tie_to_parent() -> None:
    """In a worker: leave Ctrl-C, which reaches all processes, to the parent; end when it ends."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        exit_with_parent(parent.pid)
