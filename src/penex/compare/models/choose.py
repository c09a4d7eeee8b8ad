"""Which network goes with which data, and what can be set about it.

Names are checked, against the data and without torch, before anything is trained; torch and the
networks are imported when one is built.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from penex._extras import need
from penex.compare.data.dataset import Dataset, Features, Texts
from penex.compare.data.images import Images
from penex.compare.errors import CompareError, did_you_mean, named
from penex.compare.user_objects import OBJECT_NAME, require_object

if TYPE_CHECKING:
    from torch import nn

    from penex.compare.models.networks import Encoder

Kind = Literal["numbers", "images", "text"]

DEFAULT: dict[Kind, str] = {"numbers": "mlp", "images": "convnet", "text": "transformer"}
OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "convnet": {"dropout": 0.5, "deep_supervision": False},
    "vit": {"patch": 4, "dim": 128, "depth": 6, "heads": 4, "mlp": 512, "dropout": 0.1},
    "vit-b-16": {"patch": 16, "dim": 768, "depth": 12, "heads": 12, "mlp": 3072, "dropout": 0.0},
    "transformer": {
        "max_length": 128,
        "vocabulary": 20_000,
        "dim": 128,
        "depth": 2,
        "heads": 4,
        "mlp": 512,
        "dropout": 0.1,
    },
}
"""The networks of this package with their options and defaults."""
ELSEWHERE = ("timm:NAME", "transformers:NAME_OR_PATH", "MODULE:FUNCTION")


@dataclass(frozen=True)
class Architecture:
    """A kind of network that fits the data, with all its options.

    Attributes:
        name: As the user gave it, or the default.
        kind: Of the data.
        options: Of this package's networks all, of others those that were given.
    """

    name: str
    kind: Kind
    options: Mapping[str, Any]

    def build(
        self, train: Features | list[str], num_classes: int
    ) -> tuple["nn.Module", "Encoder | None"]:
        """The network with fresh weights, drawn from torch's global generator.

        Args:
            train: The training part's features; what is fitted to data is fitted to these.
            num_classes: Width of the logits.

        Returns:
            The network, and for text what turns texts into its input. Pictures come to it as
            float32 (n, C, H, W) in [-1, 1], numbers as float32 (n, ...), texts as int64 (n, L).
            In training it may return several logits, whose losses are added; the last are those
            that count.

        Raises:
            CompareError: The library that has it is missing, or refuses.
        """
        text = texts(train)
        if text is None:
            return self.network(row_shape(train), num_classes), None
        if self.name.startswith("transformers:"):
            _, _, name = self.name.partition(":")
            return _transformers_text(name, num_classes, dict(self.options))
        from penex.compare.models.networks import Vocabulary

        size, length = self.options.get("vocabulary", 20_000), self.max_length
        encoder = Vocabulary.of_texts(text, size=size, max_length=length)
        return self.network((len(encoder),), num_classes), encoder

    @property
    def max_length(self) -> int:
        """Most tokens of a text, where they are words."""
        return int(self.options.get("max_length", 128))

    def network(self, shape: tuple[int, ...], num_classes: int) -> "nn.Module":
        """The network alone, for rows of `shape`; of texts, (numbers of the vocabulary,).

        Raises:
            CompareError: As :meth:`build`.
        """
        from penex.compare.models import networks

        options = dict(self.options)
        if self.kind == "text":
            options.pop("vocabulary", None)
        source, _, rest = self.name.partition(":")
        if source == "transformers":
            return _transformers_image(rest, _pictured(shape), num_classes, options)
        if source == "timm":
            return _timm(rest, _pictured(shape), num_classes, options)
        if rest:
            return _of_user(self.name, shape, num_classes, options)
        if self.name == "mlp":
            return networks.mlp(shape, num_classes, **options)
        if self.name == "transformer":
            return networks.TextTransformer(shape[0], num_classes, **options)
        network = networks.ConvNet if self.name == "convnet" else networks.ViT
        return network(_pictured(shape), num_classes, **options)


def resolve(
    name: str | None,
    dataset: Dataset,
    *,
    hidden: Sequence[int] = (128, 128),
    options: Mapping[str, Any] | None = None,
) -> Architecture:
    """Check a model and its options against the data, without building it.

    Args:
        name: ``mlp``, ``convnet``, ``vit``, ``vit-b-16``, ``transformer``, ``timm:NAME``,
            ``transformers:NAME_OR_PATH`` or ``MODULE:FUNCTION``, which is called as
            ``function(input_shape, num_classes, **options)``; for text, ``input_shape`` is
            (vocabulary size,) and the network gets token numbers (n, L), 0 being padding. None:
            the default for this kind of data.
        dataset: What it is to classify.
        hidden: Widths of the layers of ``mlp``.
        options: What else can be set about the model.

    Raises:
        CompareError: There is no such model or option, or it does not fit the data.
    """
    kind = kind_of(dataset.features)
    name = DEFAULT[kind] if name is None else name
    options = dict(options or {})
    source, colon, rest = name.partition(":")
    if source in ("timm", "transformers") and rest:
        if kind == "numbers" or (kind == "text" and source == "timm"):
            raise _misfit(name, "classifies images" + " or text" * (source != "timm"), dataset)
        return Architecture(name, kind, options)
    if colon and OBJECT_NAME.fullmatch(name):
        function = _function(name)
        _check_call(function, name, options)
        return Architecture(name, kind, options)
    if name not in OPTIONS:
        raise CompareError(
            f"model: no model is called {name!r}.{did_you_mean(name, OPTIONS)} "
            f"Known: {', '.join((*OPTIONS, *ELSEWHERE))}."
        )
    options = _checked(name, options)
    if (name == "transformer") != (kind == "text"):
        raise _misfit(name, "classifies text" if name == "transformer" else "does not", dataset)
    if name == "mlp":
        return Architecture(name, kind, {"hidden": tuple(hidden)})
    if name != "transformer":
        _check_picture(name, dataset, options)
    return Architecture(name, kind, options)


def kind_of(features: Features) -> Kind:
    """What kind of data `features` are."""
    if isinstance(features, Images):
        return "images"
    return "text" if isinstance(features, Texts) else "numbers"


def texts(features: Features | list[str]) -> list[str] | None:
    """The texts themselves, if that is what `features` are."""
    if isinstance(features, Texts):
        return features.texts
    return features if isinstance(features, list) else None


def row_shape(features: Any) -> tuple[int, ...]:
    """The shape of one row of images or of an array."""
    return tuple(features.shape if isinstance(features, Images) else features.shape[1:])


def _pictured(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(C, H, W), of which grey pictures in arrays have no C."""
    return (1, *shape) if len(shape) == 2 else shape


