"""What is published: wheel and sdist, their contents, their versions, and what GitHub runs."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
from email.parser import HeaderParser
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement

import penex

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
# In the repository alone: what runs there before a change lands.
NOT_PUBLISHED = (".ci/",)


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Built(NamedTuple):
    """Distributions, and the sdist's files in a folder."""

    sdist: Path
    wheel: Path  # from the sdist
    wheel_of_tree: Path
    unpacked: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    pytest.importorskip("hatchling", reason="without it a build would download it")
    out, other = (tmp_path_factory.mktemp(name) for name in ("dist", "tree"))
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    run(*build, out, ROOT, cwd=out)  # the sdist, and a wheel from it
    run(*build, other, "--wheel", ROOT, cwd=out)
    (sdist,), (wheel,), (wheel_of_tree,) = (
        list(folder.glob(f"*{end}"))
        for folder, end in ((out, ".tar.gz"), (out, ".whl"), (other, ".whl"))
    )
    with tarfile.open(sdist) as archive:
        archive.extractall(other, filter="data")
    return Built(sdist, wheel, wheel_of_tree, other / sdist.name.removesuffix(".tar.gz"))


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files alone."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
    run(*pip, "--no-deps", "--no-index", "--no-compile", "--target", target, built.wheel)
    return target


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# 1. The files.


def test_metadata_and_readme_are_fit_for_the_index(built: Built) -> None:
    out = run(sys.executable, "-m", "twine", "check", "--strict", built.sdist, built.wheel)
    assert out.count("PASSED") == 2, out


def test_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "penex").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    files = set(contents(built.wheel))
    assert {name for name in files if ".dist-info/" not in name} == expected
    assert {"penex/py.typed", "penex/compare/analysis/report.html.jinja"} < files
    assert any(re.fullmatch(r"penex/paper/presets/.+\.yaml", name) for name in files)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in files)


def test_sdist_makes_the_wheel_that_the_repository_makes(built: Built) -> None:
    assert contents(built.wheel) == contents(built.wheel_of_tree)


def test_sdist_holds_the_repository(built: Built) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("what belongs to the repository is known to git, and this is no checkout")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    tracked = {name for name in listed.splitlines() if (ROOT / name).is_file()}
    files = {
        path.relative_to(built.unpacked).as_posix()
        for path in built.unpacked.rglob("*")
        if path.is_file()
    }
    assert files - {"PKG-INFO"} == {name for name in tracked if not name.startswith(NOT_PUBLISHED)}


def test_tests_run_from_the_sdist(built: Built) -> None:
    out = run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_api.py"),
        cwd=built.unpacked,
        env=os.environ | {"PYTHONPATH": str(built.unpacked / "src")},
    )
    assert " passed" in out


# 2. The installed wheel.


def requirements(name: str) -> set[str]:
    """A distribution and all that it needs, without extras."""
    found, left = set(), {name}
    while left:
        found.add(current := left.pop())
        for line in distribution(current).requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                left |= {needed.name} - found
    return found


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which torch can be imported, and nothing that torch does not need."""
    folder = tmp_path_factory.mktemp("torch")
    for name in requirements("torch"):
        needed = distribution(name)
        for part in {file.parts[0] for file in needed.files or ()} - {"..", "__pycache__"}:
            if not (folder / part).exists():
                (folder / part).symlink_to(Path(str(needed.locate_file(part))).resolve())
    return folder


def test_installed_wheel_needs_torch_alone(
    installed: Path, torch_alone: Path, tmp_path: Path
) -> None:
    code = f"""
import sys
sys.path += [{str(installed)!r}, {str(torch_alone)!r}]
import importlib.metadata, importlib.util
import torch, penex
assert penex.__file__.startswith({str(installed)!r}), penex.__file__
for absent in ("pytest", "numpy", "sklearn", "typer", "yaml"):
    assert importlib.util.find_spec(absent) is None, absent
logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
criterion = penex.PENEX()
criterion(logits, torch.tensor([0, 1])).backward()
assert logits.grad.isfinite().all() and criterion.penalty > 0
torch.testing.assert_close(
    criterion.predict_proba(logits), (1.1 * logits).softmax(1)
)
for module in ("metrics", "compare", "cli"):
    try:
        importlib.import_module(f"penex.{{module}}")
    except (ImportError, SystemExit) as error:
        assert "pip install 'penex[compare]'" in str(error), error
    else:
        raise AssertionError(module)
print(penex.__version__, importlib.metadata.version("penex"))
"""
    out = run(sys.executable, "-I", "-S", "-W", "ignore", "-c", code, cwd=tmp_path)
    assert out.split() == [penex.__version__] * 2


@pytest.mark.parametrize("command", ["penex", "python -m penex"])
def test_installed_command(installed: Path, tmp_path: Path, command: str) -> None:
    words = [installed / "bin" / "penex"] if command == "penex" else [sys.executable, "-m", "penex"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    assert run(*words, "--version", cwd=tmp_path, env=environment) == f"penex {penex.__version__}\n"
    listed = run(*words, "reproduce", "--list", cwd=tmp_path, env=environment)
    assert "cifar100" in listed


# 3. One version.


def test_the_version_is_the_same_everywhere(built: Built) -> None:
    wheel = contents(built.wheel)
    (metadata,) = (wheel[name] for name in wheel if name.endswith(".dist-info/METADATA"))
    newest = re.search(r"^## (\S+) - (?:unreleased|\d{4}-\d\d-\d\d)$", _read("CHANGELOG.md"), re.M)
    assert newest
    assert {
        "metadata": HeaderParser().parsestr(metadata.decode())["Version"],
        "CHANGELOG.md": newest[1],
        "CITATION.cff": yaml.safe_load(_read("CITATION.cff"))["version"],
    } == dict.fromkeys(("metadata", "CHANGELOG.md", "CITATION.cff"), penex.__version__)


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# 4. What GitHub runs.

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def _jobs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def _steps() -> list[dict[str, Any]]:
    return [
        step for path in WORKFLOWS for job in _jobs(path).values() for step in job.get("steps", ())
    ]


def test_workflows_name_what_is_there() -> None:
    scripts = "\n".join(step.get("run", "") for step in _steps())
    targets = re.findall(r"^(\w+):", _read("Makefile"), re.MULTILINE)
    made = re.findall(r"\bmake (\w+)", scripts)
    assert {"lint", "docs", "test"} <= set(made) <= set(targets)
    paths = re.findall(r"(?<![\w/.])(?:tests|docs|src|\.github)/[\w./-]+", scripts)
    assert paths
    missing = [path for path in paths if not (ROOT / path).exists() and "_build" not in path]
    assert missing == []


def test_workflows_run_on_the_oldest_and_the_newest_that_are_supported() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    (torch,) = (
        line for line in PROJECT["project"]["dependencies"] if Requirement(line).name == "torch"
    )
    oldest = str(Requirement(torch).specifier).removeprefix(">=")
    assert f"torch=={oldest}.0" in text
    pythons = re.findall(r"python-version: \"(\d+\.\d+)\"", text)
    said = [
        line.rsplit(" ", 1)[1]
        for line in PROJECT["project"]["classifiers"]
        if re.search(r":: Python :: 3\.", line)
    ]
    assert said[0] == PROJECT["project"]["requires-python"].removeprefix(">=")
    assert {said[0], said[-1]} <= set(pythons) <= set(said)


def test_workflows_may_do_no_more_than_they_must() -> None:
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}, path.name
    allowed = {
        (path.name, name): job["permissions"]
        for path in WORKFLOWS
        for name, job in _jobs(path).items()
        if "permissions" in job
    }
    assert allowed == {("release.yml", "publish"): {"id-token": "write"}}
    for step in _steps():
        if "uses" in step:  # by commit: a tag can be moved
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
