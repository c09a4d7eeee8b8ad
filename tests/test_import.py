"""What `import penex` costs and needs, and that the examples in the docstrings are true."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import penex

# What the extras bring, by the names they are imported under.
OPTIONAL = (
    *("accelerate", "cloudpickle", "joblib", "lightning", "lightning_utilities", "matplotlib"),
    *("numpy", "onnx", "onnxruntime", "onnxscript", "optuna", "pandas", "pyarrow", "pydantic"),
    *("pytorch_lightning", "ray", "rich", "scipy", "skrub", "sklearn", "torchmetrics"),
    *("transformers", "typer", "yaml"),
)


def python(code: str) -> str:
    """Run `code` in a fresh interpreter that sees this penex; returns what it prints."""
    source = str(Path(penex.__file__).parents[1])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_alone_needs_the_standard_library_only() -> None:
    code = """
import sys
before = set(sys.modules)
import penex
new = {name.split(".")[0] for name in set(sys.modules) - before} - {"penex"}
print(sorted(new - sys.stdlib_module_names))
assert "PENEX" in dir(penex) and penex.__version__
"""
    assert python(code) == "[]"


def test_core_works_with_torch_alone() -> None:
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # importing it raises ImportError
import torch, penex
logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
criterion = penex.PENEX()
criterion(logits, torch.tensor([0, 1])).backward()
assert logits.grad.isfinite().all()
assert torch.allclose(criterion.predict_proba(logits).sum(1), torch.ones(2))
penex.losses.FocalLoss()(logits, torch.tensor([0, 1]))
penex.inference.fold_temperature(torch.nn.Linear(3, 2), 0.1)
try:
    criterion(logits, torch.tensor([0, 5]))
except IndexError as error:
    print(error)
"""
    assert "got 5" in python(code)


def test_first_use_inside_a_compiled_function() -> None:
    """The attribute of the package is imported on first use; a tracer must not trip over that."""
    code = """
import torch, penex

@torch.compile(fullgraph=True, backend="aot_eager")
def step(logits, target):
    return penex.penex_loss(logits, target, penalty=0.1)

logits, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
got = step(logits, target)
torch.testing.assert_close(got, penex.penex_loss(logits, target, penalty=0.1))
print("same")
"""
    assert python(code) == "same"


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match=r"module 'penex' has no attribute 'PENNEX'"):
        _ = penex.PENNEX
    with pytest.raises(ImportError):
        exec("from penex import pennex_loss")


def test_everything_announced_exists() -> None:
    for name in penex.__all__:
        if name != "metrics":  # it needs an extra
            assert getattr(penex, name) is not None
    for module in (penex.functional, penex.losses, penex.inference):
        for name in module.__all__:
            assert getattr(module, name).__doc__


def test_package_is_typed() -> None:
    assert (Path(penex.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", ["penex", "penex.functional", "penex.losses", "penex.inference"])
def test_docstring_examples(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failed == 0


def test_a_missing_extra_is_named() -> None:
    from penex._extras import need

    need("penex", "compare", "torch")
    with pytest.raises(ImportError, match=r"Thing needs the extra 'onnx' \(no_such is missing\): "):
        need("Thing", "onnx", "torch", "no_such")


def test_only_the_command_line_and_the_registry_need_the_papers_experiments() -> None:
    """The registry builds the ablation losses; everything else works without penex.paper."""
    root = Path(penex.__file__).parent
    users = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(r"^\s*(from|import) penex\.paper\b", path.read_text("utf-8"), re.MULTILINE)
        and path.parent.name != "paper"
    }
    assert users == {"cli.py", "compare/registry.py"}
