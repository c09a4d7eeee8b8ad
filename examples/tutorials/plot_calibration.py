r"""
Calibration and the factor 1 + α
================================

A network trained with PENEX predicts :math:`\operatorname{softmax}((1+\alpha) f)`. Plain softmax
predicts the same classes, but with too little confidence. This page shows the effect on
data whose true probabilities are known, and how it relates to temperature scaling.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import penex
from penex import metrics

torch.set_num_threads(1)  # quickest for a model as small as this
CLASSES, FEATURES, EPOCHS, ALPHA = 5, 10, 60, 0.5

# %%
# Data
# ----
# Five overlapping Gaussians with unit covariance. Their log-densities are the logits of the true
# probabilities, so the best NLL that any model can have is known.

rng = np.random.default_rng(0)
centres = 0.6 * rng.standard_normal((CLASSES, FEATURES))


def draw(rows):
    """Inputs and labels."""
    y = rng.integers(CLASSES, size=rows)
    x = centres[y] + rng.standard_normal((rows, FEATURES))
    return torch.from_numpy(x).float(), torch.from_numpy(y)


train, validation, test = draw(1000), draw(1000), draw(20_000)
true = -((test[0][:, None] - torch.from_numpy(centres)) ** 2).sum(2) / 2

# %%
# Training
# --------
# The logits of validation and test are kept from two epochs: the one with the best validation NLL
# of the probabilities, and the last, when the network has overfitted.


def fit(criterion, scale):
    """Logits of validation and test at the "best" epoch and the "last"."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, CLASSES),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    saved, lowest = {}, float("inf")
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(train[1])).split(50):
            optimizer.zero_grad()
            criterion(model(train[0][batch]), train[1][batch]).backward()
            optimizer.step()
        with torch.no_grad():
            saved["last"] = model(validation[0]), model(test[0])
        nll = metrics.nll(scale * saved["last"][0], validation[1])
        if nll < lowest:
            lowest, saved["best"] = nll, saved["last"]
    return saved


cross_entropy = fit(torch.nn.CrossEntropyLoss(), 1.0)
with_penex = fit(penex.PENEX(sensitivity=ALPHA), 1 + ALPHA)

# %%
# Reliability
# -----------
# Temperature scaling divides the logits by one number :math:`T`, fitted on validation rows. A point
# of a diagram is a bin of test rows of similar confidence, that is, largest probability; its disc
# grows with their number. Below the diagonal a model is overconfident, above it underconfident.

variants = {
    "Cross-entropy": (cross_entropy, 1.0, False),
    "Cross-entropy / T": (cross_entropy, 1.0, True),
    "PENEX": (with_penex, 1 + ALPHA, False),
    "PENEX, no factor": (with_penex, 1.0, False),
}
colours = ("#1a1d21", "#0072b2", "#d55e00", "#c56fa0")
figure, panels = plt.subplots(
    2, 4, figsize=(7.6, 4.4), layout="constrained", sharex=True, sharey=True
)
scores = {}
for row, epoch in zip(panels, ("best", "last"), strict=True):
    row[0].set_ylabel(f"{epoch.capitalize()} epoch: accuracy")
    for axes, colour, (name, variant) in zip(
        row, colours, variants.items(), strict=True
    ):
        saved, scale, scaled = variant
        of_validation, of_test = (scale * logits for logits in saved[epoch])
        if scaled:
            of_test = of_test / metrics.fit_temperature(
                of_validation, validation[1]
            )
        score = scores[name, epoch] = metrics.evaluate(of_test, test[1])
        bins = metrics.reliability(of_test, test[1], bins=10)
        share = bins.count / bins.count.sum()
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.plot(bins.confidence, bins.accuracy, color=colour)
        axes.scatter(
            bins.confidence, bins.accuracy, 300 * share, color=colour, alpha=0.6
        )
        axes.set_title(
            f"{name}\nECE {score['ece']:.3f}, NLL {score['nll']:.3f}",
            fontsize="small",
        )
        axes.set(aspect="equal", xlim=(0.2, 1.03), ylim=(0.2, 1.03))
for axes in panels[1]:
    axes.set_xlabel("Confidence")
plt.show()

print(f"NLL of the true probabilities: {metrics.nll(true, test[1]):.3f}")

# %%
# At the best epoch
# -----------------
# PENEX with its factor is calibrated, and so is cross-entropy; a temperature has little left to do.
# (The data are clean and not scarce: here PENEX has no advantage in NLL.) Without the factor the
# predicted classes are the same, but the confidence is too low.

best = {name: scores[name, "best"] for name in variants}
assert best["PENEX, no factor"]["accuracy"] == best["PENEX"]["accuracy"]
assert best["PENEX"]["ece"] < 0.03
assert best["Cross-entropy"]["ece"] < 0.03
assert best["PENEX, no factor"]["ece"] > 0.08
assert best["PENEX, no factor"]["nll"] > best["PENEX"]["nll"] + 0.02
assert best["Cross-entropy"]["nll"] < best["PENEX"]["nll"]

# %%
# At the last epoch
# -----------------
# Both networks have overfitted and are overconfident. Omitting the factor now seems to help,
# because one error compensates for part of the other. This amounts to temperature scaling with a
# temperature that was not fitted, :math:`T = 1 + \alpha`; on other data it may hurt.
# If a network is overconfident, keep the factor and fit the temperature.
#
# A fitted temperature absorbs any constant factor. After temperature scaling it no longer matters
# whether the factor was applied.

last = {name: scores[name, "last"] for name in variants}
for name in ("Cross-entropy", "PENEX"):
    assert last[name]["ece"] > 0.05
assert last["PENEX, no factor"]["ece"] < last["PENEX"]["ece"]
assert last["Cross-entropy / T"]["ece"] < 0.03

of_validation, of_test = with_penex["last"]
fitted = metrics.fit_temperature((1 + ALPHA) * of_validation, validation[1])
fitted_without = metrics.fit_temperature(of_validation, validation[1])
scaled_ece = metrics.ece((1 + ALPHA) * of_test / fitted, test[1])
print(f"fitted with the factor:    T = {fitted:.4f}, ECE {scaled_ece:.3f}")
print(
    f"fitted without the factor: T = {fitted_without:.4f}, times 1 + α: "
    f"{(1 + ALPHA) * fitted_without:.4f}"
)
np.testing.assert_allclose((1 + ALPHA) * fitted_without, fitted, rtol=1e-6)
assert scaled_ece < 0.03

# %%
# Where to apply the factor
# -------------------------
# ``criterion.predict_proba(logits)`` applies it. If the logits are only used with plain softmax,
# ``penex.inference.fold_temperature`` multiplies it into the last layer.

criterion = penex.PENEX(sensitivity=ALPHA)
torch.testing.assert_close(
    criterion.predict_proba(of_test), ((1 + ALPHA) * of_test).softmax(1)
)
