"""Matrix products of a block, on the CPU by the faster of the two libraries that torch comes with.

torch multiplies float32 matrices with its BLAS. In the builds for x86 that is MKL, which is faster
than oneDNN on Intel's processors and can be much slower on AMD's. On AMD's, oneDNN is used, through
the operation that ``torch.compile`` calls for linear layers;
``torch.backends.mkldnn.flags(enabled=False)`` switches it off.
"""

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_AVAILABLE: bool = (
    torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
)


def by_onednn(tensor: Tensor) -> bool:
    """Whether oneDNN multiplies such tensors: float32 on AMD's CPUs, where the BLAS is MKL."""
    return (
        not torch.compiler.is_compiling()
        and _AVAILABLE
        and tensor.is_cpu
        and tensor.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and _amd()
    )


@functools.cache
def _amd() -> bool:
    """Whether the processor is AMD's."""
    vendor = "AuthenticAMD"
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as stream:
            return vendor in stream.read(4096)  # the first core's entry
    except OSError:  # not Linux
        return vendor in platform.processor()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear` of matrices that are not empty."""
    if by_onednn(input):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
        return product
    return F.linear(input, weight, bias)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, the sum in the dtype of `total`."""
    if by_onednn(a):
        # a b, or else the transpose of b^T a^T: oneDNN's first factor must be contiguous.
        total += linear(a, b.t()) if a.is_contiguous() else linear(b.t(), a).t()
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
