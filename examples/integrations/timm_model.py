"""
A timm model
============

Models of timm return logits, so only the criterion changes. timm's ``Mixup`` produces class
probabilities as targets, which the criterion accepts. For code that applies plain softmax, the
factor 1 + α is folded into the classifier of a copy.

This example needs ``timm``, and a ``torchvision`` that fits the installed torch.
"""

# %%
import copy

import torch

import penex
from penex.inference import fold_temperature

try:
    import timm
    from timm.data import Mixup
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another build
    raise SystemExit(f"timm_model.py needs timm and torchvision: {error}") from error

# %%
# Synthetic images: the class is the bright colour channel.
torch.manual_seed(0)


def make_images(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    target = torch.randint(3, (rows,))
    images = torch.randn(rows, 3, 32, 32)
    images[torch.arange(rows), target] += 0.7
    return images, target


images, target = make_images(192)

# %%
# Training of a very small ResNet, with Mixup and CutMix. Label smoothing, if wanted, is an argument
# of the criterion.
model = timm.create_model("test_resnet", pretrained=False, num_classes=3)
criterion = penex.PENEX(sensitivity=0.1)
optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
mixup = Mixup(mixup_alpha=0.4, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=3)

model.train()
for _ in range(3):
    for rows in torch.randperm(len(images)).split(32):
        mixed, soft_target = mixup(images[rows].clone(), target[rows])
        loss = criterion(model(mixed), soft_target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

# %%
# Probabilities on new images, and a folded copy for deployment.
model.eval()
criterion.eval()
new_images, new_target = make_images(100)
with torch.no_grad():
    probabilities = criterion.predict_proba(model(new_images))
    folded = copy.deepcopy(model)
    fold_temperature(folded.get_classifier(), criterion.sensitivity)
    served = folded(new_images).softmax(1)

accuracy = (probabilities.argmax(1) == new_target).float().mean().item()
assert accuracy > 0.8
torch.testing.assert_close(served, probabilities)
print(f"accuracy {accuracy:.2f}, mean confidence {probabilities.amax(1).mean():.2f}")
