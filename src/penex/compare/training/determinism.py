"""The process-wide settings that make a run reproducible, in force only during the run."""

import contextlib
import logging
import os
import random
import warnings
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Use one thread and deterministic algorithms, and silence Lightning.

    On exit, these settings are restored, as are the states of the global random number generators
    of PyTorch (CPU, and CUDA if it was in use before), NumPy and Python.
    """
    threads = torch.get_num_threads()
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    lightning = logging.getLogger("lightning.fabric")
    level = lightning.level
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if cuda else ()
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        try:
            torch.set_num_threads(1)
            torch.set_deterministic_debug_mode("error")
            # Otherwise every new tensor would be filled before it is written to.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            lightning.setLevel(logging.ERROR)
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_deterministic_debug_mode(mode)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            if workspace is None:
                os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
            lightning.setLevel(level)
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
