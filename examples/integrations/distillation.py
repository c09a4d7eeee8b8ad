"""
Distillation
============

A student learns from a teacher's probabilities, on unlabelled samples. The probabilities are the
target: floating point, shape (N, K). If the teacher was trained with PENEX, use its
``predict_proba``; the plain softmax of its logits is too flat.
"""

# %%
# Synthetic data: three Gaussian classes, with many unlabelled samples.
import torch
from torch import Tensor, nn

import penex

torch.manual_seed(0)
centres = torch.randn(3, 10)


def make_data(rows: int) -> tuple[Tensor, Tensor]:
    target = torch.randint(3, (rows,))
    return centres[target] + 1.2 * torch.randn(rows, 10), target


def train(x: Tensor, target: Tensor, width: int) -> tuple[nn.Module, penex.PENEX]:
    model = nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Linear(width, 3))
    criterion = penex.PENEX(sensitivity=0.2)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(8):
        for rows in torch.randperm(len(x)).split(50):
            loss = criterion(model(x[rows]), target[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval(), criterion.eval()


@torch.no_grad()
def nll(model: nn.Module, criterion: penex.PENEX, x: Tensor, target: Tensor) -> float:
    return nn.functional.nll_loss(criterion.predict_log_proba(model(x)), target).item()


test = make_data(3000)

# %%
# The teacher is trained on many labels.
teacher, teacher_criterion = train(*make_data(4000), width=128)

# %%
# Its probabilities are the student's targets. The student uses no labels.
unlabelled, _ = make_data(2000)
with torch.no_grad():
    soft_target = teacher_criterion.predict_proba(teacher(unlabelled))
student, student_criterion = train(unlabelled, soft_target, width=16)

# %%
# It agrees with its teacher, and is better than the same network trained on a hundred labels.
few, few_criterion = train(*make_data(100), width=16)
with torch.no_grad():
    agreement = (student(test[0]).argmax(1) == teacher(test[0]).argmax(1)).float().mean().item()
results = {
    "teacher": nll(teacher, teacher_criterion, *test),
    "student": nll(student, student_criterion, *test),
    "few labels": nll(few, few_criterion, *test),
}
assert agreement > 0.95
assert results["student"] < results["few labels"] - 0.05
assert results["student"] < results["teacher"] + 0.05
for name, value in results.items():
    print(f"{name:12} NLL {value:.3f}")
