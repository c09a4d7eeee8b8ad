"""Which loss for this data? The comparison, from the data to the report.

Data flows one way, and every stage leaves files in the output folder:

    config, registry    what is compared: settings and losses
    data/               reads a source, checks it, splits it, loads batches
    models/             the network that suits the data
    training/           tunes and trains each loss at each seed; saves logits and checkpoints
    analysis/           metrics, intervals, the recommendation, tables, pictures and the report

:mod:`~penex.compare.runner` runs these stages in an output folder
(:mod:`~penex.compare.output_folder`), on the processes of :mod:`~penex.compare.parallel`.
:mod:`~penex.compare.result` is the Python interface to them, :mod:`penex.cli` the command line.
"""

from penex._extras import need

need(
    "penex.compare",
    "compare",
    "cloudpickle",
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