def _misfit(name: str, what: str, dataset: Dataset) -> CompareError:
    kind = kind_of(dataset.features)
    fitting = {
        "numbers": "mlp",
        "images": "convnet, vit, vit-b-16, mlp, timm:NAME, transformers:NAME_OR_PATH",
        "text": "transformer, transformers:NAME_OR_PATH",
    }[kind]
    return CompareError(
        f"model: {name} {what}, {dataset.name} holds {kind}; expected {fitting} or MODULE:FUNCTION"
    )


def _check_picture(name: str, dataset: Dataset, options: Mapping[str, Any]) -> None:
    """Refuse what is not pictures, or pictures of a size that the network cannot take."""
    features = dataset.features
    shape = () if isinstance(features, pd.DataFrame | Texts) else _pictured(row_shape(features))
    if len(shape) != 3:
        raise _misfit(name, "classifies images", dataset)
    _, height, width = shape
    if name == "convnet" and min(height, width) < 8:
        raise CompareError(
            f"model: convnet halves pictures three times; expected at least 8 x 8, {dataset.name} "
            f"has {height} x {width}"
        )
    patch = options.get("patch", 1)
    if height % patch or width % patch:
        raise CompareError(
            f"model: {name} cuts pictures into squares of {patch} x {patch}; expected multiples "
            f"of {patch}, {dataset.name} has {height} x {width}. Set "
            f"{named('image_size')}, or patch in model_options."
        )


