r"""
Digits with wrong labels
========================

Handwritten digits, 300 of them for training and a fifth of those mislabelled: a plain PyTorch loop
with early stopping, probabilities and their evaluation, for PENEX and for cross-entropy with the
same initial weights and batches.
"""

import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import penex
from penex import metrics

torch.set_num_threads(1)  # quickest for a model as small as this
EPOCHS = 100

# %%
# Data
# ----
# The labels for validation and test stay correct. A wrong label is another class, drawn at random.


def digits(seed):
    """Inputs and labels for training, validation and test."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).float() / 16, torch.from_numpy(y)
    rest, test = train_test_split(
        np.arange(len(y)), test_size=450, random_state=seed, stratify=y
    )
    train, rest = train_test_split(
        rest, train_size=300, random_state=seed, stratify=y[rest]
    )
    validation, _ = train_test_split(
        rest, train_size=200, random_state=seed, stratify=y[rest]
    )
    rng = np.random.default_rng(seed)
    wrong = rng.choice(train, len(train) // 5, replace=False)
    y_noisy = y.clone()
    y_noisy[wrong] = (
        y[wrong] + torch.from_numpy(rng.integers(1, 10, len(wrong)))
    ) % 10
    return (
        (x[train], y_noisy[train]),
        (x[validation], y[validation]),
        (x[test], y[test]),
    )


# %%
# Training
# --------
# The loop compares the NLL of the probabilities on the validation rows, because the values of PENEX
# and cross-entropy are not comparable; ``log_proba`` comes from the criterion, which applies the
# factor :math:`1+\alpha`. The criterion has state, the running penalty: if you save checkpoints,
# include its ``state_dict()``.


def train(criterion, log_proba, data, seed):
    """Validation NLL by epoch; test log-probabilities of the best epoch, of the last."""
    (inputs, target), (validation, validation_target), (test, _) = data
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    curve, best = [], {}
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(target)).split(64):
            optimizer.zero_grad()
            criterion(model(inputs[batch]), target[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            curve.append(
                metrics.nll(log_proba(model(validation)), validation_target)
            )
        if curve[-1] == min(curve):
            best = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        last_epoch = log_proba(model(test))
        model.load_state_dict(best)
        return curve, log_proba(model(test)), last_epoch


# %%
# Five seeds, each with its own split, wrong labels, initial weights and batches.

runs = {"Cross-entropy": [], "PENEX": []}
labels = []
for seed in range(5):
    data = digits(seed)
    labels.append(data[2][1])
    criterion = torch.nn.CrossEntropyLoss()
    runs["Cross-entropy"].append(
        train(criterion, lambda f: f.log_softmax(1), data, seed)
    )
    criterion = penex.PENEX()
    runs["PENEX"].append(
        train(criterion, criterion.predict_log_proba, data, seed)
    )

# %%
# Validation NLL
# --------------
# Each thin line is a seed, with a dot at the epoch selected by early stopping.

colours = {"Cross-entropy": "#1a1d21", "PENEX": "#d55e00"}
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name, of_name in runs.items():
    curves = np.array([curve for curve, _, _ in of_name])
    epochs = np.arange(1, EPOCHS + 1)
    axes.plot(epochs, curves.T, color=colours[name], linewidth=0.5, alpha=0.4)
    axes.plot(
        epochs, curves.mean(0), color=colours[name], linewidth=1.8, label=name
    )
    axes.plot(
        curves.argmin(1) + 1,
        curves.min(1),
        "o",
        color=colours[name],
        markersize=4,
    )
axes.set(xlabel="Epoch", ylabel="Validation NLL", ylim=(0.4, 1.2))
axes.legend()
plt.show()

# %%
# Test
# ----
# ``penex.metrics`` takes the logits of the probabilities, and log-probabilities are such logits.
# Means over the seeds with their standard errors:

names = ("accuracy", "nll", "brier", "ece")
means = {}
print(
    " " * 20 + "".join(f"{metrics.METRICS[name].label:>14}" for name in names)
)
for kept, epoch in ((1, "best epoch"), (2, "last epoch")):
    for loss, of_loss in runs.items():
        scores = [
            metrics.evaluate(run[kept], target)
            for run, target in zip(of_loss, labels, strict=True)
        ]
        table = np.array([[score[name] for name in names] for score in scores])
        mean, error = table.mean(0), table.std(0, ddof=1) / np.sqrt(len(table))
        means[loss, epoch] = dict(zip(names, mean, strict=True))
        cells = (f"{m:.3f} ± {e:.3f}" for m, e in zip(mean, error, strict=True))
        print(
            f"{loss + ', ' + epoch[:4]:20}"
            + "".join(f"{cell:>14}" for cell in cells)
        )

# %%
# At the last epoch PENEX has fitted the wrong labels less than cross-entropy: its accuracy is
# higher and its NLL lower. Early stopping on clean rows helps cross-entropy more, and it becomes as
# good as PENEX or better. Both are underconfident, because a fifth of the training labels were
# wrong.

plain, ours = means["Cross-entropy", "last epoch"], means["PENEX", "last epoch"]
assert ours["nll"] < plain["nll"]
assert ours["accuracy"] > plain["accuracy"]
plain, ours = means["Cross-entropy", "best epoch"], means["PENEX", "best epoch"]
assert abs(ours["nll"] - plain["nll"]) < 0.05

# %%
# Reliability
# -----------
# All test rows of all seeds: accuracy against confidence. The size of a disc shows the number of
# rows. Above the diagonal the model is underconfident.

figure, panels = plt.subplots(
    1, 2, figsize=(7, 3.6), layout="constrained", sharey=True
)
for axes, kept, title in zip(
    panels, (1, 2), ("Best epoch", "Last epoch"), strict=True
):
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for name, of_name in runs.items():
        every = torch.cat([run[kept] for run in of_name])
        bins = metrics.reliability(every, torch.cat(labels), bins=10)
        share = bins.count / bins.count.sum()
        kept_bins = share > 0.005  # fewer rows say nothing
        points = bins.confidence[kept_bins], bins.accuracy[kept_bins]
        axes.plot(*points, color=colours[name], label=name)
        axes.scatter(
            *points, 300 * share[kept_bins], color=colours[name], alpha=0.6
        )
        right = every.argmax(1) == torch.cat(labels)
        assert every.exp().amax(1).mean() < right.double().mean()
    axes.set(title=title, xlabel="Confidence")
    axes.set(aspect="equal", xlim=(0, 1.03), ylim=(0, 1.03))
panels[0].set_ylabel("Accuracy")
panels[0].legend(loc="upper left")
plt.show()

# %%
# Five seeds at one setting are not a full comparison. ``penex compare`` runs one on your own data,
# with more losses, temperature scaling and, optionally, tuned learning rates.
