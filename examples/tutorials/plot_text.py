r"""
Classifying short texts
=======================

A small network on TF-IDF features learns to tell what a question asks for: the six classes of the
TREC data set, with 60 questions to learn from. They are made here from templates, so nothing is
downloaded.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import nn

import penex
from penex import metrics

torch.set_num_threads(1)  # whatever the number of cores

# %%
# Questions
# ---------
# A word does not give the class away: "What is ..." may ask for anything.

CLASSES = (
    "abbreviation",
    "description",
    "entity",
    "human",
    "location",
    "number",
)
TEMPLATES = {
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
MORE = {
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


def questions(rng):
    """Ten questions of each class to learn from and twelve for test, with their labels."""
    train, test = [], []
    for name in CLASSES:
        made = [
            each.format(what)
            for patterns, fillings in (TEMPLATES[name], MORE[name])
            for each in patterns.split("|")
            for what in fillings.split("|")
        ]
        chosen = rng.choice(made, 22, replace=False).tolist()
        train += chosen[:10]
        test += chosen[10:]
    labels = torch.arange(len(CLASSES))
    return (
        (train, labels.repeat_interleave(10)),
        (test, labels.repeat_interleave(12)),
    )


# %%
# Training
# --------
# Words and pairs of words are weighted on the training questions. Only the criterion differs.

(texts, target), (unseen, expected) = questions(np.random.default_rng(0))
print(
    *(f"{CLASSES[expected[row]]:14}{unseen[row]}" for row in range(0, 72, 8)),
    sep="\n",
)
vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+")
vectorizer.fit(texts)
EPOCHS = 30


def features(texts):
    """Of texts, a row each."""
    return torch.from_numpy(
        vectorizer.transform(texts).toarray().astype("float32")
    )


def train(criterion, log_proba):
    """The network, and log-probabilities of the test questions after every epoch."""
    torch.manual_seed(0)
    x = features(texts)
    model = nn.Sequential(
        nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, len(CLASSES))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(16):
            optimizer.zero_grad()
            criterion(model(x[batch]), target[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            history.append(log_proba(model(features(unseen))))
    return model, history


criterion = penex.PENEX()
_, plain = train(nn.CrossEntropyLoss(), lambda f: f.log_softmax(1))
model, ours = train(criterion, criterion.predict_log_proba)

# %%
# Test questions
# --------------
# The NLL of uniform probabilities is the dotted line.

histories = {"Cross-entropy": plain, "PENEX": ours}
figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for (name, history), colour in zip(
    histories.items(), ("#1a1d21", "#d55e00"), strict=True
):
    scores = [metrics.evaluate(each, expected) for each in history]
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
# Either loss gets far with sixty questions. One run and a few test questions are no ground to
# choose between them; compare them on your own texts with
# ``penex compare questions.csv --text question --target intent``.

# %%
# Ask it
# ------
# For use elsewhere, the factor :math:`1+\alpha` can be written into the last layer. After that the
# plain softmax of the network gives its probabilities.

asked = [
    "What does the A in USA mean ?",
    "How do magnets work ?",
    "What fish is served cold ?",
    "Who painted the ceiling ?",
    "Where do penguins live ?",
    "How many planets are there ?",
]
with torch.no_grad():
    wanted = criterion.predict_proba(model(features(asked)))
    penex.inference.fold_temperature(model[-1], criterion.sensitivity)
    probabilities = model(features(asked)).softmax(1)
torch.testing.assert_close(probabilities, wanted)
right = probabilities.argmax(1) == torch.arange(
    len(CLASSES)
)  # one question of each class
print(f"{right.sum()} of {len(asked)} right")

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.imshow(
    probabilities.numpy(), cmap="Oranges", vmin=0, vmax=1.2, aspect="auto"
)
for (row, column), value in np.ndenumerate(probabilities.numpy()):
    axes.text(column, row, f"{value:.2f}", ha="center", va="center")
axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=20)
axes.set_yticks(range(len(asked)), asked)
axes.grid(visible=False)
# sphinx_gallery_thumbnail_number = 2
plt.show()
