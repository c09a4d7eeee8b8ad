"""What a comparison is made of: validated once, written down, and the same on every restart."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from penex.compare.errors import CompareError, did_you_mean, named
from penex.compare.registry import DEFAULT_LOSSES, contender

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Config(BaseModel):
    """Everything that decides the numbers of a comparison, and nothing that does not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Data
    data: str = "digits"
    data_dir: str | None = None
    """Folder with the Parquet files of the data set that `data` names on the hub."""
    target: str | None = None
    text: str | None = None
    """Column of a table that holds the text to classify; the other columns are left out."""
    classes: tuple[str, ...] | None = None
    """Names of the classes to keep."""
    parts: Literal["given", "test", "validation-as-test", "drawn"] = "given"
    """Which parts that the data comes with are used: all; the test part alone, validation being
    drawn from all other rows; the validation part as test, the real one (without labels, say)
    being left out; none, all parts being drawn from all rows."""
    train_size: Positive | None = None
    validation_size: Annotated[float, Field(gt=0, lt=1)] = 0.2
    test_size: Annotated[float, Field(gt=0, lt=1)] = 0.25
    test_split: Literal["per-seed", "once"] | None = None
    """Whether test rows that are drawn differ between seeds or are the same for all; training and
    validation rows always differ. None: per seed, but once with tuning, which would otherwise have
    seen test rows of other seeds."""
    label_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the rows of `noise_parts` whose label is replaced."""
    noise_parts: Literal["training", "training+validation"] = "training"
    """The parts with label noise. Test labels never have any."""
    noise_classes: Literal["other", "uniform"] = "other"
    """The new label: drawn from the other K - 1 classes, or from all K including the true one, so
    that a share 1 / K of the replaced labels stays right."""
    image_size: Positive | None = None
    """Images are resized to this height and width; None: as they come, and all alike."""
    augment: tuple[Literal["flip", "crop", "resized-crop", "rotate"], ...] = ()
    """Random changes to training images that keep the label."""

    # Model
    model: str | None = None
    """None: mlp for numbers, convnet for images, transformer for text."""
    hidden: tuple[Positive, ...] = (128, 128)
    model_options: dict[str, JsonValue] = {}

    # Training
    losses: tuple[str, ...] = DEFAULT_LOSSES
    seeds: Annotated[int, Field(ge=1, le=1000)] = 5
    epochs: Positive = 100
    lr: PositiveFloat = 1e-3
    lr_of: dict[str, PositiveFloat] = {}
    """Learning rates of single losses, by their name in `losses`, in place of `lr`."""
    batch_size: Positive = 64
    accumulate: Positive = 1
    """Batches to an optimiser step."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """sgd has momentum 0.9."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    gradient_clip: PositiveFloat | None = None
    """Largest norm of the gradient of all parameters together."""
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    compile: bool = False
    gradient_scale: Literal["common", "own"] = "common"
    """common: every loss is divided by the scale of its gradient, so that learning rate, weight
    decay and clipping mean the same for all of them. own: losses as they are defined, as in the
    paper."""

    # Tuning and selection
    tune: Annotated[int, Field(ge=0)] = 0
    tune_lr: bool = True
    select: Literal["refined", "nll", "accuracy", "last"] = "refined"
    """How an epoch is selected, by validation rows: the lowest NLL after temperature scaling, the
    lowest NLL, the highest accuracy, or the last epoch. Tuning minimises the same quantity (for
    "last", the NLL of the last epoch), and the recommendation is based on it."""

    # Report
    metric: str = "nll"
    """The metric by which losses are ranked, one of :data:`penex.metrics.METRICS`."""
    min_difference: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """The smallest difference in `metric` that matters. None: 1 % of the value of cross-entropy,
    or 0.5 percentage points of a metric shown in percent."""

    @field_validator("losses")
    @classmethod
    def _known_losses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("expected at least one loss")
        labels = [contender(spec).label for spec in value]
        if len(set(labels)) < len(labels):
            raise ValueError(f"a loss is named twice in {', '.join(value)}")
        return value

    @model_validator(mode="after")
    def _tuning_sees_no_test_rows(self) -> "Config":
        if self.tune and self.test_split == "per-seed":
            raise ValueError(
                f"{named('test_split')}: expected once with tuning, got per-seed: the rows on "
                "which seed 0 is tuned would be test rows of other seeds"
            )
        return self

    def shares_test_rows(self, given: Collection[str]) -> bool:
        """Whether the test rows are the same for all seeds.

        Args:
            given: Names of the parts that the data set comes with, ``Dataset.official`` say.
        """
        return "test" in given or self.tune > 0 or self.test_split == "once"

    def settings(self) -> dict[str, Any]:
        """As plain values, for files."""
        return self.model_dump(mode="json")

    def fixed(self) -> dict[str, Any]:
        """What all runs in one folder have in common.

        Losses and seeds may be added later, with learning rates of their own, and the report may
        change; the data is identified by its content, not by its path.
        """
        variable = {"losses", "lr_of", "seeds", "data", "data_dir", "target", "text"}
        variable |= {"metric", "min_difference"}
        if not self.tune:
            variable.add("select")
        return self.model_dump(mode="json", exclude=variable)

    def lr_for(self, spec: str) -> float:
        """The learning rate of a loss, untuned."""
        return self.lr_of.get(spec, self.lr)


@dataclass(frozen=True)
class Execution:
    """Where and how runs are executed: nothing in it decides a number of a single-device run."""

    jobs: int | None = 1
    """Runs at a time; None: one for each core of this machine, one alone if it has a GPU, or as
    many as there are GPUs (else cores) on the Ray cluster."""
    backend: Literal["local", "ray"] = "local"
    address: str | None = None
    """Of the Ray cluster; None: one started on this machine."""
    devices: int = 1
    """Devices that share one run, on each of `nodes` machines; above 1 needs `strategy`."""
    nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    workers: int = 0
    """Processes that load data, for each run."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Besides curve.csv, which is always written."""
    storage: str | None = None
    """URL of the Optuna storage; None: a journal file in the output folder."""
    tune_jobs: int = 1
    """Trials of one loss at a time; above 1, what is proposed depends on which one ends first."""


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
        head, *rest = first["loc"] or [""]
        name = ".".join([named(str(head)), *map(str, rest)])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = Config.model_fields
            message = f"unknown setting.{did_you_mean(name, known)} Known: {', '.join(known)}"
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
