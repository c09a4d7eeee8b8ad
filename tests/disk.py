"""A full disk, without filling one."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def full(most: int) -> Iterator[None]:
    """No file can grow beyond `most` bytes: the system refuses the write, as if space ran out."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
