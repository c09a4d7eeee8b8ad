"""Runs the code blocks of README.md and docs/: Python as it stands, commands on small data."""

import os
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from typer.testing import CliRunner

ROOT = Path(__file__).parent


def run_commands(example: Example) -> None:
    """Every `penex` line must succeed, made quick by options at its end; `make` targets exist."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in example.parsed.splitlines():
        command, *words = shlex.split(line, comments=True)
        if command == "make":
            assert set(words) <= set(targets), f"no such target: {line}"
        elif command == "penex":
            from penex.cli import app

            if words[0] == "compare":
                if "--out" not in words:
                    words += ["--out", f"out-{example.start}-{abs(hash(line))}"]
                words += ["--epochs", "2", "--seeds", "2", "--jobs", "1"]
                if "--losses" not in words:
                    words += ["--losses", "cross-entropy,penex"]
                if "--tune" in words:
                    words += ["--tune", "1"]
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, f"{line}\n{result.output}"
        else:
            raise AssertionError(f"neither make nor penex: {line}")


def check_settings(example: Example) -> None:
    """A YAML block is a configuration that is accepted; it becomes the file that commands name."""
    from penex.compare.config import Config

    Config(**yaml.safe_load(example.parsed))
    Path("settings.yaml").write_text(example.parsed)


@pytest.fixture(scope="module")
def _sample_files(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder with the files that the documents name, in place while a document runs."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    label = rng.integers(2, size=1500)
    size, city = rng.normal(label, 1), rng.choice(["Bern", "Graz", "Köln"], 1500)
    table = pd.DataFrame({"size": size, "city": city, "label": np.where(label, "yes", "no")})
    before = Path.cwd()
    os.chdir(folder)
    table.to_csv("table.csv", index=False)
    np.savez("data.npz", X=rng.normal(label[:, None], 1, (1500, 4)), y=label)
    yield
    os.chdir(before)


pytest_collect_file = Sybil(
    parsers=[
        SkipParser(),
        PythonCodeBlockParser(),
        CodeBlockParser("sh", run_commands),
        CodeBlockParser("yaml", check_settings),
    ],
    patterns=["README.md", "CONTRIBUTING.md", "docs/*.md"],
    fixtures=["_sample_files"],
).pytest()
