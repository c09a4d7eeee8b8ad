"""The networks: their layers, their inputs, and what is refused."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_worker import numbers, pictures, sentences

from penex.compare import user_objects
from penex.compare.config import configure
from penex.compare.data.dataset import Dataset, Texts
from penex.compare.errors import CompareError
from penex.compare.models.choose import OPTIONS, resolve
from penex.compare.models.networks import ConvNet, TextTransformer, ViT, Vocabulary, mlp


def grey_arrays() -> Dataset:
    made = numbers()
    features = np.random.default_rng(0).normal(size=(150, 8, 12)).astype(np.float32)
    return Dataset("grey", features, made.target, made.classes, "grey")


def table() -> Dataset:
    made = numbers()
    assert isinstance(made.features, np.ndarray)
    return Dataset("table", pd.DataFrame(made.features), made.target, made.classes, "table")


def batch(dataset: Dataset, encoder: Any) -> Tensor:
    """Four rows as the network takes them."""
    features = dataset.features
    if isinstance(features, Texts):
        tokens = encoder(features.texts[:4])
        return nn.utils.rnn.pad_sequence([torch.from_numpy(t) for t in tokens], batch_first=True)
    if isinstance(features, np.ndarray):
        return torch.from_numpy(features[:4])
    assert not isinstance(features, pd.DataFrame)
    return (features.take(np.arange(4)).float() / 255 - 0.5) / 0.5


def heads_of(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


SMALL = {"dim": 16, "depth": 2, "heads": 2, "mlp": 32}
FITTING: list[tuple[Callable[[], Dataset], str | None, dict[str, Any]]] = [
    (numbers, None, {}),
    (numbers, "mlp", {}),
    (grey_arrays, "mlp", {}),
    (grey_arrays, "convnet", {}),
    (grey_arrays, "vit", SMALL),
    (pictures, None, {}),
    (pictures, "mlp", {}),
    (pictures, "convnet", {"deep_supervision": True}),
    (pictures, "vit", {}),
    (lambda: pictures(shape=(1, 16, 32)), "vit-b-16", SMALL),
    (sentences, None, {}),
    (sentences, "transformer", SMALL | {"max_length": 5, "vocabulary": 10}),
]


@pytest.mark.parametrize(
    ("make", "name", "options"), FITTING, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_every_parameter_has_a_gradient(
    make: Callable[[], Dataset], name: str | None, options: dict[str, Any]
) -> None:
    """Else DistributedDataParallel fails."""
    dataset = make()
    model, encoder = resolve(name, dataset, options=options).build(dataset.features, 5)
    inputs = batch(dataset, encoder)
    heads = heads_of(model.train()(inputs))
    assert {head.shape for head in heads} == {(4, 5)}
    assert len(heads) == (3 if options.get("deep_supervision") else 1)
    sum(F.cross_entropy(head, torch.arange(4)) for head in heads).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        if "dropout" not in parameter_name:
            assert parameter.grad.isfinite().all(), parameter_name
    with torch.no_grad():
        assert model.eval()(inputs).shape == (4, 5)


def test_the_defaults_of_each_kind() -> None:
    found = [resolve(None, d).name for d in (numbers(), table(), pictures(), sentences())]
    assert found == ["mlp", "mlp", "convnet", "transformer"]


# The paper's networks, layer by layer


@pytest.mark.parametrize(("side", "classes", "inputs"), [(32, 10, 2048), (64, 9, 8192)])
def test_the_convnet_has_the_papers_layers(side: int, classes: int, inputs: int) -> None:
    model = ConvNet((3, side, side), classes, dropout=0.5, deep_supervision=False)
    layers = [module for module in model.modules() if not list(module.children())]
    kinds = [type(layer).__name__ for layer in layers if not isinstance(layer, nn.ModuleList)]
    assert kinds == [
        *["Conv2d", "MaxPool2d", "ReLU"] * 3,  # ReLU first in the paper, see below
        *["Flatten", "Dropout", "Linear", "ReLU", "Linear"],
    ]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [32, 64, 128]
    assert {(layer.kernel_size, layer.padding) for layer in convolutions} == {((3, 3), (1, 1))}
    linear = [(x.in_features, x.out_features) for x in layers if isinstance(x, nn.Linear)]
    assert linear == [(inputs, 256), (256, classes)]
    expected = sum(
        9 * before * after + after for before, after in ((3, 32), (32, 64), (64, 128))
    ) + sum(before * after + after for before, after in ((inputs, 256), (256, classes)))
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("channels", [1, 3])
def test_the_convnet_equals_the_papers_network(channels: int) -> None:
    """Which has ReLU before pooling, and its images in the usual layout of memory."""
    torch.manual_seed(0)
    model = ConvNet((channels, 17, 11), 4, dropout=0.0, deep_supervision=False).double()
    blocks = [nn.Sequential(block[0], nn.ReLU(), nn.MaxPool2d(2)) for block in model.blocks]
    papers = nn.Sequential(*blocks, model.top)
    images = torch.randn(5, channels, 17, 11, dtype=torch.float64)
    outputs = [network(images) for network in (model, papers)]
    torch.testing.assert_close(*outputs)
    weights = list(model.parameters())
    gradients = [torch.autograd.grad(output.square().sum(), weights) for output in outputs]
    torch.testing.assert_close(*gradients)


def test_auxiliary_heads_are_used_in_training_only() -> None:
    torch.manual_seed(0)
    model = ConvNet((3, 9, 8), 4, dropout=0.0, deep_supervision=True)
    images = torch.randn(2, 3, 9, 8)
    *early, last = model(images)
    assert len(early) == 2
    torch.testing.assert_close(model.eval()(images), last)


def test_the_small_vit_is_the_papers() -> None:
    assert OPTIONS["vit"] == {
        "patch": 4, "dim": 128, "depth": 6, "heads": 4, "mlp": 512, "dropout": 0.1
    }  # fmt: skip
    model = ViT((3, 32, 32), 10, **OPTIONS["vit"])
    assert model.positions.shape == (1, 65, 128)
    assert len(model.encoder.layers) == 6
    layer = model.encoder.layers[0]
    assert layer.self_attn.num_heads == 4
    assert layer.self_attn.head_dim == 32
    assert layer.linear1.out_features == 512
    assert layer.norm_first
    # Not copies of each other, as torch leaves them.
    assert not torch.equal(layer.linear1.weight, model.encoder.layers[1].linear1.weight)


def test_vit_b_16_has_the_parameters_of_vit_b_16() -> None:
    with torch.device("meta"):
        model = ViT((3, 224, 224), 1000, **OPTIONS["vit-b-16"])
    assert sum(p.numel() for p in model.parameters()) == 86_567_656  # torchvision's count


def test_the_vit_against_its_definition() -> None:
    """Patches, attention and sublayers written out."""
    torch.manual_seed(0)
    options = {"patch": 2, "dim": 8, "depth": 2, "heads": 2, "mlp": 12, "dropout": 0.0}
    model = ViT((3, 4, 6), 3, **options).double()
    nn.init.normal_(model.first)
    for parameter in model.encoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    images = torch.randn(5, 3, 4, 6, dtype=torch.float64)
    squares = images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(5, 6, 12)
    x = squares @ model.patches.weight.reshape(8, 12).T + model.patches.bias
    x = torch.cat([model.first.expand(5, 1, 8), x], 1) + model.positions
    for layer in model.encoder.layers:
        inner = F.layer_norm(x, (8,), layer.norm1.weight, layer.norm1.bias, 1e-6)
        qkv = inner @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias
        q, k, v = (t.reshape(5, 7, 2, 4).transpose(1, 2) for t in qkv.chunk(3, -1))
        mixed = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
        out = layer.self_attn.out_proj
        x = x + mixed.transpose(1, 2).reshape(5, 7, 8) @ out.weight.T + out.bias
        inner = F.layer_norm(x, (8,), layer.norm2.weight, layer.norm2.bias, 1e-6)
        x = x + layer.linear2(F.gelu(layer.linear1(inner)))
    norm = model.encoder.norm
    expected = model.head(F.layer_norm(x, (8,), norm.weight, norm.bias, 1e-6)[:, 0])
    for mode in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(model.train(mode)(images), expected, rtol=1e-6, atol=1e-6)


# Text


def text_model(texts: list[str], **options: Any) -> tuple[TextTransformer, Vocabulary]:
    torch.manual_seed(0)
    made = SMALL | {"dropout": 0.0, "max_length": 6, "vocabulary": 100} | options
    data = Dataset("texts", Texts(texts), np.zeros(len(texts), np.int64), ("a",), "texts")
    model, encoder = resolve(None, data, options=made).build(texts, 3)
    assert isinstance(model, TextTransformer)
    assert isinstance(encoder, Vocabulary)
    return model, encoder


def test_the_vocabulary_comes_from_the_training_texts() -> None:
    texts = ["The cat, the CAT!", "a dog", "the dog ran"]
    vocabulary = Vocabulary.of_texts(texts, size=6, max_length=4)
    assert vocabulary.words == {"the": 2, "cat": 3, "dog": 4, "!": 5}
    assert len(vocabulary) == 6
    tokens = vocabulary(["the mouse ran!", "the " * 9, "", " \n"])
    assert [list(t) for t in tokens] == [[2, 1, 1, 5], [2, 2, 2, 2], [1], [1]]
    assert Vocabulary.of_texts(texts[::-1], size=6, max_length=4).words == vocabulary.words


def test_padding_changes_nothing() -> None:
    model, encoder = text_model(["one two three", "four"])
    alone, longer = (torch.from_numpy(t)[None] for t in encoder(["four", "one two three four"]))
    padded = torch.zeros(2, 6, dtype=torch.int64)
    padded[0, :1], padded[1, :4] = alone[0], longer[0]
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            both = model(padded)
            torch.testing.assert_close(both[:1], model(alone), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(both[1:], model(longer), rtol=1e-5, atol=1e-6)
            assert not torch.allclose(both[0], both[1])


def test_the_order_of_words_matters() -> None:
    model, encoder = text_model(["one two"])
    one, other = (torch.from_numpy(t)[None] for t in encoder(["one two", "two one"]))
    assert not torch.allclose(model(one), model(other))


# Models of others


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, which is on no path."""
    (tmp_path / "networks_of_mine.py").write_text(
        "from math import prod\n"
        "from torch import nn\n"
        "seen = []\n"
        "def small(input_shape, num_classes, *, width=3):\n"
        "    seen.append((input_shape, num_classes, width))\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), num_classes))\n"
        "def anything(input_shape, num_classes, **options): return 'a string'\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "networks_of_mine", raising=False)
    monkeypatch.setattr(user_objects, "_objects", {})
    return "networks_of_mine"


def imported(name: str) -> str:
    """The name of a network, which a user has given as a setting."""
    assert configure(model=name).model == name
    return name


def test_a_function_of_the_user(module: str) -> None:
    architecture = resolve(imported(f"{module}:small"), pictures(), options={"width": 7})
    model, encoder = architecture.build(pictures().features, 3)
    assert encoder is None
    assert sys.modules[module].seen == [((3, 8, 8), 3, 7)]
    assert model(batch(pictures(), None)).shape == (4, 3)
    resolve(f"{module}:small", sentences()).build(sentences().features, 3)
    shape, *_ = sys.modules[module].seen[-1]
    assert shape == (len(Vocabulary.of_texts(sentences().features.texts, size=9999, max_length=9)),)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("small", {"with": 3}, "unexpected keyword argument 'with'. Known: width."),
        ("nothing", {}, "networks_of_mine has no attribute nothing"),
        ("number", {}, "is int, expected a function"),
    ],
)
def test_a_function_that_does_not_fit(
    module: str, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CompareError) as refusal:
        resolve(imported(f"{module}:{name}"), pictures(), options=options)
    assert message in str(refusal.value)


