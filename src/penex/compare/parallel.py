"""Parallel execution of independent tasks, by processes of this machine or on a Ray cluster."""

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
    """A pool of worker processes."""

    jobs: int
    """How many items are processed at a time."""
    each: Each
    """``each(work, items)`` yields the results of ``work(item, *shared)`` as they finish."""


@contextlib.contextmanager
def workers(
    execution: Execution, folder: Path, *shared: Any, user_objects: Iterable[str] = ()
) -> Iterator[Workers]:
    """Start worker processes for as long as the context is open.

    Args:
        execution: How many workers to start, and where.
        folder: The output folder, which must be the same one for all workers.
        shared: Arguments that every call of ``work`` gets, sent once to each host.
        user_objects: Names of the user-defined losses and networks that the work needs.

    Raises:
        CompareError: Workers cannot be started, or do not see `folder`.
    """
    if world_size() != execution.devices * execution.nodes:
        raise CompareError(
            f"devices: {execution.devices} on each of {execution.nodes} machine(s) were asked "
            f"for, but there are {world_size()} processes; start them with torchrun"
        )
    if execution.backend == "ray":
        if world_size() > 1:
            raise CompareError("backend: runs on several devices cannot use ray; leave it out")
        from penex.compare.training.ray_cluster import cluster

        with cluster(execution, folder, shared) as (jobs, each):
            yield Workers(jobs, _with_objects(each, user_objects))
    else:
        jobs = 1 if world_size() > 1 else execution.jobs or _default_jobs()
        yield Workers(jobs, _with_objects(functools.partial(_each, jobs, shared), user_objects))


def _with_objects(each: Each, names: Iterable[str]) -> Each:
    return lambda work, items: each(with_user_objects(work, names), items)


def _default_jobs() -> int:
    """One job per core; with a GPU, which all runs would share, only one."""
    if shutil.which("nvidia-smi") is not None:  # avoids importing torch, which takes seconds
        import torch

        if torch.cuda.is_available():
            return 1
    return int(joblib.cpu_count())


def _each(
    jobs: int, shared: tuple[Any, ...], work: Callable[..., Any], items: Sequence[Any]
) -> Iterator[Any]:
    """Process the items on local processes, which are stopped before any exception propagates."""
    if not items:
        return
    parallel = joblib.Parallel(min(jobs, len(items)), return_as="generator_unordered", batch_size=1)
    calls = (joblib.delayed(_run_in_worker)(work, item, *shared) for item in items)
    with contextlib.closing(parallel(calls)) as results:
        try:
            yield from results
        except TerminatedWorkerError:
            raise CompareError(
                "jobs: the system ended a worker process, usually because memory ran out. "
                "Finished runs are kept; the same command with fewer --jobs continues."
            ) from None


def _run_in_worker(work: Callable[..., Any], *arguments: Any) -> Any:
    _tie_to_parent()
    return work(*arguments)


@functools.cache  # once per process
def _tie_to_parent() -> None:
    """In a worker: leave Ctrl-C, which reaches all processes, to the parent, and end with it."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        exit_with_parent(parent.pid)
