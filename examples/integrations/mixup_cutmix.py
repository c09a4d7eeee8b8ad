"""
Mixup and CutMix
================

Both mix two images and their labels. The mixed target has a probability for each class: floating
point, shape (N, K). The criterion accepts it as ``nn.CrossEntropyLoss`` does, without rounding to
the likelier class.
"""

# %%
# Synthetic images: horizontal, vertical or diagonal stripes with noise.
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import penex

torch.manual_seed(0)
CLASSES, SIZE = 3, 16


def make_images(rows: int) -> tuple[Tensor, Tensor]:
    target = torch.randint(CLASSES, (rows,))
    i, j = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    stripes = torch.stack([torch.sin(i + 0.0), torch.sin(j + 0.0), torch.sin((i + j) / 1.4)])
    sign = torch.randint(2, (rows, 1, 1)) * 2 - 1
    return (sign * stripes[target] + torch.randn(rows, SIZE, SIZE)).unsqueeze(1), target


train_images, train_target = make_images(480)
test_images, test_target = make_images(300)


# %%
# The two mixtures. ``share`` is the proportion of the original image.
def mixup(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    share, other = torch.distributions.Beta(0.4, 0.4).sample(), torch.randperm(len(images))
    return torch.lerp(images[other], images, share), torch.lerp(target[other], target, share)


def cutmix(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    other, side = torch.randperm(len(images)), int(torch.randint(1, SIZE, ()))
    top, left = torch.randint(SIZE - side + 1, (2,)).tolist()
    box = (..., slice(top, top + side), slice(left, left + side))
    images = images.clone()
    images[box] = images[other][box]
    return images, torch.lerp(target[other], target, 1 - side**2 / SIZE**2)


soft = F.one_hot(train_target[:8], CLASSES).float()
for mix in (mixup, cutmix):
    _, mixed_target = mix(train_images[:8], soft)
    assert torch.allclose(mixed_target.sum(1), torch.ones(8))

# %%
# One-hot probabilities give the loss of the class indices, so unmixed batches need no special case.
logits = torch.randn(8, CLASSES)
criterion = penex.PENEX(penalty=0.05)
torch.testing.assert_close(criterion(logits, soft), criterion(logits, train_target[:8]))

# %%
# Training, alternating between the two mixtures.
model = nn.Sequential(
    nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES),
)  # fmt: skip
criterion = penex.PENEX()
optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)

for _ in range(12):
    for step, rows in enumerate(torch.randperm(len(train_images)).split(48)):
        soft = F.one_hot(train_target[rows], CLASSES).float()
        images, target = (mixup, cutmix)[step % 2](train_images[rows], soft)
        loss = criterion(model(images), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

# %%
model.eval()
criterion.eval()
with torch.no_grad():
    probabilities = criterion.predict_proba(model(test_images))
accuracy = (probabilities.argmax(1) == test_target).float().mean().item()
assert accuracy > 0.9
print(f"test accuracy {accuracy:.3f}, mean confidence {probabilities.amax(1).mean():.3f}")
