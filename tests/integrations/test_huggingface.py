"""The Trainer of transformers with PENEX, on tiny models.

Run as a program, this is one rank of the test of data parallelism: see `train_one_rank`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset
from trainers import PLAIN, by_hand, make_args, parameters, two_ranks
from transformers import Trainer
from transformers.modeling_outputs import SequenceClassifierOutput

from penex.integrations.huggingface import PENEXLossFunc, PENEXTrainer, fold

CLASSES, LENGTH = 3, 7
WEIGHT = torch.tensor([0.4, 1.0, 2.1])
SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "num_labels": CLASSES,
}
TEXT = {"vocab_size": 20, "max_position_embeddings": 16, "pad_token_id": 0}


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, kind: str, number: int = 21, labelled: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randint(1, 20, (number, LENGTH), generator=generator)
        self.name = "input_ids"
        labels = (number, LENGTH) if kind == "token" else (number,)
        self.labels = torch.randint(CLASSES, labels, generator=generator)
        if kind == "token":  # unequal numbers in the rows, and none at all in one
            self.labels[torch.rand(labels, generator=generator) < 0.6] = -100
            self.labels[4] = -100
        if kind == "image":
            self.inputs = torch.randn(number, 3, 4, 4, generator=generator)
            self.name = "pixel_values"
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {self.name: self.inputs[index]}
        return row | {"labels": self.labels[index]} if self.labelled else row


def make_model(kind: str = "sequence", dropout: float = 0.0, **config: Any) -> Any:
    torch.manual_seed(3)
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if kind == "image":
        options = SMALL | drop | {"image_size": 4, "patch_size": 2} | config
        return transformers.ViTForImageClassification(transformers.ViTConfig(**options))
    head = {"sequence": "SequenceClassification", "token": "TokenClassification"}[kind]
    options = SMALL | TEXT | drop | config
    return getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**options))


def pairs(model: Any, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and the labels, of rows or of tokens."""
    name = "pixel_values" if inputs.is_floating_point() else "input_ids"
    return model(**{name: inputs}).logits.flatten(0, -2), labels.flatten()


# 1. Training.


