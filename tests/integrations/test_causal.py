"""Causal language models in PENEXTrainer: the loss of the logits, without the logits.

Run as a program, this is one rank of the test of data parallelism: see `train_one_rank`.
"""

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

from penex.integrations.huggingface import PENEXLossFunc, PENEXTrainer, fold

WORDS, LENGTH = 20, 7
WEIGHT = torch.linspace(0.4, 2.1, WORDS)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # Its last layer has the weight of the embedding.
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 8, "n_layer": 2, "n_head": 2}),
    "llama": (
        "LlamaForCausalLM",
        {
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "tie_word_embeddings": False,
        },
    ),
}


class Texts(Dataset[dict[str, Tensor]]):
    """Token sequences whose ends are padding, one of them all of it."""

    def __init__(self, number: int = 21, labelled: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randint(1, WORDS, (number, LENGTH), generator=generator)
        lengths = torch.randint(2, LENGTH + 1, (number, 1), generator=generator)
        lengths[4] = 0
        self.labels = self.inputs.masked_fill(torch.arange(LENGTH) >= lengths, -100)
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"input_ids": self.inputs[index]}
        return row | {"labels": self.labels[index]} if self.labelled else row


def make_model(kind: str = "gpt2", **more: Any) -> Any:
    architecture, options = KINDS[kind]
    model = getattr(transformers, architecture)
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if kind == "gpt2" else {}
    tokens = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(3)
    return model(model.config_class(**options | drop | tokens | more))


