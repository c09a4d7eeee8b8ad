"""PENEX: a penalized exponential loss for classification, in the place of cross-entropy.

>>> import penex
>>> criterion = penex.PENEX()  # where torch.nn.CrossEntropyLoss() stood
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penex import functional, inference, losses, metrics
    from penex.compare.result import compare_losses, load
    from penex.functional import penex_loss
    from penex.linear import LinearLoss, LinearPENEX
    from penex.losses import PENEX, LogPENEX

__version__ = "0.1.0"
__all__ = [
    "PENEX",
    "LinearLoss",
    "LinearPENEX",
    "LogPENEX",
    "__version__",
    "compare_losses",
    "functional",
    "inference",
    "load",
    "losses",
    "metrics",
    "penex_loss",
]

_MODULES = ("functional", "inference", "losses", "metrics")
_HOME = {
    "LinearLoss": "penex.linear",
    "LinearPENEX": "penex.linear",
    "LogPENEX": "penex.losses",
    "PENEX": "penex.losses",
    "compare_losses": "penex.compare.result",
    "load": "penex.compare.result",
    "penex_loss": "penex.functional",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `penex --help` does not wait for torch."""
    if name in _MODULES:
        return import_module(f"penex.{name}")
    if name in _HOME:
        value = globals()[name] = getattr(import_module(_HOME[name]), name)
        return value
    raise AttributeError(f"module 'penex' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