@pytest.mark.parametrize(("batch", "steps"), [(8, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("mode", ["fixed", "running"])
@pytest.mark.parametrize("kind", ["sequence", "image", "token"])
def test_updates_are_those_of_whole_batches(
    kind: str, mode: str, batch: int, steps: int, tmp_path: Path
) -> None:
    data = Rows(kind)  # the last update of an epoch has 5 rows
    options: dict[str, Any] = {"sensitivity": 0.4, "weight": WEIGHT} if kind != "image" else {}
    smoothing = 0.2 if kind == "token" else 0.0
    ema = 0.3 if mode == "running" else 0.0
    expected, penalty = by_hand(
        make_model(kind), data, pairs, 8, 0.07, ema, label_smoothing=smoothing, **options
    )

    model = make_model(kind)
    args = make_args(tmp_path, batch, steps, label_smoothing_factor=smoothing, **PLAIN)
    trainer = PENEXTrainer(
        model, args, train_dataset=data, penalty_mode=mode, penalty=0.07, ema=0.3, **options
    )
    start = parameters(model)
    trainer.train()
    moved = (expected - start).abs().max().item()
    assert moved > 1e-3
    torch.testing.assert_close(parameters(model), expected, rtol=0, atol=1e-4 * moved)
    assert trainer.criterion.penalty.item() == pytest.approx(penalty, rel=1e-5)


def test_first_update_uses_the_estimates_of_its_micro_batches(tmp_path: Path) -> None:
    data = Rows("token", 8)
    model, other = make_model("token"), make_model("token")
    kept = (data.labels != -100).sum()
    for x, y in zip(data.inputs.split(2), data.labels.split(2), strict=True):
        logits = other(x).logits.flatten(0, -2)
        gradient = oracles.penex(logits, y.flatten(), reduction="sum").gradient
        logits.backward(gradient.float() / kept)
    with torch.no_grad():
        logits = model(data.inputs).logits.flatten(0, -2)
        expected = torch.cat([(p - 0.3 * p.grad).flatten() for p in other.parameters()])

    args = make_args(tmp_path, 2, 4, max_steps=1, **PLAIN)
    trainer = PENEXTrainer(model, args, train_dataset=data)
    assert trainer.criterion.penalty == 0
    trainer.train()
    torch.testing.assert_close(parameters(model), expected, rtol=0, atol=1e-6)
    joined = oracles.estimate_penalty(logits, data.labels.flatten())
    assert trainer.criterion.penalty.item() == pytest.approx(float(joined), rel=1e-5)


class Interrupt(transformers.TrainerCallback):
    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_update_is_forgotten(tmp_path: Path) -> None:
    data, model = Rows("sequence", 8), make_model()
    args = make_args(tmp_path, 2, 2, max_steps=1, **PLAIN)
    trainer = PENEXTrainer(model, args, train_dataset=data, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    with torch.no_grad():
        expected = oracles.estimate_penalty(model(data.inputs[:4]).logits, data.labels[:4])
    trainer.train()
    assert trainer.criterion.penalty.item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.gpu
def test_training_on_a_gpu(tmp_path: Path) -> None:
    data = Rows("token")
    options = {"weight": WEIGHT, "penalty_mode": "running", "penalty": 0.07, "ema": 0.3}
    expected, penalty = by_hand(make_model("token"), data, pairs, 8, 0.07, 0.3, weight=WEIGHT)
    args = make_args(tmp_path, 2, 4, use_cpu=False, **PLAIN)
    trainer = PENEXTrainer(make_model("token"), args, train_dataset=data, **options)
    trainer.train()
    torch.testing.assert_close(parameters(trainer.model).cpu(), expected, rtol=0, atol=1e-4)
    assert trainer.criterion.penalty.device == trainer.model.device
    assert trainer.criterion.penalty.item() == pytest.approx(penalty, rel=1e-4)


@pytest.mark.parametrize("mode", ["fixed", "running"])
def test_loss_func_in_the_stock_trainer(mode: str, tmp_path: Path) -> None:
    data = Rows("token")
    model = make_model("token")
    penalty = 0.07 if mode == "fixed" else None
    loss_func = PENEXLossFunc(sensitivity=0.4, penalty=penalty)
    args = make_args(tmp_path, 2, 4, **PLAIN)
    Trainer(model, args, train_dataset=data, compute_loss_func=loss_func).train()
    expected, _ = by_hand(make_model("token"), data, pairs, 8, 0.07, 0.0, sensitivity=0.4)
    got = parameters(model)
    if mode == "fixed":
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    else:  # it moves with each micro-batch
        assert loss_func.criterion.penalty.isfinite()
        assert got.isfinite().all()


def test_loss_func_without_a_count_has_the_mean_of_penex() -> None:
    logits, labels = torch.randn(4, LENGTH, CLASSES), torch.randint(CLASSES, (4, LENGTH))
    labels[:, ::3] = -100
    loss = PENEXLossFunc(0.3, weight=WEIGHT, penalty=0.2)({"logits": logits}, labels)
    rows = logits.flatten(0, 1), labels.flatten()
    expected = oracles.penex(*rows, sensitivity=0.3, weight=WEIGHT, penalty=0.2).value
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    nothing = PENEXLossFunc()({"logits": logits}, torch.full_like(labels, -100))
    assert nothing.item() == 0


def test_model_init_starts_the_penalty_anew(tmp_path: Path) -> None:
    trainer = PENEXTrainer(
        args=make_args(tmp_path, **PLAIN),
        model_init=lambda: make_model(),
        train_dataset=Rows("sequence"),
    )
    runs = []
    for _ in range(2):
        trainer.train()
        runs.append(torch.cat([parameters(trainer.model), trainer.criterion.penalty[None]]))
    assert torch.equal(*runs)


# 2. Evaluation and prediction.


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_predictions_are_calibrated_and_evaluation_leaves_no_trace(
    kind: str, tmp_path: Path
) -> None:
    data, seen = Rows(kind, 10), {}
    model = make_model(kind)

    def metrics(prediction: Any) -> dict[str, float]:
        seen["logits"] = torch.from_numpy(prediction.predictions)
        labels = torch.from_numpy(prediction.label_ids)
        nll = nn.functional.cross_entropy(seen["logits"].flatten(0, -2), labels.flatten())
        return {"nll": nll.item()}

    trainer = PENEXTrainer(
        model,
        make_args(tmp_path, per_device_eval_batch_size=10, **PLAIN),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=metrics,
        sensitivity=0.5,
        weight=WEIGHT,
    )
    trainer.train()
    penalty = trainer.criterion.penalty.clone()
    found = trainer.evaluate()
    with torch.no_grad():
        logits = model(data.inputs).logits
    rows = logits.flatten(0, -2), data.labels.flatten()
    options = {"sensitivity": 0.5, "weight": WEIGHT, "penalty": penalty.item()}
    assert found["eval_loss"] == pytest.approx(oracles.penex(*rows, **options).value.item())
    probabilities = trainer.criterion.predict_proba(rows[0])
    nll = nn.functional.nll_loss(probabilities.log(), rows[1])
    assert found["eval_nll"] == pytest.approx(nll.item(), rel=1e-5)
    torch.testing.assert_close(seen["logits"].softmax(-1).flatten(0, -2), probabilities)

    unlabelled = trainer.predict(Rows(kind, 10, labelled=False))
    assert unlabelled.label_ids is None
    np.testing.assert_allclose(unlabelled.predictions, 1.5 * logits.numpy(), rtol=1e-5, atol=1e-6)
    assert torch.equal(trainer.criterion.penalty, penalty)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [({"label_smoothing_factor": 0.2}, {}), ({}, {"huberization": 0.5})],
    ids=["label smoothing", "huberization"],
)
def test_probabilities_are_those_of_the_criterion(
    arguments: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    data, model = Rows("sequence", 5), make_model()
    trainer = PENEXTrainer(model, make_args(tmp_path, **arguments), sensitivity=0.5, **options)
    found = torch.from_numpy(trainer.predict(data).predictions).softmax(-1)
    with torch.no_grad():
        logits = model.eval()(data.inputs).logits
    torch.testing.assert_close(found, trainer.criterion.predict_proba(logits))
    assert not torch.allclose(found, (1.5 * logits).softmax(-1), rtol=1e-3)
    with pytest.raises(ValueError, match=r"expected none, as only the link of plain PENEX"):
        trainer.save_folded(tmp_path / "folded")


def test_only_the_logits_are_calibrated(tmp_path: Path) -> None:
    data = Rows("sequence", 5)
    model = make_model(output_hidden_states=True)
    logits, hidden = PENEXTrainer(model, make_args(tmp_path)).predict(data).predictions
    with torch.no_grad():
        outputs = model.eval()(data.inputs)
    np.testing.assert_allclose(logits, 1.1 * outputs.logits.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(hidden[0], outputs.hidden_states[0].numpy(), rtol=1e-5, atol=1e-6)


def test_mixed_precision_predicts_and_folds(tmp_path: Path) -> None:
    data, model = Rows("sequence"), make_model()
    trainer = PENEXTrainer(model, make_args(tmp_path, bf16=True), train_dataset=data)
    trainer.train()
    found = trainer.predict(data).predictions
    assert found.dtype == np.float32
    trainer.save_folded(tmp_path / "folded")
    loaded = type(model).from_pretrained(tmp_path / "folded")
    expected = 1.1 * make_plain(model)(data.inputs).logits
    torch.testing.assert_close(loaded(data.inputs).logits, expected)
    np.testing.assert_allclose(found, expected.detach(), atol=0.02)


def make_plain(model: Any) -> Any:
    """The model's weights in a model that no Trainer has touched."""
    plain = type(model)(model.config).eval()
    plain.load_state_dict(model.state_dict())
    return plain


# 3. Checkpoints.


def trained(folder: Path, resume: str | bool | None = None, **options: Any) -> PENEXTrainer:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "learning_rate": 1e-2} | (
        options
    )
    trainer = PENEXTrainer(
        make_model(dropout=0.2),
        make_args(folder, 2, 2, train_sampling_strategy="random", **options),
        train_dataset=Rows("sequence"),
        eval_dataset=Rows("sequence", 6),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_resuming_is_bitwise_training_on(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    first = trained(tmp_path / "parts", max_steps=2)
    assert (tmp_path / "parts" / "checkpoint-2").exists()
    for resume in (True, str(tmp_path / "whole" / "checkpoint-4")):
        rest = trained(tmp_path / "parts", resume=resume)
        assert torch.equal(parameters(rest.model), parameters(whole.model))
        assert torch.equal(rest.criterion.penalty, whole.criterion.penalty)
    assert not torch.equal(first.criterion.penalty, whole.criterion.penalty)
    whole.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "penex.json").read_text())
    assert saved == {"sensitivity": 0.1, "penalty": whole.criterion.penalty.item()}


def test_best_model_comes_with_its_penalty(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "learning_rate": 1.0}
    options["greater_is_better"] = True  # so that the first is the best
    last = trained(tmp_path / "last", **options)
    best = trained(tmp_path / "best", load_best_model_at_end=True, **options)
    folder = Path(best.state.best_model_checkpoint)
    assert folder.name == "checkpoint-2"
    kept = json.loads((folder / "penex.json").read_text())["penalty"]
    assert best.criterion.penalty.item() == kept != last.criterion.penalty.item()
    assert best.evaluate()["eval_loss"] == pytest.approx(best.state.best_metric, rel=1e-6)


def test_a_penalty_that_is_not_known_yet_is_saved_as_such(tmp_path: Path) -> None:
    trainer = PENEXTrainer(make_model(), make_args(tmp_path))
    trainer.save_model()
    assert json.loads((tmp_path / "penex.json").read_text())["penalty"] is None


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=2)
    checkpoint = tmp_path / "checkpoint-2"
    other = PENEXTrainer(
        make_model(), make_args(tmp_path), train_dataset=Rows("sequence"), sensitivity=0.3
    )
    with pytest.raises(ValueError, match=r"sensitivity 0\.1, its penalty means nothing to 0\.3"):
        other.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "penex.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"penex\.json does not exist"):
        trained(tmp_path, resume=True)


# 4. Folding.


def test_a_plain_pipeline_gives_the_probabilities_of_a_folded_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "a", "good", "bad", "film", "very", "not", "really", "was", "it"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]"
    )
    texts = ["a good film", "bad film it was not really good", "very very bad"]
    labels = [2, 1, 0]
    data = [dict(tokenizer(text), labels=k) for text, k in zip(texts, labels, strict=True)]
    model = make_model(id2label={0: "bad", 1: "fair", 2: "good"})
    trainer = PENEXTrainer(
        model,
        make_args(tmp_path, learning_rate=0.05, num_train_epochs=5),
        train_dataset=data,
        processing_class=tokenizer,
        sensitivity=1.0,
    )
    trainer.train()
    trainer.save_folded(tmp_path / "folded")
    expected = torch.from_numpy(trainer.predict(data).predictions).softmax(1)

    classify = transformers.pipeline("text-classification", str(tmp_path / "folded"), device="cpu")
    for text, row in zip(texts, expected, strict=True):
        found = {entry["label"]: entry["score"] for entry in classify(text, top_k=None)}
        assert found == pytest.approx(dict(zip(["bad", "fair", "good"], row.tolist(), strict=True)))
    flat = model.eval()(torch.tensor([data[0]["input_ids"]])).logits.softmax(1)
    assert (flat[0] - expected[0]).abs().max() > 0.02  # the factor matters here


ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "bert": ("BertForTokenClassification", SMALL | TEXT, None),
    "roberta": ("RobertaForSequenceClassification", SMALL | TEXT, None),
    "roberta by name": ("RobertaForSequenceClassification", SMALL | TEXT, "classifier.out_proj"),
    "distilbert": ("DistilBertForSequenceClassification", SMALL | TEXT | {"dim": 8}, None),
    "vit": ("ViTForImageClassification", SMALL | {"image_size": 4, "patch_size": 2}, None),
    "gpt2": (
        "GPT2ForSequenceClassification",
        TEXT | {"n_embd": 8, "n_layer": 1, "n_head": 2, "num_labels": CLASSES},
        None,
    ),
    "bart": (
        "BartForSequenceClassification",
        TEXT
        | {"d_model": 8, "num_labels": CLASSES, "eos_token_id": 19, "bos_token_id": 1}
        | {f"{side}_layers": 1 for side in ("encoder", "decoder")}
        | {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
        | {f"{side}_ffn_dim": 8 for side in ("encoder", "decoder")},
        None,
    ),
    "resnet": (
        "ResNetForImageClassification",
        {
            "embedding_size": 4,
            "hidden_sizes": [4, 4],
            "depths": [1, 1],
            "num_labels": CLASSES,
            "layer_type": "basic",
        },
        None,
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fold(name: str) -> None:
    architecture, options, layer = ARCHITECTURES[name]
    kind = getattr(transformers, architecture)
    torch.manual_seed(5)
    model = kind(kind.config_class(**options)).eval()
    if "Image" in architecture:
        inputs = torch.randn(2, 3, 8, 8) if name == "resnet" else torch.randn(2, 3, 4, 4)
    else:
        inputs = torch.cat([torch.randint(2, 19, (2, LENGTH)), torch.full((2, 1), 19)], 1)
    before = parameters(model)
    folded = fold(model, 0.5, layer)
    logits = model(inputs).logits
    assert logits.std() > 0.001
    torch.testing.assert_close(folded(inputs).logits, 1.5 * logits, rtol=1e-4, atol=1e-6)
    assert torch.equal(parameters(model), before)
    assert not hasattr(model.config, "penex_folded_sensitivity")


def test_folded_models_are_recognised(tmp_path: Path) -> None:
    folded = fold(make_model(), 0.5)
    folded.save_pretrained(tmp_path)
    loaded = type(folded).from_pretrained(tmp_path)
    assert loaded.config.penex_folded_sensitivity == 0.5
    for model in (folded, loaded):
        with pytest.raises(ValueError, match=r"folded, with sensitivity 0\.5"):
            fold(model, 0.5)
        with pytest.raises(ValueError, match=r"folded, with sensitivity 0\.5"):
            PENEXTrainer(model, make_args(tmp_path))


def test_what_cannot_be_folded() -> None:
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL | TEXT))
    with pytest.raises(ValueError, match="BertForMaskedLM to have one of classifier, .*got none"):
        fold(masked, 0.1)
    with pytest.raises(ValueError, match=r"'cls.predictions.decoder' are also bert\.embeddings"):
        fold(masked, 0.1, "cls.predictions.decoder")
    with pytest.raises(AttributeError, match="heads"):
        fold(make_model(), 0.1, "heads")
    with pytest.raises(ValueError, match="sensitivity"):
        fold(make_model(), -0.1)
    with pytest.raises(TypeError, match="expected a transformers.PreTrainedModel, got Linear"):
        fold(nn.Linear(2, 2), 0.1)


# 5. Refusals.


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"sensitivity": 0.0}, "sensitivity"),
        ({}, {"penalty": -1.0}, "penalty"),
        ({}, {"weight": torch.ones(CLASSES + 1)}, r"each of the model's 3 labels, got \(4,\)"),
        ({"problem_type": "regression"}, {}, "problem_type .* got 'regression'"),
        ({"problem_type": "multi_label_classification"}, {}, "got 'multi_label_classification'"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(
    config: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        PENEXTrainer(make_model(**config), make_args(tmp_path), **options)


def test_another_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="compute_loss_func"):
        PENEXTrainer(make_model(), make_args(tmp_path), compute_loss_func=PENEXLossFunc())
    for option in ({"reduction": "mean"}, {"ignore_index": 0}):
        with pytest.raises(TypeError, match=next(iter(option))):
            PENEXLossFunc(**option)


def test_several_devices_in_one_process_are_refused(tmp_path: Path) -> None:
    args = make_args(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="one process per device.* got n_gpu = 2"):
        PENEXTrainer(make_model(), args)
    outputs, labels = {"logits": torch.zeros(2, CLASSES)}, torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"one process per device.* got shape \(2, 1\)"):
        PENEXLossFunc()(outputs, labels, num_items_in_batch=torch.full((2, 1), 2))


