"""
From a DataFrame to a served model
==================================

Compare two losses on a table, keep the recommended model, and serve it with ONNX Runtime, which
needs neither torch nor penex. The notebook of this page can be downloaded at its end.
"""

# sphinx_gallery_capture_repr = ("_repr_html_",)

import tempfile
from pathlib import Path

import onnxruntime
from sklearn.datasets import load_breast_cancer

import penex

frame = load_breast_cancer(as_frame=True).frame
frame.iloc[:3, -4:]

# %%
# Compare
# -------
# Each loss is trained three times, on splits that both share. The result shows the recommendation,
# the table of test results and the curves.

result = penex.compare_losses(
    frame,
    "target",
    losses=["cross-entropy", "penex"],
    seeds=3,
    epochs=20,
    jobs=1,
    quiet=True,
)
result

# %%
# Save
# ----
# The saved model holds its encoder, class names, link and temperature, and no code.

folder = Path(tempfile.mkdtemp())
result.best.save(folder / "classifier")
classifier = penex.load(folder / "classifier").best
print(
    classifier.predict(frame[:3]), classifier.predict_proba(frame[:3]).round(3)
)

# %%
# Serve
# -----
# The exported file maps encoded rows to probabilities.

classifier.export(folder / "classifier.onnx")
session = onnxruntime.InferenceSession(folder / "classifier.onnx")
(served,) = session.run(None, {"rows": classifier.encode(frame[:3])})
print(served.round(3))

# %%
# Both give the same probabilities:

print(
    f"Largest difference: {abs(served - classifier.predict_proba(frame[:3])).max():.1e}"
)

# sphinx_gallery_thumbnail_path = "images/overview.svg"
