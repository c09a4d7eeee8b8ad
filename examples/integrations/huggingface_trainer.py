"""
A Hugging Face Trainer
======================

A script with a stock ``Trainer``, and what changes when its loss becomes PENEX: the class, and one
argument. The model and the texts are synthetic, so nothing is downloaded.
"""

# %%
# Texts on three topics. A sentence has two words of its topic among others, and sometimes those of
# another topic, so that no model can be certain.

import random
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from penex.integrations.huggingface import PENEXTrainer

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOPICS = {
    "food": ["bread", "soup", "oven", "spice", "plate", "taste", "lemon", "butter"],
    "sport": ["match", "goal", "coach", "team", "score", "race", "medal", "court"],
    "travel": ["train", "hotel", "border", "map", "coast", "ticket", "guide", "island"],
}
OTHERS = ["the", "a", "very", "of", "new", "long", "old", "again", "we", "had"]


def sentences(number: int, seed: int) -> tuple[list[str], list[int]]:
    draw = random.Random(seed)
    texts, labels = [], []
    for _ in range(number):
        label = draw.randrange(3)
        topic = list(TOPICS)[label if draw.random() < 0.7 else draw.randrange(3)]
        words = draw.choices(TOPICS[topic], k=2) + draw.choices(OTHERS, k=5)
        draw.shuffle(words)
        texts.append(" ".join(words))
        labels.append(label)
    return texts, labels


# %%
# A tokenizer of whole words, and a small BERT.

words = ["[PAD]", "[UNK]", *OTHERS, *(word for topic in TOPICS.values() for word in topic)]
backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]"
)


def dataset(number: int, seed: int) -> list[dict[str, object]]:
    texts, labels = sentences(number, seed)
    return [dict(tokenizer(text), labels=label) for text, label in zip(texts, labels, strict=True)]


def make_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
            id2label=dict(enumerate(TOPICS)),
        )
    )


# %%
# The metrics are those of the probabilities. ``eval_loss`` would be another quantity for each loss.


def metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
    logits, labels = map(torch.from_numpy, (prediction.predictions, prediction.label_ids))
    accuracy = (logits.argmax(1) == labels).double().mean()
    return {"accuracy": accuracy.item(), "nll": cross_entropy(logits, labels).item()}


scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
args = TrainingArguments(
    str(folder / "run"),
    num_train_epochs=10,
    per_device_train_batch_size=16,
    learning_rate=5e-3,
    save_strategy="no",
    logging_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)
common = {
    "args": args,
    "train_dataset": dataset(300, seed=1),
    "eval_dataset": dataset(1000, seed=2),
    "processing_class": tokenizer,
    "compute_metrics": metrics,
}

# %%
# Before: the model's own loss, cross-entropy.


def report(trainer: Trainer) -> None:
    trainer.train()
    found = trainer.evaluate()
    print(f"accuracy {found['eval_accuracy']:.3f}, NLL {found['eval_nll']:.3f}")


report(Trainer(make_model(), **common))

# %%
# After. ``compute_metrics`` receives logits whose softmax is correct: the factor :math:`1+\alpha`
# is already applied. (One untuned run of each is not a comparison of the losses.)

trainer = PENEXTrainer(make_model(), sensitivity=0.1, **common)
report(trainer)

# %%
# For deployment the factor goes into the weights of the last layer. A standard pipeline then
# returns correct probabilities.

trainer.save_folded(folder / "folded")
classify = transformers.pipeline("text-classification", str(folder / "folded"), device="cpu")

text = "we had a new goal ticket again"
for entry in classify(text, top_k=None):
    print(f"{entry['label']:7} {entry['score']:.3f}")

expected = torch.from_numpy(trainer.predict([dict(tokenizer(text))]).predictions).softmax(1)
found = {entry["label"]: entry["score"] for entry in classify(text, top_k=None)}
assert torch.allclose(torch.tensor([found[topic] for topic in TOPICS]), expected[0])

scratch.cleanup()
