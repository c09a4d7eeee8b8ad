"""
Export to ONNX
==============

A model trained with PENEX needs its factor 1 + α wherever its probabilities are computed. There are
two ways to include it: :class:`penex.inference.Calibrated` puts it, and the softmax, into the
exported graph; :func:`penex.inference.fold_temperature` puts it into the weights, for code that
calls softmax itself.
"""

# %%
# A small model, trained briefly on synthetic data.
import copy
import logging
import warnings

import onnxruntime
import torch
from torch import nn

import penex
from penex.inference import Calibrated, fold_temperature

logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec", FutureWarning)  # torch's own

torch.manual_seed(0)
x, target = torch.randn(300, 6), torch.randint(3, (300,))
x[torch.arange(300), target] += 2.0
model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
criterion = penex.PENEX(sensitivity=0.3)
optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
for _ in range(60):
    optimiser.zero_grad()
    criterion(model(x), target).backward()
    optimiser.step()

model.eval()
probabilities = criterion.predict_proba(model(x)).detach()
assert (probabilities.argmax(1) == target).float().mean() > 0.8

# %%
# Model and factor together, with a dynamic batch size: first ``torch.export``, which is also
# what the ONNX exporter starts from.
calibrated = Calibrated(model, criterion.sensitivity)
dynamic = {"args": ({0: torch.export.Dim("batch")},)}
program = torch.export.export(calibrated, (x[:4],), dynamic_shapes=dynamic)
torch.testing.assert_close(program.module()(x), probabilities)

exported = torch.onnx.export(program, verbose=False)
assert exported is not None
session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
name = session.get_inputs()[0].name
(served,) = session.run(None, {name: x.numpy()})

difference = abs(served - probabilities.numpy()).max()
assert difference < 1e-6
print(f"Calibrated:       largest difference of a probability {difference:.1e}")

# %%
# The folded copy returns logits whose plain softmax is correct. ``exported.save(path)`` would write
# the file to deploy.
folded = fold_temperature(copy.deepcopy(model), criterion.sensitivity)
dynamic = ({0: torch.export.Dim("batch")},)
exported = torch.onnx.export(folded, (x[:4],), dynamic_shapes=dynamic, dynamo=True, verbose=False)
assert exported is not None
session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
(logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
served = torch.from_numpy(logits).softmax(1)

difference = (served - probabilities).abs().max().item()
assert difference < 1e-6
print(f"fold_temperature: largest difference of a probability {difference:.1e}")

# %%
# Without either, the probabilities would be too flat.
plain = model(x).detach().softmax(1)
assert (plain - probabilities).abs().max() > 0.02
assert plain.amax(1).mean() < probabilities.amax(1).mean()
