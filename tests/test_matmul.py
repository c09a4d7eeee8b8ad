"""Both libraries give the product, whatever the layout of the factors."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from penex import _matmul
from penex._matmul import add_product, by_onednn, linear
from penex.functional import linear_penex_loss

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")
ONEDNN = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


@pytest.fixture(autouse=True)
def _amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor of AMD's, so that both libraries are tested on every machine."""
    monkeypatch.setattr(_matmul, "_amd", lambda: True)


def test_other_processors_use_the_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_matmul, "_amd", lambda: False)
    assert not by_onednn(torch.ones(1))


@contextmanager
def library(onednn: bool) -> Iterator[None]:
    with torch.backends.mkldnn.flags(enabled=onednn):
        assert by_onednn(torch.ones(1)) is (onednn and ONEDNN)
        yield


def matrix(rows: int, columns: int, transposed: bool, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(columns, rows, dtype=dtype).t() if transposed else (
        torch.randn(rows, columns, dtype=dtype)
    )  # fmt: skip


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 7, 5), (129, 33, 257)])
def test_a_product_is_added_to_the_total(
    sizes: tuple[int, int, int], first: bool, second: bool, dtype: torch.dtype, onednn: bool
) -> None:
    torch.manual_seed(0)
    rows, inner, columns = sizes
    a, b = matrix(rows, inner, first, dtype), matrix(inner, columns, second, dtype)
    total = torch.randn(rows, columns, dtype=torch.promote_types(dtype, torch.float32))
    expected = total.double() + a.double() @ b.double()
    with library(onednn):
        add_product(total, a, b)
    tolerance = 1e-5 if dtype != torch.bfloat16 else 2e-1  # the product is rounded before the sum
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_layer(dtype: torch.dtype, bias: bool, onednn: bool) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(13, 5, dtype=dtype), torch.randn(40, 5, dtype=dtype)[3:26]
    offset = torch.randn(23, dtype=dtype) if bias else None
    expected = hidden.double() @ weight.double().t() + (0 if offset is None else offset.double())
    with library(onednn):
        found = linear(hidden, weight, offset)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_onednn_is_not_asked_for() -> None:
    assert not by_onednn(torch.ones(1, dtype=torch.float64))
    assert not by_onednn(torch.ones(1, dtype=torch.bfloat16))
    assert not by_onednn(torch.ones(1, device="meta"))


def test_the_loss_is_the_same_with_either() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 9), torch.randn(70, 9)
    target, bias = torch.randint(70, (50,)), torch.randn(70)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    found = []
    for onednn in (True, False):
        with library(onednn):
            loss = linear_penex_loss(hidden, weight, target, bias, chunk_size=16)
            found.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