def test_a_function_that_returns_something_else(module: str) -> None:
    with pytest.raises(CompareError, match="returned str, expected an nn.Module"):
        resolve(imported(f"{module}:anything"), numbers()).build(numbers().features, 3)


def test_a_missing_module_is_refused() -> None:
    with pytest.raises(CompareError, match="^model: cannot import no_such_module"):
        configure(model="no_such_module:model")


def test_a_function_is_imported_only_where_the_user_names_it(module: str) -> None:
    with pytest.raises(CompareError, match="networks_of_mine:small is user-defined"):
        resolve(f"{module}:small", numbers())
    assert module not in sys.modules


@pytest.fixture
def saved_vit(tmp_path: Path) -> str:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_labels=7,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    mean = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    ViTImageProcessor(**mean).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


def test_an_image_classifier_of_transformers(saved_vit: str) -> None:
    from transformers import ViTForImageClassification

    model, encoder = resolve(f"transformers:{saved_vit}", pictures()).build(pictures().features, 3)
    assert encoder is None
    peer = ViTForImageClassification.from_pretrained(saved_vit)
    trunk = model.model.vit.state_dict()
    assert all(torch.equal(trunk[key], value) for key, value in peer.vit.state_dict().items())
    images = batch(pictures(), None)
    assert model(images).shape == (4, 3)
    # It gets pixels as it knows them.
    pixels = (images * 0.5 + 0.5 - torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1)) / torch.tensor(
        [0.4, 0.5, 0.6]
    ).reshape(3, 1, 1)
    torch.testing.assert_close(
        model.eval()(images), model.model(pixels).logits, rtol=1e-4, atol=1e-5
    )
    F.cross_entropy(model.train()(images), torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None for p in model.parameters())
    # Grey pictures are repeated; others of another size or number of channels are refused.
    grey = pictures(shape=(1, 8, 8))
    assert resolve(f"transformers:{saved_vit}", grey).build(grey.features, 3)[0](
        batch(grey, None)
    ).shape == (4, 3)
    large = pictures(shape=(3, 16, 16))
    with pytest.raises(CompareError, match="takes pictures of 8 x 8, these have 16 x 16"):
        resolve(f"transformers:{saved_vit}", large).build(large.features, 3)
    fresh, _ = resolve(f"transformers:{saved_vit}", large, options={"pretrained": False}).build(
        large.features, 3
    )
    assert fresh(batch(large, None)).shape == (4, 3)


