"""
A plain training loop
=====================

When ``penex.PENEX()`` replaces ``nn.CrossEntropyLoss()``, four things change in the training loop:
the criterion has state, the running penalty ρ, so it is saved in checkpoints; ``eval()`` is called
on it as on the model; gradient clipping thresholds are smaller; and probabilities come from
``criterion.predict_proba``.
"""

# %%
# Synthetic data: three Gaussian classes that overlap, so that the true probabilities are
# known.
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import penex

torch.manual_seed(0)
centres = torch.tensor([[0.0, 1.2], [1.2, -0.8], [-1.2, -0.8]])


def make_data(rows: int) -> tuple[Tensor, Tensor]:
    target = torch.randint(len(centres), (rows,))
    return centres[target] + torch.randn(rows, 2), target


train_x, train_target = make_data(2000)
test_x, test_target = make_data(2000)


# %%
# The loop. Gradients are about α times as large as those of cross-entropy, so a threshold for
# clipping is multiplied by α. Adam's steps do not depend on the scale; with SGD raise the learning
# rate.
def build() -> tuple[nn.Module, penex.PENEX, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, len(centres)))
    criterion = penex.PENEX(sensitivity=0.1)
    return model, criterion, torch.optim.Adam(model.parameters(), lr=0.01)


def train(
    model: nn.Module, criterion: penex.PENEX, optimiser: torch.optim.Optimizer, epochs: range
) -> None:
    model.train()
    criterion.train()  # ρ follows the batches
    for epoch in epochs:
        order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(100):
            loss = criterion(model(train_x[rows]), train_target[rows])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0 * criterion.sensitivity)
            optimiser.step()


# %%
# Validation. ``eval()`` keeps ρ fixed. Epochs are compared by the negative log-likelihood: the
# values of the loss itself change with ρ, and cannot be compared with those of cross-entropy
# either.
@torch.no_grad()
def evaluate(model: nn.Module, criterion: penex.PENEX) -> float:
    model.eval()
    criterion.eval()
    return nn.functional.nll_loss(criterion.predict_log_proba(model(test_x)), test_target).item()


model, criterion, optimiser = build()
before = evaluate(model, criterion)
train(model, criterion, optimiser, range(6))

# %%
# A checkpoint includes the state of the criterion.
with TemporaryDirectory() as folder:
    file = Path(folder) / "checkpoint.pt"
    torch.save(
        {
            "model": model.state_dict(),
            "criterion": criterion.state_dict(),
            "optimiser": optimiser.state_dict(),
            "epoch": 6,
        },
        file,
    )
    saved = torch.load(file, weights_only=True)

resumed, resumed_criterion, resumed_optimiser = build()
resumed.load_state_dict(saved["model"])
resumed_criterion.load_state_dict(saved["criterion"])
resumed_optimiser.load_state_dict(saved["optimiser"])
assert torch.equal(resumed_criterion.penalty, criterion.penalty)

# %%
# Training continues from there exactly as if it had not been interrupted.
train(model, criterion, optimiser, range(6, 12))
train(resumed, resumed_criterion, resumed_optimiser, range(saved["epoch"], 12))
for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
    assert torch.equal(one, other)

# %%
# Probabilities. Here they can be compared with the true ones.
after = evaluate(model, criterion)
with torch.no_grad():
    logits = model(test_x)
probabilities = criterion.predict_proba(logits)
truth = (-(torch.cdist(test_x, centres) ** 2) / 2).softmax(1)  # by Bayes' rule
error = (probabilities - truth).abs().mean().item()

assert after < before - 0.3
assert torch.equal(probabilities.argmax(1), logits.argmax(1))
assert error < 0.04

print(f"test NLL {before:.3f} → {after:.3f}, penalty {criterion.penalty:.4f}")
print(f"mean distance to the true probabilities {error:.3f}")
