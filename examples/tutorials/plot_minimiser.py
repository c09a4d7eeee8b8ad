r"""
The minimiser in closed form
============================

For class probabilities :math:`p` and a fixed penalty :math:`\rho`, the expected PENEX loss of
logits :math:`f` is

.. math::
    L(f) = \sum_j \left[ p_j e^{-\alpha f_j} + \rho\, e^{f_j} \right].

It is a sum of one term per class, so its minimum has a closed form. This page derives it, finds the
same point with a general solver, and plots the loss around it.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import minimize

import penex

p = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
alpha, rho = 0.5, 0.2


def loss(f):
    """The expected loss: the probabilities are the target of a single row."""
    return penex.penex_loss(f[None], p[None], sensitivity=alpha, penalty=rho)


# %%
# The solver
# ----------
# SciPy's trust-region method gets the value, the gradient and the Hessian of ``penex_loss`` from
# torch, in float64, and several distant starting points. It converges to the same point each time:
# the loss is strictly convex.


def value_and_gradient(f):
    """For SciPy, which holds arrays."""
    f = torch.from_numpy(f).requires_grad_()
    value = loss(f)
    (gradient,) = torch.autograd.grad(value, f)
    return value.item(), gradient.numpy()


def hessian(f):
    """All second derivatives, by torch."""
    return torch.func.hessian(loss)(torch.from_numpy(f)).numpy()


rng = np.random.default_rng(0)
found = [
    minimize(
        value_and_gradient,
        rng.normal(0, 3, 4),
        jac=True,
        hess=hessian,
        method="trust-exact",
        options={"gtol": 1e-12},
    )
    for _ in range(5)
]

# %%
# The closed form
# ---------------
# The gradient :math:`\rho e^{f_j} - \alpha p_j e^{-\alpha f_j}` is zero at
#
# .. math::
#     f^*_j = \frac{\log(\alpha p_j / \rho)}{1 + \alpha}, \qquad
#     L(f^*) = (1+\alpha) \left(\frac{\alpha}{\rho}\right)^{-\frac{\alpha}{1+\alpha}}
#     \sum_j p_j^{\frac{1}{1+\alpha}}.

minimiser = torch.log(alpha * p / rho) / (1 + alpha)
minimum = (
    (1 + alpha)
    * (alpha / rho) ** (-alpha / (1 + alpha))
    * (p ** (1 / (1 + alpha))).sum()
)

print("closed form:", minimiser.numpy().round(6), f" loss {minimum:.9f}")
for result in found:
    print(
        f"{result.nit:2d} steps to: ",
        result.x.round(6),
        f" loss {result.fun:.9f}",
    )
    np.testing.assert_allclose(result.x, minimiser, atol=1e-7)
    np.testing.assert_allclose(result.fun, minimum, rtol=1e-12)

# %%
# The Hessian is diagonal
# -----------------------
# The classes are not coupled, unlike in cross-entropy, where the softmax couples all of them. The
# diagonal is :math:`\rho e^{f_j} + \alpha^2 p_j e^{-\alpha f_j}`, which is positive everywhere. At
# the minimum it is :math:`(1+\alpha)\rho e^{f^*_j}`.

f = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
diagonal = rho * f.exp() + alpha**2 * p * torch.exp(-alpha * f)
print(hessian(f.numpy()).round(4))
np.testing.assert_allclose(hessian(f.numpy()), torch.diag(diagonal), atol=1e-12)
np.testing.assert_allclose(
    hessian(minimiser.numpy()),
    torch.diag((1 + alpha) * rho * minimiser.exp()),
    atol=1e-12,
)

# %%
# Fisher consistency
# ------------------
# At the minimum the exponentials of the logits are proportional to the probabilities to the power
# :math:`1/(1+\alpha)`. The factor :math:`1+\alpha` recovers the probabilities for every
# :math:`\rho`; plain softmax is too flat.

print("p:                    ", p.numpy().round(3))
print("softmax(f):           ", minimiser.softmax(0).numpy().round(3))
print(
    "softmax((1 + α) f):   ",
    penex.inference.predict_proba(minimiser, alpha, dim=0).numpy(),
)
for any_alpha in (0.01, 0.1, 1.0):
    for any_rho in (1e-3, 0.1, 10.0):
        f = torch.log(any_alpha * p / any_rho) / (1 + any_alpha)
        torch.testing.assert_close(
            penex.inference.predict_proba(f, any_alpha, dim=0), p
        )
assert minimiser.softmax(0).max() < p.max()

# %%
# The same holds for a sample of labels. One vector of logits for all rows, independent of the
# inputs, learns the frequencies of the classes. Here :math:`\rho` is estimated at each step, as
# ``penex.PENEX(penalty_mode="auto")`` does.

labels = torch.multinomial(
    p, 1000, replacement=True, generator=torch.manual_seed(0)
)
logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
optimizer = torch.optim.Adam([logits], lr=0.05)
for _ in range(500):
    optimizer.zero_grad()
    penex.penex_loss(
        logits.expand(1000, 4), labels, sensitivity=alpha
    ).backward()
    optimizer.step()
learned = penex.inference.predict_proba(logits.detach(), alpha, dim=0)
frequency = labels.bincount().double() / len(labels)
print("frequency:", frequency.numpy())
print("learned:  ", learned.numpy().round(3))
torch.testing.assert_close(learned, frequency, atol=1e-3, rtol=0)

# %%
# The loss along two lines
# ------------------------
# Cross-entropy does not change when a constant is added to all logits: its minimiser is not unique.
# That of PENEX is, and depends on the penalty. A step up costs more than the same step down,
# because :math:`e^{f}` grows faster than :math:`e^{-\alpha f}` for :math:`\alpha < 1`.

steps = torch.linspace(-3, 3, 121, dtype=torch.float64)
lines = {
    "All logits shifted": torch.ones(4),
    "Only the first logit": torch.eye(4)[0],
}
figure, panels = plt.subplots(
    1, 2, figsize=(8, 3.2), layout="constrained", sharey=True
)
for axes, (title, direction) in zip(panels, lines.items(), strict=True):
    points = minimiser + steps[:, None] * direction
    values = torch.stack([loss(point) for point in points])
    assert (values >= minimum - 1e-12).all()
    assert values[-1] > values[0]
    points = (
        p.log() + steps[:, None] * direction
    )  # log p minimises cross-entropy
    reference = torch.nn.functional.cross_entropy(
        points, p.expand(121, 4), reduction="none"
    )
    axes.plot(
        steps, values - minimum, color="#d55e00", label=f"PENEX, α = {alpha}"
    )
    axes.plot(
        steps,
        reference - reference.min(),
        color="#1a1d21",
        label="Cross-entropy",
    )
    axes.set(title=title, xlabel="Step from the minimiser", ylim=(-0.1, 3))
    if title.startswith("All"):
        torch.testing.assert_close(reference, reference[:1].expand(121))
panels[0].set_ylabel("Loss above its minimum")
panels[0].legend()
plt.show()