@pytest.fixture
def saved_bert(tmp_path: Path) -> str:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    words = [f"word{number}" for number in range(30)] + [f"topic{k}" for k in range(3)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "!", *words]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=10, num_labels=7,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def test_a_text_classifier_of_transformers(saved_bert: str) -> None:
    from transformers import AutoTokenizer

    dataset = sentences()
    assert isinstance(dataset.features, Texts)
    model, encoder = resolve(f"transformers:{saved_bert}", dataset).build(dataset.features, 3)
    assert encoder is not None
    texts = dataset.features.texts[:4]
    assert len({len(t) for t in encoder(texts)}) > 1
    assert max(len(t) for t in encoder(dataset.features.texts)) == 10  # as long as it can take
    peer = AutoTokenizer.from_pretrained(saved_bert)(
        texts, padding=True, truncation=True, max_length=10, return_tensors="pt"
    )
    inputs = batch(dataset, encoder)
    model.eval()
    torch.testing.assert_close(model(inputs), model.model(**peer).logits)
    F.cross_entropy(model.train()(inputs), torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None for p in model.parameters())
    short = resolve(f"transformers:{saved_bert}", dataset, options={"max_length": 4})
    _, encoder = short.build(dataset.features, 3)
    assert encoder is not None
    assert max(len(t) for t in encoder(texts)) == 4


