"""What a comparison is made of: validated once, written down, and the same on every restart."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from penex.compare.errors import CompareError
from penex.compare.registry import LOSSES, contender

Positive = Annotated[int, Field(gt=0)]


class Config(BaseModel):
    """Everything that decides the numbers of a comparison, and nothing that does not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = "digits"
    target: str | None = None
    losses: tuple[str, ...] = tuple(LOSSES)
    seeds: Annotated[int, Field(ge=1, le=1000)] = 5
    train_size: Positive | None = None
    validation_size: Annotated[float, Field(gt=0, lt=1)] = 0.2
    test_size: Annotated[float, Field(gt=0, lt=1)] = 0.25
    label_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    epochs: Positive = 100
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    batch_size: Positive = 64
    hidden: tuple[Positive, ...] = (128, 128)
    tune: Annotated[int, Field(ge=0)] = 0

    @field_validator("losses")
    @classmethod
    def _known_losses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("expected at least one loss")
        labels = [contender(spec).label for spec in value]
        if len(set(labels)) < len(labels):
            raise ValueError(f"a loss is named twice in {', '.join(value)}")
        return value

    def settings(self) -> dict[str, Any]:
        """As plain values, for files."""
        return self.model_dump(mode="json")

    def fixed(self) -> dict[str, Any]:
        """What all runs in one folder have in common.

        Losses and seeds may be added later; the data is known by its content, not by its path.
        """
        return self.model_dump(mode="json", exclude={"losses", "seeds", "data", "target"})


@dataclass(frozen=True)
class Task:
    """What one run needs to know besides the configuration and the data."""

    folder: Path
    spec: str
    seed: int
    lr: float
    knob: float
    """Value of the loss's hyperparameter; NaN if it has none."""


def configure(path: Path | None = None, **options: Any) -> Config:
    """Defaults, overridden by the YAML file at `path`, overridden by `options` that are not None.

    Raises:
        CompareError: The file cannot be read, or a setting is unknown or out of its range.
    """
    values = _read(path) if path is not None else {}
    values |= {name: value for name, value in options.items() if value is not None}
    if "data" not in values:
        # The demonstration: little data is where losses differ.
        values = {"train_size": 300} | values
    try:
        return Config(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"unknown setting; known: {', '.join(Config.model_fields)}"
        elif not message.startswith(name):
            message = f"{message}, got {first['input']!r}"
        raise CompareError(message if message.startswith(name) else f"{name}: {message}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompareError(f"config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CompareError(f"config: {path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise CompareError(
            f"config: {path} should hold settings (name: value), got {type(values).__name__}"
        )
    return {str(name): value for name, value in values.items()}