def pairs(model: Any, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits at each token but the last, and the token that follows it."""
    return model(input_ids=inputs).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


# 1. Training.


@pytest.mark.parametrize(("batch", "steps"), [(8, 1), (1, 8)], ids=str)  # one text is all padding
@pytest.mark.parametrize("mode", ["fixed", "running"])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_those_of_the_logits_of_whole_batches(
    kind: str, mode: str, batch: int, steps: int, tmp_path: Path
) -> None:
    data = Texts()  # the last update of an epoch has 5 rows
    options: dict[str, Any] = {"sensitivity": 0.4, "weight": WEIGHT} if kind == "llama" else {}
    if mode == "fixed":
        options["huberization"] = 0.9
    ema = 0.3 if mode == "running" else 0.0
    expected, penalty = by_hand(make_model(kind), data, pairs, 8, 0.07, ema, **options)

    model = make_model(kind)
    trainer = PENEXTrainer(
        model,
        make_args(tmp_path, batch, steps, **PLAIN),
        train_dataset=data,
        penalty_mode=mode,
        penalty=0.07,
        ema=0.3,
        **options,
    )
    start = parameters(model)
    trainer.train()
    moved = (expected - start).abs().max().item()
    assert moved > 1e-3
    torch.testing.assert_close(parameters(model), expected, rtol=0, atol=1e-4 * moved)
    assert trainer.criterion.penalty.item() == pytest.approx(penalty, rel=1e-5)


def test_first_update_uses_the_estimates_of_its_micro_batches(tmp_path: Path) -> None:
    data, model, other = Texts(8), make_model(), make_model()
    kept = (data.labels[:, 1:] != -100).sum()
    for x, y in zip(data.inputs.split(2), data.labels.split(2), strict=True):
        logits, target = pairs(other, x, y)
        logits.backward(oracles.penex(logits, target, reduction="sum").gradient / kept)
    with torch.no_grad():
        logits, target = pairs(model, data.inputs, data.labels)
        expected = torch.cat([(p - 0.3 * p.grad).flatten() for p in other.parameters()])
    trainer = PENEXTrainer(
        model, make_args(tmp_path, 2, 4, max_steps=1, **PLAIN), train_dataset=data
    )
    trainer.train()
    torch.testing.assert_close(parameters(model), expected, rtol=0, atol=1e-6)
    joined = oracles.estimate_penalty(logits, target)
    assert trainer.criterion.penalty.item() == pytest.approx(float(joined), rel=1e-5)


@pytest.mark.parametrize("how", ["plain", "checkpointing", "bfloat16"])
def test_logits_are_made_for_one_token_of_each_text(how: str, tmp_path: Path) -> None:
    data, model, shapes = Texts(8), make_model("llama"), []
    if how == "checkpointing":
        new = hasattr(model, "activation_checkpointing_enable")
        getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_enable")()
    model.lm_head.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape)))
    args = make_args(tmp_path, 4, max_steps=2, bf16=how == "bfloat16", **PLAIN)
    trainer = PENEXTrainer(model, args, train_dataset=data, eval_dataset=data, penalty=0.07)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert len(shapes) == 3
    assert set(shapes) == {(4, 1, WORDS), (8, 1, WORDS)}
    plain = make_model("llama")
    by_hand(plain, data, pairs, 4, 0.07, 0.0, epochs=1)
    moved = (parameters(plain) - parameters(make_model("llama"))).abs().max().item()
    tolerance = 0.03 if how == "bfloat16" else 1e-4
    torch.testing.assert_close(parameters(model), parameters(plain), rtol=0, atol=tolerance * moved)
    value = oracles.penex(*pairs(plain, data.inputs, data.labels), penalty=0.07).value.item()
    assert loss == pytest.approx(value, rel=tolerance)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks it
def test_adapters_are_trained_and_nothing_else(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted(**more: Any) -> Any:
        torch.manual_seed(3)
        lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **more)
        return get_peft_model(make_model("llama"), lora)

    data, model = Texts(8), adapted(target_modules=["o_proj", "down_proj"])
    args = make_args(tmp_path, 4, **PLAIN)
    trainer = PENEXTrainer(model, args, train_dataset=data, penalty=0.07)
    trainer.train()
    plain = adapted(target_modules=["o_proj", "down_proj"])
    start = parameters(plain)
    expected, _ = by_hand(plain, data, pairs, 4, 0.07, 0.0)
    moved = (expected - start).abs().max().item()
    assert moved > 1e-4
    torch.testing.assert_close(parameters(model), expected, rtol=0, atol=1e-3 * moved)
    frozen = parameters(model.get_base_model().lm_head)
    assert torch.equal(frozen, parameters(make_model("llama").lm_head))

    last = adapted(target_modules=["o_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"its last layer, with no adapter.*got peft\."):
        PENEXTrainer(last, args)


# 2. Evaluation and prediction.


def test_predictions_are_calibrated_logits_of_all_tokens(tmp_path: Path) -> None:
    data, model, seen = Texts(10), make_model(), {}

    def metrics(prediction: Any) -> dict[str, float]:
        seen["logits"] = torch.from_numpy(prediction.predictions)
        rows = seen["logits"][:, :-1].flatten(0, 1)
        labels = torch.from_numpy(prediction.label_ids)[:, 1:].flatten()
        return {"nll": nn.functional.cross_entropy(rows, labels).item()}

    trainer = PENEXTrainer(
        model,
        make_args(tmp_path, per_device_eval_batch_size=10, **PLAIN),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=metrics,
        sensitivity=0.5,
    )
    trainer.train()
    penalty = trainer.criterion.penalty.clone()
    found = trainer.evaluate()
    with torch.no_grad():
        logits, target = pairs(model, data.inputs, data.labels)
    value = oracles.penex(logits, target, sensitivity=0.5, penalty=penalty.item()).value.item()
    assert found["eval_loss"] == pytest.approx(value, rel=1e-6)
    nll = nn.functional.nll_loss(trainer.criterion.predict_log_proba(logits), target)
    assert found["eval_nll"] == pytest.approx(nll.item(), rel=1e-5)
    torch.testing.assert_close(seen["logits"][:, :-1].flatten(0, 1), 1.5 * logits)
    assert torch.equal(trainer.criterion.penalty, penalty)

    unlabelled = trainer.predict(Texts(10, labelled=False)).predictions
    np.testing.assert_allclose(unlabelled, seen["logits"], rtol=1e-5, atol=1e-6)


def test_hidden_states_that_were_asked_for_are_returned(tmp_path: Path) -> None:
    data, model = Texts(5), make_model(output_hidden_states=True)
    logits, *others = PENEXTrainer(model, make_args(tmp_path)).predict(data).predictions
    hidden = model.eval()(data.inputs).hidden_states
    assert logits.shape == (5, LENGTH, WORDS)
    np.testing.assert_allclose(others[-1][-1], hidden[-1].detach(), rtol=1e-5, atol=1e-6)


def test_folding(tmp_path: Path) -> None:
    data, model = Texts(5), make_model("llama").eval()
    torch.testing.assert_close(
        fold(model, 0.5)(data.inputs).logits, 1.5 * model(data.inputs).logits
    )
    with pytest.raises(ValueError, match=r"'lm_head' are also transformer\.wte"):
        fold(make_model(), 0.5)


# 3. Refusals.


class Adapted(nn.Linear):
    """What stands where the last layer stood."""


def test_models_that_are_refused(tmp_path: Path) -> None:
    adapted = make_model("llama")
    adapted.lm_head = Adapted(8, WORDS)
    small = KINDS["llama"][1] | {"vocab_size": WORDS, "head_dim": 4, "num_key_value_heads": 2}
    capped = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**small))

    class Whole(transformers.GPT2LMHeadModel):
        def forward(self, input_ids: Tensor, **more: Any) -> Any:
            return super().forward(input_ids, **more)

    whole = Whole(make_model().config)
    cases = [
        (adapted, {}, "a torch.nn.Linear as its last layer.*got .*Adapted"),
        (capped, {}, r"caps its logits \(final_logit_softcapping = 30\.0\)"),
        (whole, {}, "forward of Whole to take logits_to_keep"),
        (make_model(), {"weight": torch.ones(3)}, r"the model's 20 labels, got \(3,\)"),
    ]
    for model, options, message in cases:
        with pytest.raises(ValueError, match=message):
            PENEXTrainer(model, make_args(tmp_path), **options)
    with pytest.raises(ValueError, match=r"label_smoothing_factor: expected 0.*got 0\.1"):
        PENEXTrainer(make_model(), make_args(tmp_path, label_smoothing_factor=0.1))


def test_logits_that_are_more_than_the_last_layer_are_noticed(tmp_path: Path) -> None:
    small = KINDS["llama"][1] | {"vocab_size": WORDS, "logit_scale": 0.5}
    model = transformers.CohereForCausalLM(transformers.CohereConfig(**small))
    trainer = PENEXTrainer(model, make_args(tmp_path), train_dataset=Texts())
    with pytest.raises(ValueError, match="its logits are not its last layer's output"):
        trainer.train()


def test_labels_that_are_refused(tmp_path: Path) -> None:
    trainer = PENEXTrainer(make_model(), make_args(tmp_path))
    inputs = Texts(5).inputs
    for labels, message in (
        (inputs[:, 1:], r"expected shape \(5, 7\).*got \(5, 6\)"),
        (inputs.float(), "class indices, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.compute_loss(trainer.model, {"input_ids": inputs, "labels": labels})
    labels = torch.full_like(inputs, 25)
    with pytest.raises(IndexError, match="got 25"):
        trainer.compute_loss(trainer.model, {"input_ids": inputs, "labels": labels})
    outputs = trainer.model(inputs)
    with pytest.raises(ValueError, match="for a causal language model use PENEXTrainer"):
        PENEXLossFunc()(outputs, inputs)


# 4. Data parallelism.


def in_parallel(folder: Path, batch: int, steps: int, **more: Any) -> PENEXTrainer:
    trainer = PENEXTrainer(
        make_model(),
        make_args(folder, batch, steps, **more, **PLAIN),
        train_dataset=Texts(24),
        penalty_mode="running",
        penalty=0.07,
    )
    trainer.train()
    return trainer


def train_one_rank(folder: Path, rank: int) -> None:
    store = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    trainer = in_parallel(folder, batch=2, steps=2, ddp_backend="gloo")
    torch.save([parameters(trainer.model), trainer.criterion.penalty], folder / f"rank{rank}")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    with two_ranks(__file__, tmp_path):
        expected = in_parallel(tmp_path / "single", batch=8, steps=1)
    found = [torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in range(2)]
    for weights, penalty in found:
        torch.testing.assert_close(weights, parameters(expected.model), rtol=0, atol=1e-5)
        torch.testing.assert_close(penalty, expected.criterion.penalty, rtol=1e-5, atol=0)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


if __name__ == "__main__":
    train_one_rank(Path(sys.argv[3]), int(sys.argv[1]))