def test_weights_that_could_carry_code_are_not_read(saved_bert: str) -> None:
    weights = Path(saved_bert) / "model.safetensors"
    torch.save({}, Path(saved_bert) / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(CompareError, match="^model: cannot load transformers:.*safetensors"):
        resolve(f"transformers:{saved_bert}", sentences()).build(sentences().features, 3)


def test_options_of_transformers_are_those_of_the_configuration(saved_bert: str) -> None:
    name = f"transformers:{saved_bert}"
    options = {"hidden_dropout_prob": 0.5}
    model, _ = resolve(name, sentences(), options=options).build(sentences().features, 3)
    assert model.model.config.hidden_dropout_prob == 0.5
    with pytest.raises(CompareError, match="has no option 'hiden_dropout_prob'.*Did you mean"):
        resolve(name, sentences(), options={"hiden_dropout_prob": 0.5}).build(
            sentences().features, 3
        )


def test_a_model_unknown_to_transformers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="^model: cannot load transformers:"):
        resolve(f"transformers:{tmp_path / 'nothing'}", pictures()).build(pictures().features, 3)


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_a_missing_timm_is_named() -> None:
    with pytest.raises(CompareError, match="^model: timm:resnet18 needs the package timm"):
        resolve("timm:resnet18", pictures()).build(pictures().features, 3)


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_timm() -> None:
    made = pictures(shape=(1, 32, 32))
    model, _ = resolve("timm:resnet10t", made).build(made.features, 3)
    assert model(batch(made, None)).shape == (4, 3)