def _checked(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of one of this package's networks, the given ones checked."""
    known = OPTIONS[name]
    for option, value in given.items():
        if option not in known:
            names = ", ".join(known) or "none (its layers are set by hidden)"
            raise CompareError(
                f"model_options: {name} has no option {option!r}."
                f"{did_you_mean(option, known)} Known: {names}."
            )
        default = known[option]
        if isinstance(default, bool):
            right, expected = isinstance(value, bool), "true or false"
        elif isinstance(default, int):
            least = 3 if option == "vocabulary" else 1
            right = type(value) is int and value >= least
            expected = f"a whole number of at least {least}"
        else:
            right, expected = type(value) in (int, float) and 0 <= value < 1, "a number in [0, 1)"
        if not right:
            raise CompareError(f"model_options: {option}: expected {expected}, got {value!r}")
    options = {**known, **given}
    if options.get("dim", 0) % options.get("heads", 1):
        raise CompareError(
            f"model_options: dim must be a multiple of heads, got {options['dim']} and "
            f"{options['heads']}"
        )
    return options


def _function(name: str) -> Any:
    found = require_object(name, "model")
    if not callable(found):
        raise CompareError(f"model: {name} is {type(found).__name__}, expected a function")
    return found


def _check_call(function: Any, name: str, options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return
    parameters = list(signature.parameters.values())
    try:
        signature.bind((), 0, **options)
    except TypeError as error:
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        known = ", ".join(p.name for p in parameters[2:]) or "none"
        raise CompareError(
            f"model_options: {name} is called as function(input_shape, num_classes, **options): "
            f"{error}. Known: {'any' if takes_any else known}."
        ) from None


def _of_user(
    name: str, shape: tuple[int, ...], num_classes: int, options: dict[str, Any]
) -> "nn.Module":
    from torch import nn

    model = _function(name)(shape, num_classes, **options)
    if not isinstance(model, nn.Module):
        raise CompareError(f"model: {name} returned {type(model).__name__}, expected an nn.Module")
    return model


def _timm(
    name: str, shape: tuple[int, ...], num_classes: int, options: dict[str, Any]
) -> "nn.Module":
    """An image classifier of timm; with fresh weights unless ``pretrained`` is true."""
    if importlib.util.find_spec("timm") is None:
        raise CompareError(f"model: timm:{name} needs the package timm: pip install timm")
    timm: Any = importlib.import_module("timm")
    from penex.compare.models.networks import Foreign

    channels, height, width = shape
    if files := {"cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"} & {
        *options
    }:
        raise CompareError(f"model_options: timm:{name}: {min(files)} cannot be set")
    if not timm.is_model(name):
        known = timm.list_models()
        raise CompareError(f"model: timm has no model {name!r}.{did_you_mean(name, known)}")
    try:
        try:
            model = timm.create_model(
                name, num_classes=num_classes, in_chans=channels, img_size=(height, width),
                **options,
            )  # fmt: skip
        except TypeError as error:  # convolutions take any size, and no such argument
            if "img_size" not in str(error):
                raise
            model = timm.create_model(name, num_classes=num_classes, in_chans=channels, **options)
    except Exception as error:
        raise CompareError(f"model: timm cannot make {name} with {options}: {error}") from error
    mean, std = [0.5], [0.5]
    if options.get("pretrained"):
        mean, std = model.default_cfg["mean"], model.default_cfg["std"]
    if len(mean) != channels:  # timm has averaged or repeated the first layer's weights
        mean, std = [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels
    return Foreign(model, channels, mean, std)


def _transformers_image(
    name: str, shape: tuple[int, ...], num_classes: int, options: dict[str, Any]
) -> "nn.Module":
    from penex.compare.models.networks import Foreign

    model, config, pretrained = _transformers(
        name, "AutoModelForImageClassification", num_classes, options, shape
    )
    channels, height, width = shape
    expected = getattr(config, "image_size", None)
    size = (expected, expected) if isinstance(expected, int) else expected
    if size is not None and tuple(size) != (height, width):
        raise CompareError(
            f"model: transformers:{name} takes pictures of {size[0]} x {size[1]}, these have "
            f"{height} x {width}. Set {named('image_size')}."
        )
    takes = getattr(config, "num_channels", channels)
    if channels not in (1, takes):
        raise CompareError(
            f"model: transformers:{name} takes {takes} channels, these pictures have {channels}"
        )
    mean, std = [0.5], [0.5]
    if pretrained:
        transformers: Any = importlib.import_module("transformers")
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(
                name, trust_remote_code=False
            )
        except (OSError, ValueError):  # it comes without
            processor = None
        mean = getattr(processor, "image_mean", None) or mean
        std = getattr(processor, "image_std", None) or std
    return Foreign(model, takes, mean, std)


def _transformers_text(
    name: str, num_classes: int, options: dict[str, Any]
) -> tuple["nn.Module", "Encoder"]:
    from penex.compare.models.networks import ForeignText, Tokenizer

    max_length = options.pop("max_length", None)
    model, config, _ = _transformers(
        name, "AutoModelForSequenceClassification", num_classes, options, None
    )
    transformers: Any = importlib.import_module("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise CompareError(f"model: cannot load the tokenizer of {name}: {error}") from error
    most = [512, tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512)]
    longest = min(most) if max_length is None else max_length
    padding = next(
        (number for number in (tokenizer.pad_token_id, config.pad_token_id) if number is not None),
        0,
    )
    # Classifiers that read the last token find it by this number.
    config.pad_token_id = padding
    return ForeignText(model, padding), Tokenizer(tokenizer, longest)


def _transformers(
    name: str,
    auto: str,
    num_classes: int,
    options: dict[str, Any],
    shape: tuple[int, ...] | None,
) -> tuple["nn.Module", Any, bool]:
    """A classifier, its configuration, and whether its weights were read.

    They are unless ``pretrained`` is false, and from safetensors only, as other formats can carry
    code; every other option is one of the model's configuration.
    """
    need(f"transformers:{name}", "transformers", "transformers")
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pretrained = options.pop("pretrained", True)
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        unknown = [
            option
            for option in options
            if option.startswith("_") or callable(getattr(config, option, print))
        ]
        if unknown:
            known = sorted(set(vars(config)) - {"_name_or_path", "transformers_version"})
            raise CompareError(
                f"model_options: transformers:{name} has no option {unknown[0]!r}."
                f"{did_you_mean(unknown[0], known)} Known: pretrained, max_length (text), "
                f"{', '.join(name for name in known if not name.startswith('_'))}."
            )
        config.num_labels = num_classes
        for option, value in options.items():
            setattr(config, option, value)
        kind = getattr(transformers, auto)
        if pretrained:
            model = kind.from_pretrained(
                name, config=config, use_safetensors=True, trust_remote_code=False,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
        else:
            for option, value in zip(
                ("num_channels", "image_size"), shape[:2] if shape else (), strict=False
            ):
                if hasattr(config, option) and option not in options:
                    setattr(config, option, value)
            model = kind.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, CompareError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise CompareError(f"model: cannot load transformers:{name}: {reason}") from error
    return model.float(), config, bool(pretrained)
