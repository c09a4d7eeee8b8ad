"""What a comparison is made of: validated once, written down, and the same on every restart."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, cast

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
from penex.compare.files import MAX_DEPTH, read_bytes
from penex.compare.registry import DEFAULT_LOSSES, parse_loss
from penex.compare.user_objects import OBJECT_NAME, import_object, registered
from penex.metrics import METRICS

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]

MAX_YAML_BYTES = 2**18
"""Of a file of settings (256 KiB)."""

MAIN = ""
"""The panel of a command's help that needs no title."""
DATA, MODEL, TRAINING, TUNING, REPORT, MACHINES = (
    "Data",
    "Model",
    "Training",
    "Tuning and selection",
    "Report",
    "Where runs are executed",
)
_DEFAULT = "the default itself"


class Shown(TypedDict, total=False):
    """How a setting is shown as an option of a command.

    Attributes:
        panel: Of the command's help; None: in files alone, there is no option.
        shown: The default in words; None: not shown.
        metavar: What stands for the value.
        least: The smallest value that is accepted.
        name: Of the option, where it is not that of the setting.
    """

    help: str
    panel: str | None
    shown: str | None
    metavar: str | None
    least: int | None
    name: str | None


def _shown(default: Any, **how: Any) -> Shown:
    if how.get("shown") == _DEFAULT:
        how["shown"] = _in_words(default)
    return cast("Shown", how)


def _in_words(default: Any) -> str | None:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return None if default is None else str(default)


def setting(
    default: Any,
    help: str,
    *,
    panel: str | None = MAIN,
    shown: str | None = _DEFAULT,
    metavar: str | None = None,
) -> Any:
    """A field of :class:`Config` and an option of the command; see :class:`Shown`."""
    how = _shown(default, help=help, panel=panel, shown=shown, metavar=metavar)
    return Field(default, description=help, json_schema_extra={"option": cast("Any", how)})


def place(
    default: Any,
    help: str,
    *,
    panel: str = MACHINES,
    shown: str | None = _DEFAULT,
    metavar: str | None = None,
    least: int | None = None,
    name: str | None = None,
) -> Any:
    """A field of :class:`Execution` and an option of the command; see :class:`Shown`."""
    how = _shown(
        default, help=help, panel=panel, shown=shown, metavar=metavar, least=least, name=name
    )
    return field(default=default, metadata=how)