# What is refused


@pytest.mark.parametrize(
    ("make", "name", "options", "message"),
    [
        (numbers, "mpl", {}, "no model is called 'mpl'. Did you mean 'mlp'? Known: mlp, convnet"),
        (numbers, "VIT", {}, "Did you mean 'vit'"),
        (numbers, "timm:", {}, "no model is called 'timm:'"),
        (sentences, "mlp", {}, "sentences holds text; expected transformer, transformers:NAME"),
        (sentences, "vit", {}, "sentences holds text"),
        (sentences, "timm:resnet18", {}, "timm:resnet18 classifies images, sentences holds text"),
        (numbers, "transformer", {}, "transformer classifies text, numbers holds numbers"),
        (pictures, "transformer", {}, "transformer classifies text, pictures holds images"),
        (numbers, "convnet", {}, "convnet classifies images, numbers holds numbers"),
        (table, "vit", {}, "vit classifies images, table holds numbers"),
        (table, "transformers:x", {}, "classifies images or text, table holds numbers"),
        (lambda: pictures(shape=(3, 7, 9)), "convnet", {}, "at least 8 x 8, pictures has 7 x 9"),
        (lambda: pictures(shape=(3, 8, 10)), "vit", {}, "multiples of 4, pictures has 8 x 10"),
        (pictures, "vit-b-16", {}, "multiples of 16, pictures has 8 x 8"),
        (pictures, "convnet", {"dropuot": 0.1}, "no option 'dropuot'. Did you mean 'dropout'?"),
        (pictures, "vit", {"layers": 3}, "Known: patch, dim, depth, heads, mlp, dropout."),
        (numbers, "mlp", {"hidden": 3}, "Known: none (its layers are set by hidden)."),
        (pictures, "convnet", {"dropout": 1}, "dropout: expected a number in [0, 1), got 1"),
        (pictures, "convnet", {"dropout": True}, "expected a number in [0, 1), got True"),
        (pictures, "convnet", {"deep_supervision": 1}, "expected true or false, got 1"),
        (pictures, "vit", {"depth": 0}, "depth: expected a whole number of at least 1, got 0"),
        (pictures, "vit", {"depth": 2.0}, "expected a whole number of at least 1, got 2.0"),
        (pictures, "vit", {"heads": 3}, "dim must be a multiple of heads, got 128 and 3"),
    ],
)
def test_refusals(
    make: Callable[[], Dataset], name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CompareError) as refusal:
        resolve(name, make(), options=options)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith(("model: ", "model_options: "))


def test_hidden_sets_the_layers_of_the_mlp() -> None:
    model, _ = resolve("mlp", numbers(), hidden=(4, 9)).build(numbers().features, 3)
    widths = [(x.in_features, x.out_features) for x in model if isinstance(x, nn.Linear)]
    assert widths == [(6, 4), (4, 9), (9, 3)]
    assert len(mlp((2, 3), 5, hidden=())) == 2
