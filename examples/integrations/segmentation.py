"""
Semantic segmentation
=====================

Dense targets have the shapes of ``nn.CrossEntropyLoss``: logits (N, K, H, W), class indices (N, H,
W). Unlabelled pixels have the value ``ignore_index``; they affect neither the loss nor the penalty
ρ.
"""

# %%
# Synthetic images: a disc and a square on a noisy background. Only a tenth of the pixels are
# labelled.
import torch
from torch import Tensor, nn

import penex

torch.manual_seed(0)
CLASSES, SIZE, UNLABELLED = 3, 24, 255


def make_images(number: int) -> tuple[Tensor, Tensor]:
    i, j = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    target = torch.zeros(number, SIZE, SIZE, dtype=torch.int64)
    for label, centre in enumerate(torch.randint(5, SIZE - 5, (2, number, 2)), start=1):
        di = (i - centre[:, 0, None, None]).abs()
        dj = (j - centre[:, 1, None, None]).abs()
        inside = di.square() + dj.square() <= 25 if label == 1 else torch.maximum(di, dj) <= 4
        target[inside] = label
    brightness = torch.tensor([-1.0, 0.0, 1.0])
    return (brightness[target] + 0.6 * torch.randn(target.shape)).unsqueeze(1), target


images, full_target = make_images(64)
target = full_target.masked_fill(torch.rand(full_target.shape) < 0.9, UNLABELLED)

# %%
# The logits of ignored pixels have no effect, and get no gradient.
criterion = penex.PENEX(ignore_index=UNLABELLED)
logits = torch.randn(2, CLASSES, SIZE, SIZE, requires_grad=True)
criterion(logits, target[:2]).backward()
ignored = (target[:2] == UNLABELLED).unsqueeze(1).expand_as(logits)
assert logits.grad is not None
assert (logits.grad[ignored] == 0).all()
assert (logits.grad[~ignored] != 0).all()

# %%
# Training.
model = nn.Sequential(
    nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 5, padding=2), nn.ReLU(),
    nn.Conv2d(16, CLASSES, 1),
)  # fmt: skip
criterion = penex.PENEX(ignore_index=UNLABELLED)
optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
losses = []
for _ in range(10):
    for rows in torch.randperm(len(images)).split(16):
        loss = criterion(model(images[rows]), target[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
assert losses[-1] < losses[0]

# %%
# Probabilities have the shape of the logits, and sum to one over the classes. New images are
# evaluated on every pixel.
model.eval()
criterion.eval()
new_images, new_target = make_images(32)
with torch.no_grad():
    probabilities = criterion.predict_proba(model(new_images))
assert probabilities.shape == (32, CLASSES, SIZE, SIZE)
torch.testing.assert_close(probabilities.sum(1), torch.ones(32, SIZE, SIZE))

accuracy = (probabilities.argmax(1) == new_target).float().mean().item()
ground = (new_target == 0).float().mean().item()
assert accuracy > 0.93 > ground
print(f"pixel accuracy {accuracy:.3f}; the commonest class has {ground:.3f}")