def test_outputs_and_labels_that_are_refused() -> None:
    logits, labels = torch.zeros(2, CLASSES), torch.tensor([0, 1])
    causal = transformers.modeling_outputs.CausalLMOutputWithPast(logits=torch.zeros(2, 5, 9))
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        ({"last_hidden_state": logits}, labels, TypeError, "got .'last_hidden_state'"),
        ((logits,), labels, TypeError, "with logits, got tuple"),
        (causal, torch.ones(2, 5).long(), ValueError, "got CausalLMOutputWithPast"),
        ({"logits": logits}, None, ValueError, "got none"),
        ({"logits": logits}, torch.eye(CLASSES)[:2], ValueError, "class indices, got torch.float"),
        ({"logits": logits}, labels[:, None], ValueError, r"logits \(2, 3\) and labels \(2, 1\)"),
        ({"logits": logits[:, :1]}, labels, ValueError, r"K >= 2; got logits \(2, 1\)"),
        ({"logits": torch.zeros(2, 3, 4, 4)}, torch.zeros(2, 4, 4).long(), ValueError, "expected"),
    ]
    for outputs, target, error, message in cases:
        with pytest.raises(error, match=message):
            PENEXLossFunc()(outputs, target)
    with pytest.raises(IndexError, match="got 7"):
        PENEXLossFunc()(SequenceClassifierOutput(logits=logits), torch.tensor([0, 7]))


