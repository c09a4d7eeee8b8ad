"""Which loss for this data? Data flows one way, and every stage leaves a file.

config → data → model → fit (loss, seed) → logits.npz → metrics → report
"""

from penex._extras import need

need(
    "penex.compare",
    "compare",
    "filelock",
    "jinja2",
    "joblib",
    "lightning",
    "matplotlib",
    "numpy",
    "optuna",
    "pandas",
    "pyarrow",
    "pydantic",
    "rich",
    "safetensors",
    "scikit_posthocs",
    "scipy",
    "skrub",
    "sklearn",
    "yaml",
)
