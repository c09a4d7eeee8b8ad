"""Settings: their sources, and error messages with name, expectation and value."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penex.compare.config import Config, configure
from penex.compare.errors import CompareError, named
from penex.compare.registry import DEFAULT_LOSSES, parse_loss


def test_demonstration_trains_on_few_rows() -> None:
    config = configure()
    assert (config.data, config.train_size, config.seeds) == ("digits", 300, 5)
    assert config.losses == DEFAULT_LOSSES
    assert len(DEFAULT_LOSSES) == 5
    # Whoever names data gets all of it, and whoever names a size gets that.
    assert configure(data="digits").train_size is None
    assert configure(train_size=50).train_size == 50
    assert configure(epochs=7) == config.model_copy(update={"epochs": 7})


def test_options_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    # 1e-2 without a dot is a string in YAML; people write it all the same.
    path.write_text("data: wine\nlosses: [cross-entropy, penex=0.3]\nlr: 1e-2\nseeds: 3\n")
    config = configure(path, seeds=4, epochs=None)
    assert config == Config(data="wine", losses=("cross-entropy", "penex=0.3"), lr=0.01, seeds=4)
    assert config.epochs == Config().epochs


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}\n"])
def test_an_empty_file_changes_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert configure(path) == configure()


def test_null_train_size_in_a_file_means_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("train_size: null\n")
    assert configure(path).train_size is None


@given(
    seeds=st.integers(1, 1000),
    lr=st.floats(1e-300, 1e300),
    label_noise=st.floats(0, 1, exclude_max=True),
    hidden=st.lists(st.integers(1, 10**6)).map(tuple),
    train_size=st.none() | st.integers(1, 10**9),
)
def test_settings_round_trip_through_plain_values(**values: Any) -> None:
    config = Config(**values)
    assert Config(**config.settings()) == config
    assert {"losses", "seeds", "data", "target"}.isdisjoint(config.fixed())


@pytest.mark.parametrize(
    ("options", "name", "got"),
    [
        ({"seeds": 0}, "seeds", "0"),
        ({"seeds": 1001}, "seeds", "1001"),
        ({"seeds": 2.5}, "seeds", "2.5"),
        ({"train_size": 0}, "train_size", "0"),
        ({"train_size": -3}, "train_size", "-3"),
        ({"label_noise": 1.0}, "label_noise", "1.0"),
        ({"label_noise": -0.1}, "label_noise", "-0.1"),
        ({"label_noise": float("nan")}, "label_noise", "nan"),
        ({"epochs": 0}, "epochs", "0"),
        ({"epochs": "many"}, "epochs", "'many'"),
        ({"lr": 0.0}, "lr", "0.0"),
        ({"lr": float("inf")}, "lr", "inf"),
        ({"lr": float("nan")}, "lr", "nan"),
        ({"batch_size": 0}, "batch_size", "0"),
        ({"hidden": [8, 0]}, "hidden.1", "0"),
        ({"validation_size": 1.0}, "validation_size", "1.0"),
        ({"test_size": 0.0}, "test_size", "0.0"),
        ({"tune": -1}, "tune", "-1"),
        ({"losses": "penex"}, "losses", "'penex'"),
        ({"losses": [3]}, "losses.0", "3"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], name: str, got: str) -> None:
    with pytest.raises(CompareError) as refusal:
        configure(**options)
    message = str(refusal.value)
    assert message.startswith(f"{named(name)}: Input should be ")
    assert message.endswith(f", got {got}")


def test_unknown_setting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("epoch: 3\n")
    with pytest.raises(
        CompareError,
        match=r"^epoch: unknown setting. Did you mean 'epochs'\? Known: data, .*epochs, ",
    ):
        configure(path)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([], r"^losses: expected at least one loss"),
        (
            ["penx"],
            r"^losses: no loss is called 'penx'; did you mean penex\? Known: cross-ent.*\.$",
        ),
        (
            ["hinge-of-doom"],
            r"^losses: no loss is called 'hinge-of-doom'\. Known: .*, penex, .*\.$",
        ),
        (["penex", "focal", "penex"], r"^losses: a loss is named twice in penex, focal, penex"),
        # The same loss written in two ways would get two rows with one label.
        (["penex=0.3", "penex=0.30"], r"^losses: a loss is named twice in penex=0.3, penex=0.30"),
        (["cross-entropy=1"], r"^losses: cross-entropy has no hyperparameter .* 'cross-entropy=1'"),
        (["penex=low"], r"^losses: expected penex=NUMBER \(sensitivity, .*\), got 'penex=low'$"),
        (["penex="], r"^losses: expected penex=NUMBER .*, got 'penex='$"),
        (["penex=0"], r"^losses: expected penex=NUMBER .*, got 'penex=0'$"),
        (["penex=nan"], r"^losses: expected penex=NUMBER .*, got 'penex=nan'$"),
        (["focal=inf"], r"^losses: expected focal=NUMBER \(gamma, .*, got 'focal=inf'$"),
        (["focal=-1"], r"^losses: expected focal=NUMBER .*, got 'focal=-1'$"),
        (["label-smoothing=1.01"], r"^losses: expected label-smoothing=NUMBER .*1.01'$"),
    ],
)
def test_invalid_losses_are_refused(losses: list[str], message: str) -> None:
    with pytest.raises(CompareError, match=message):
        configure(losses=losses)


@pytest.mark.parametrize(
    "names", [("drop", "keep"), ("group", "time"), ("text", "drop"), ("text", "keep")]
)
def test_a_column_cannot_have_two_uses(names: tuple[str, str]) -> None:
    values = {name: ["a"] if name in ("drop", "keep") else "b" for name in names}
    with pytest.raises(CompareError, match=f"^{names[0]} and {names[1]} exclude each other"):
        configure(**values)


def test_tuning_with_test_rows_of_each_seed_is_refused() -> None:
    with pytest.raises(
        CompareError, match=r"^test_split \(--test-split\): expected once with tuning, got per-seed"
    ):
        configure(tune=3, test_split="per-seed")
    with pytest.raises(CompareError, match=r"test_split \(--test-split\): expected once with time"):
        configure(time="day", test_split="per-seed")
    assert configure(time="day").shares_test_rows(())
    assert configure(test_split="per-seed").test_split == "per-seed"


@pytest.mark.parametrize(
    ("options", "given", "shared"),
    [
        ({}, (), False),
        ({}, ("validation",), False),
        ({"test_split": "per-seed"}, (), False),
        ({}, ("test",), True),
        ({"test_split": "per-seed"}, ("test",), True),
        ({"test_split": "once"}, (), True),
        ({"tune": 1}, (), True),
    ],
)
def test_when_all_seeds_share_their_test_rows(
    options: dict[str, Any], given: tuple[str, ...], shared: bool
) -> None:
    assert Config(**options).shares_test_rows(given) is shared


def test_one_loss_with_several_values() -> None:
    assert configure(losses=["penex", "penex=0.1", "penex=1e-3"]).losses == (
        "penex",
        "penex=0.1",
        "penex=1e-3",
    )


def test_values_that_differ_in_the_last_digit_are_different_losses() -> None:
    losses = ("penex=0.1234567", f"penex={np.nextafter(0.1234567, 1)}", "penex=0.123457")
    assert configure(losses=losses).losses == losses
    labels = [parse_loss(spec).label for spec in losses]
    assert labels[0] == "PENEX α=0.1234567"
    assert len(set(labels)) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- wine\n", r"should hold settings \(name: value\), got list"),
        (b"wine", r"should hold settings \(name: value\), got str"),
        (b"data: [wine\n", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
    ],
)
def test_files_without_settings_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    with pytest.raises(CompareError, match=message) as refusal:
        configure(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_unreadable_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CompareError, match="^config: cannot read .*: "):
        configure(tmp_path / name)


def test_an_unknown_metric_is_refused_before_training() -> None:
    with pytest.raises(CompareError, match="^metric: expected one of accuracy, .*, got 'speed'$"):
        configure(metric="speed")