class Config(BaseModel):
    """Everything that decides the numbers of a comparison, and nothing that does not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Data
    data: str = setting(
        "digits",
        "Table (.csv, .tsv, .xlsx, .parquet), folder of train.csv and test.csv, arrays (.npz), "
        "folder of images in a folder for each class, hub:OWNER/NAME for a data set of the Hugging "
        "Face hub, or one of digits, wine, breast_cancer, iris. Default: digits with 300 training "
        "rows.",
    )
    target: str | None = setting(None, "Column of a table that holds the class.")
    losses: tuple[str, ...] = setting(
        DEFAULT_LOSSES,
        f"Losses, separated by commas; penex=0.3 sets the hyperparameter, "
        "penex(penalty_mode=auto) any option, MODULE:NAME is a loss of your own. Known: "
        f"{', '.join(DEFAULT_LOSSES)} (the default), and for ablations others.",
        shown=None,
    )
    seeds: Annotated[int, Field(ge=1, le=1000)] = setting(
        5, "Runs per loss, each with its own split."
    )
    train_size: Positive | None = setting(
        None, "Training rows.", shown="all that validation and test leave"
    )
    label_noise: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0, "Share of the rows of --noise-parts whose label is replaced."
    )
    epochs: Positive = setting(100, "Passes over the training rows.")
    lr: PositiveFloat = setting(1e-3, "Learning rate.")
    batch_size: Positive = setting(64, "Rows per step.")
    tune: Annotated[int, Field(ge=0)] = setting(
        0,
        "First tune the learning rate and the hyperparameter of every loss, with N trials each.",
        metavar="N",
    )
    text: str | None = setting(
        None,
        "Column of a table that holds the text to classify; the other columns are left out.",
        panel=DATA,
    )
    drop: tuple[str, ...] | None = setting(
        None, "Columns of a table to leave out, separated by commas.", panel=DATA, shown="none"
    )
    keep: tuple[str, ...] | None = setting(
        None, "Columns of a table to use, separated by commas.", panel=DATA, shown="all"
    )
    group: str | None = setting(
        None,
        "Column of a table whose rows of one value (a patient, say) stay in one part. It is no "
        "feature.",
        panel=DATA,
    )
    time: str | None = setting(
        None,
        "Column of a table with dates or numbers by which the newest rows are the test, and the "
        "newest of the others validation. It is no feature.",
        panel=DATA,
    )
    validation_file: str | None = setting(
        None,
        "Table of validation rows, where DATA is a table.",
        panel=DATA,
        shown="they are drawn",
        metavar="FILE",
    )
    test_file: str | None = setting(
        None,
        "Table of test rows, where DATA is a table.",
        panel=DATA,
        shown="they are drawn",
        metavar="FILE",
    )
    classes: tuple[str, ...] | None = setting(
        None, "Classes to keep, separated by commas.", panel=DATA, shown="all"
    )
    min_class_rows: Positive | None = setting(
        None,
        "Leave out classes of fewer than N rows, which are refused where parts need more.",
        panel=DATA,
        shown="none",
        metavar="N",
    )
    data_dir: str | None = setting(
        None,
        "Folder with the files of the data set that DATA names, instead of a download.",
        panel=DATA,
    )
    parts: Literal["given", "test", "validation-as-test", "drawn"] = setting(
        "given",
        "Parts that the data comes with and that are used: all; the test part alone, validation "
        "being drawn from all other rows; the validation part as test, the real one (without "
        "labels, say) being left out; or none, all parts being drawn from all rows.",
        panel=DATA,
    )
    validation_size: Annotated[float, Field(gt=0, lt=1)] = setting(
        0.2, "Share of validation rows among training and validation rows.", panel=DATA
    )
    test_size: Annotated[float, Field(gt=0, lt=1)] = setting(
        0.25, "Share of test rows among all rows.", panel=DATA
    )
    test_split: Literal["per-seed", "once"] | None = setting(
        None,
        "Whether each seed draws its own test rows, or all share one draw; training and validation "
        "rows always differ. Tuning would otherwise have seen test rows of other seeds.",
        panel=DATA,
        shown="per-seed; with tuning, once",
    )
    noise_parts: Literal["training", "training+validation"] = setting(
        "training", "Parts with --label-noise. Test labels never have any.", panel=DATA
    )
    noise_classes: Literal["other", "uniform"] = setting(
        "other",
        "A replaced label is drawn from the other K - 1 classes; or from all K, including the true "
        "one, so that a share 1 / K of the replaced labels stays right.",
        panel=DATA,
    )
    image_size: Positive | None = setting(
        None,
        "Height and width to resize images to.",
        panel=DATA,
        shown="as they are, and all alike",
    )
    augment: tuple[Literal["flip", "crop", "resized-crop", "rotate"], ...] = setting(
        (),
        "Random changes to training images that keep the label, separated by commas: flip, crop, "
        "resized-crop, rotate.",
        panel=DATA,
        shown="none",
    )

    # Model
    model: str | None = setting(
        None,
        "mlp, convnet, vit, vit-b-16, transformer, timm:NAME, transformers:NAME, or your own "
        "MODULE:FUNCTION.",
        panel=MODEL,
        shown="mlp for numbers, convnet for images, transformer for text",
    )
    hidden: tuple[Positive, ...] = setting(
        (128, 128), "Widths of the hidden layers of mlp, separated by commas.", panel=MODEL
    )
    model_options: dict[str, JsonValue] = setting(
        {}, "What else can be set about the model.", panel=None
    )

    # Training
    lr_of: dict[str, PositiveFloat] = setting(
        {},
        "Learning rates of single losses, by their name in `losses`, in place of `lr`.",
        panel=None,
    )
    optimizer: Literal["adam", "adamw", "sgd"] = setting(
        "adam", "Which optimiser trains; sgd has momentum 0.9.", panel=TRAINING
    )
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = setting(
        0.0, "Weight decay of the optimiser.", panel=TRAINING
    )
    schedule: Literal["constant", "cosine"] = setting(
        "constant", "Course of the learning rate.", panel=TRAINING
    )
    warmup_epochs: Annotated[int, Field(ge=0)] = setting(
        0, "Epochs in which the learning rate rises from 0.", panel=TRAINING
    )
    gradient_scale: Literal["common", "own"] = setting(
        "common",
        "common: divide each loss by the scale of its gradient, so that learning rate, weight "
        "decay and clipping mean the same for all; own: losses as they are defined, as in the "
        "paper.",
        panel=TRAINING,
    )
    gradient_clip: PositiveFloat | None = setting(
        None,
        "Largest norm of the gradient of all parameters together.",
        panel=TRAINING,
        shown="any",
    )
    accumulate: Positive = setting(1, "Batches to an optimiser step.", panel=TRAINING)
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = setting(
        "32-true", "Numbers of the network's arithmetic.", panel=TRAINING
    )
    compile: bool = setting(False, "Compile the network by torch.compile.", panel=TRAINING)

    # Tuning and selection
    tune_lr: bool = setting(True, "Whether --tune includes the learning rate.", panel=TUNING)
    select: Literal["refined", "nll", "accuracy", "last"] = setting(
        "refined",
        "How an epoch is selected, by validation rows: the lowest NLL after temperature scaling, "
        "the lowest NLL, the highest accuracy, or the last epoch. Tuning minimises the same "
        'quantity (for "last", the NLL of the last epoch), and the recommendation is based on it.',
        panel=TUNING,
    )

    # Report
    metric: str = setting(
        "nll",
        "Test metric by which losses are ranked: nll, accuracy, balanced_accuracy, macro_f1, "
        "brier, ece, smooth_ece, aurc and others.",
        panel=REPORT,
        metavar="NAME",
    )
    min_difference: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = setting(
        None,
        "Smallest difference in --metric that matters.",
        panel=REPORT,
        shown="1 % of the value of cross-entropy; for metrics in percent 0.5 points",
    )

    @field_validator("losses")
    @classmethod
    def _known_losses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("expected at least one loss")
        losses = [parse_loss(spec) for spec in value]
        if len({each.label for each in losses}) < len(losses):
            raise ValueError(f"a loss is named twice in {', '.join(value)}")
        return tuple(each.spec for each in losses)

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, value: str) -> str:
        check_metric(value)
        return value

    @model_validator(mode="after")
    def _tuning_sees_no_test_rows(self) -> "Config":
        if self.tune and self.test_split == "per-seed":
            raise ValueError(
                f"{named('test_split')}: expected once with tuning, got per-seed: the rows on "
                "which seed 0 is tuned would be test rows of other seeds"
            )
        return self

    @model_validator(mode="after")
    def _columns_have_one_use(self) -> "Config":
        for one, other in (("drop", "keep"), ("group", "time"), ("text", "drop"), ("text", "keep")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{one} and {other} exclude each other; leave one of them out")
        if self.time is not None and self.test_split == "per-seed":
            raise ValueError(
                f"{named('test_split')}: expected once with time, got per-seed: the newest rows "
                "are the same for every seed"
            )
        return self

    def shares_test_rows(self, given: Collection[str]) -> bool:
        """Whether the test rows are the same for all seeds.

        Args:
            given: Names of the parts that the data set comes with, ``Dataset.official`` say.
        """
        once = self.test_split == "once" or self.time is not None
        return "test" in given or self.tune > 0 or once

    def settings(self) -> dict[str, Any]:
        """As plain values, for files, in which nothing says whose machine this is."""
        values = self.model_dump(mode="json")
        paths = ("data", "data_dir", "validation_file", "test_file")
        return values | {name: values[name] and portable_path(values[name]) for name in paths}

    def fixed(self) -> dict[str, Any]:
        """What all runs in one folder have in common.

        Losses and seeds may be added later, with learning rates of their own, and the report may
        change; the data is identified by its content, not by its path.
        """
        variable = {"losses", "lr_of", "seeds", "data", "data_dir", "target", "text"}
        variable |= {"drop", "keep", "group", "time", "min_class_rows"}
        variable |= {"validation_file", "test_file"}
        variable |= {"metric", "min_difference"}
        if not self.tune:
            variable.add("select")
        return self.model_dump(mode="json", exclude=variable)

    @property
    def user_objects(self) -> list[str]:
        """Names of the losses and the network that the user has defined."""
        named = (_loss_name(spec) for spec in self.losses)
        return [name for name in (*named, self.model) if name and registered(name) is not None]

    def lr_for(self, spec: str) -> float:
        """The learning rate of a loss, untuned."""
        return self.lr_of.get(spec, self.lr)


def portable_path(path: str) -> str:
    """A path for a file that may be given away; names of data sets stay as they are.

    Relative to the working directory if it is below, else to the home directory (``~``); only its
    last part if it is elsewhere.
    """
    whole = Path(path).expanduser()
    if not whole.is_absolute():
        return path
    for base, shown in ((Path.cwd(), Path()), (Path.home(), Path("~"))):
        if whole.is_relative_to(base):
            return str(shown / whole.relative_to(base))
    return whole.name


def check_metric(name: str) -> None:
    """Refuse a metric that does not exist.

    Raises:
        CompareError: `name` is none of :data:`penex.metrics.METRICS`.
    """
    if name not in METRICS:
        known = ", ".join(METRICS)
        raise CompareError(f"{named('metric')}: expected one of {known}, got {name!r}")


@dataclass(frozen=True)
class Execution:
    """Where and how runs are executed: nothing in it decides a number of a single-device run."""

    jobs: int | None = place(
        1,
        "Runs at a time.",
        panel=MAIN,
        least=1,
        shown="one for each core, one alone with a GPU; on Ray one for each GPU, else core",
    )
    tune_jobs: int = place(
        1,
        "Trials of one loss at a time; above 1, proposals depend on which ends first.",
        panel=TUNING,
        least=1,
    )
    storage: str | None = place(
        None,
        "URL where trials are kept: sqlite:///FILE, postgresql://..., journal:///FILE. Commands "
        "that name the same share them.",
        panel=TUNING,
        shown="a journal in the output folder",
        metavar="URL",
    )
    backend: Literal["local", "ray"] = place(
        "local", "Processes of this machine, or a Ray cluster."
    )
    address: str | None = place(
        None,
        "The Ray cluster's: auto on one of its machines, else HOST:PORT or ray://...",
        shown="one is started here",
    )
    devices: int = place(
        1,
        "Devices that share one run, on each machine; above 1 --strategy says how.",
        least=1,
        shown="1, or as torchrun has it",
    )
    nodes: int = place(
        1,
        "Machines that share one run, under torchrun.",
        least=1,
        shown="1, or as torchrun has it",
    )
    strategy: Literal["auto", "ddp", "fsdp"] = place("auto", "How devices share one run.")
    workers: int = place(0, "Processes that load data, for each run.", least=0)
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = place(
        (),
        "Also log to tensorboard, wandb or both, separated by a comma; curve.csv is kept anyway.",
        shown="no",
        name="logger",
    )


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
    # Only what the user names is imported, never what a received folder names.
    import_user_objects(values.get("losses"), values.get("model"))
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


def import_user_objects(losses: Any, model: Any = None) -> None:
    """Import the losses and the network that are named as ``MODULE:NAME``, and check the losses.

    Args:
        losses: Names of losses; anything else is ignored, to be refused by :class:`Config`.
        model: Name of a network, or None.

    Raises:
        CompareError: One cannot be imported, or a loss cannot be trained with.
    """
    if isinstance(model, str) and OBJECT_NAME.fullmatch(model):
        import_object(model, "model")
    for spec in losses if isinstance(losses, list | tuple) else ():
        name = _loss_name(str(spec))
        if OBJECT_NAME.fullmatch(name) or registered(name) is not None:
            from penex.compare.user_losses import check  # torch

            if registered(name) is None:
                import_object(name, "losses")
            check(parse_loss(str(spec)).loss)


def _check_nesting(text: str) -> None:
    """Refuse YAML that grows or nests without bound; before any of it is built."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if getattr(event, "anchor", None) is not None:  # of an alias too
            raise CompareError("anchors and aliases (& and *) are not supported; write values out")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise CompareError(f"values are nested more than {MAX_DEPTH} deep")


def _loss_name(spec: str) -> str:
    return re.split(r"[=(]", spec)[0].strip()


def _read(path: Path) -> dict[str, Any]:
    try:
        text = read_bytes(path, MAX_YAML_BYTES).decode()
        _check_nesting(text)
        values = yaml.safe_load(text)
    except OSError as error:
        raise CompareError(f"config: cannot read {path}: {error.strerror}") from None
    except CompareError as error:
        raise CompareError(f"config: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, no such date or number
        reason = " ".join(str(error).split())
        raise CompareError(f"config: {path} is not valid YAML: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise CompareError(
            f"config: {path} should hold settings (name: value), got {type(values).__name__}"
        )
    return {str(name): value for name, value in values.items()}