# 6. Data parallelism.


def in_parallel(folder: Path, batch: int, steps: int, **more: Any) -> PENEXTrainer:
    options: dict[str, Any] = {"weight": WEIGHT, "penalty_mode": "running", "penalty": 0.07}
    trainer = PENEXTrainer(
        make_model("token"),
        make_args(folder, batch, steps, **more, **PLAIN),
        train_dataset=Rows("token", 24),
        eval_dataset=Rows("token", 16),
        **options,
    )
    trainer.train()
    return trainer


def train_one_rank(folder: Path, rank: int) -> None:
    store = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    trainer = in_parallel(folder, batch=2, steps=2, ddp_backend="gloo")
    penalty = trainer.criterion.penalty.clone()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_folded(folder / "folded")
    torch.save([parameters(trainer.model), penalty, loss], folder / f"rank{rank}")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    with two_ranks(__file__, tmp_path):
        expected = in_parallel(tmp_path / "single", batch=8, steps=1)
    found = [torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in range(2)]
    data, model = Rows("token", 16), expected.model.eval()
    losses = []
    for x, y in zip(data.inputs.split(8), data.labels.split(8), strict=True):
        rows = model(x).logits.flatten(0, 1), y.flatten()
        options = {"weight": WEIGHT, "penalty": expected.criterion.penalty.item()}
        losses.append(oracles.penex(*rows, **options).value.item())
    for weights, penalty, loss in found:
        torch.testing.assert_close(weights, parameters(expected.model), rtol=0, atol=1e-5)
        torch.testing.assert_close(penalty, expected.criterion.penalty, rtol=1e-5, atol=0)
        assert loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert (tmp_path / "folded" / "model.safetensors").exists()


if __name__ == "__main__":
    train_one_rank(Path(sys.argv[3]), int(sys.argv[1]))
