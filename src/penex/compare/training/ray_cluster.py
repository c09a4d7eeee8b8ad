"""Work on a Ray cluster: an existing one, or a temporary one on this machine.

Like local workers, those of Ray write runs into the output folder, so all hosts must share it, as
those of a SLURM or Kubernetes cluster do. This is checked before the first run.
"""

import contextlib
import functools
import logging
import os
import platform
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from penex._extras import need
from penex.compare.config import Execution
from penex.compare.errors import CompareError

RETRIES = 5
"""How often a run is started again after its worker or host was lost."""
ANSWER = 10.0
"""Seconds to wait for a cluster to answer."""
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Silences a warning at every start that the default will change.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextlib.contextmanager
def cluster(
    execution: Execution, folder: Path, shared: tuple[Any, ...]
) -> Iterator[tuple[int, Callable[[Callable[..., Any], Sequence[Any]], Iterator[Any]]]]:
    """Connect to a cluster, or start one; see :func:`penex.compare.parallel.workers`.

    joblib also has a Ray backend, but it neither yields results as they finish nor survives the
    loss of a worker; plain tasks do both.

    Yields:
        The number of workers, and the function that distributes work among them.
    """
    need("The backend ray", "ray", "ray")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    # Otherwise Ray prints "a worker died" into the display; there is no public option for this.
    ray._private.worker._worker_logs_enabled = False
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if execution.address is None:
        settings |= {"num_cpus": execution.jobs, "include_dashboard": False}
    else:
        _must_answer(execution.address)
    try:
        ray.init(execution.address or "local", **settings)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise CompareError(
            f"address: no Ray cluster available at {execution.address or 'this machine'}: {error} "
            "(for a cluster that requires a token, set RAY_AUTH_MODE=token)"
        ) from error
    try:
        with _probe(folder) as probe:
            _must_share(probe)
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            gpus = resources.get("GPU", 0)
            places = execution.jobs or int(gpus or resources.get("CPU", 1))
            remote = ray.remote(
                num_cpus=1,
                num_gpus=min(gpus / places, 1),
                max_retries=RETRIES,
            )(_here)
            references = [ray.put(value) for value in shared]
            start = functools.partial(remote.remote, probe, references)
            yield places, functools.partial(_each, start, execution.jobs)
    finally:
        ray.shutdown()  # also ends tasks that are still running


def _must_answer(address: str) -> None:
    """Check that a server answers: Ray itself would try for minutes and then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # as in "auto"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
    except OSError as error:
        raise CompareError(f"address: nothing answers at {address} ({error})") from None


def _each(
    start: Callable[..., Any],
    jobs: int | None,
    work: Callable[..., Any],
    items: Sequence[Any],
) -> Iterator[Any]:
    import ray

    waiting = iter(items)
    running: list[Any] = []
    while True:
        for item in waiting:
            running.append(start(work, item))
            if len(running) == jobs:
                break
        if not running:
            return
        ready, running = ray.wait(running)
        try:
            yield ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            raise CompareError(
                f"backend: a run lost its worker {RETRIES + 1} times, usually because memory ran "
                f"out. Finished runs are kept; the same command continues. Ray says: {error}"
            ) from None


def _here(probe: Path, references: list[Any], work: Callable[..., Any], item: Any) -> Any:
    """Run `work` in a worker, whose host may have joined the cluster after the start."""
    import ray

    if not probe.exists():
        raise CompareError(_apart(platform.node(), probe.parent))
    return work(item, *ray.get(references))


@contextlib.contextmanager
def _probe(folder: Path) -> Iterator[Path]:
    """A new file in `folder`, which is visible only to hosts that share the folder."""
    probe = folder.absolute() / f".shared-{uuid.uuid4().hex}"
    probe.touch()
    try:
        yield probe
    finally:
        probe.unlink(missing_ok=True)


def _must_share(probe: Path) -> None:
    """Check that every host with CPUs sees `probe` and has this version of penex."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=RETRIES)(_look)
    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node for node in known if node["Alive"] and node["Resources"].get("CPU")]
    answers = ray.get(
        [
            look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
            ).remote(probe)
            for node in nodes
        ]
    )
    for host, seen, installed in answers:
        if not seen:
            raise CompareError(_apart(host, probe.parent))
        if installed != version("penex"):
            raise CompareError(
                f"backend: host {host} has penex {installed}, this one {version('penex')}"
            )


def _look(probe: Path) -> tuple[str, bool, str]:
    return platform.node(), probe.exists(), version("penex")


def _apart(host: str, folder: Path) -> str:
    return (
        f"out: Ray's host {host} does not see this host's {folder}; choose a folder (--out) on a "
        "file system that all hosts of the cluster share"
    )
