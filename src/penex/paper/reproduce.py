"""The reproduction of a preset: its comparisons, its report, and a comparison with the paper.

Files in the output folder:

<experiment>/        the folder of each experiment's comparison, with published.json
figures/             the preset's figures, and its published curves with ours
reproduction.json    what was reproduced, and the differences from the paper
report.html ...      the joint report of several experiments
data/                random data, written by --smoke if no data is given
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penex.compare.analysis import plots, report
from penex.compare.config import Config, Execution
from penex.compare.display import Display
from penex.compare.files import write_json
from penex.compare.output_folder import read_comparison, report_full_disk
from penex.compare.runner import compare
from penex.compare.training.distributed import is_rank_zero
from penex.paper import figures, published
from penex.paper.attacks import STEPS, attack
from penex.paper.presets import Preset, preset
from penex.paper.synthetic_data import SAMPLES, sample

FILE = "reproduction.json"
_DATA = (".parquet", ".npz", ".csv")
TRIAL: dict[str, Any] = {
    "radii": {"linf": (8 / 255,)},
    "rows": 8,
    "steps": dict.fromkeys(STEPS, 3),
}
"""Settings of attacks with --smoke."""


def reproduce(
    name: str,
    configs: dict[str, Config],
    folder: Path,
    *,
    smoke: bool = False,
    data_dir: Path | None = None,
    execution: Execution,
    display: Display,
) -> dict[str, dict[str, Any]]:
    """Execute the missing runs of a preset in `folder`, and write its report and figures.

    Args:
        name: The name of the preset.
        configs: Its experiments, from :meth:`~penex.paper.presets.Preset.configs`.
        folder: The output folder, new or of the same preset and settings.
        smoke: Whether to replace missing data by random data, and shorten attacks.
        data_dir: A folder with the files of the data set, or with a subfolder for them named after
            the data set.
        execution: Where to run, and how many runs at a time.
        display: Where progress is shown.

    Returns:
        The content of results.json by experiment; empty on processes other than that of rank zero.

    Raises:
        CompareError: As in :func:`~penex.compare.runner.compare`. Finished runs are kept, and the
            same call continues.
    """
    facts = preset(name)
    for experiment, config in configs.items():
        where = _data_folder(config, folder, data_dir, smoke)
        located = config.model_copy(update={"data_dir": None if where is None else str(where)})
        compare(located, folder / experiment, execution=execution, display=display)
    if not is_rank_zero():
        return {}
    comparisons = {}
    # Experiments of earlier calls with other losses are still part of the reproduction.
    folders = {
        experiment: folder / experiment
        for experiment in facts.experiments
        if experiment in configs or any((folder / experiment).glob("runs/*/*/run.json"))
    }
    for experiment, own in folders.items():
        if "robustness" in facts.figures:
            attack(own, say=display.finished, **(TRIAL if smoke else {}))
        with report_full_disk(own):
            write_json(
                own / "published.json", _published(facts, experiment, read_comparison(own)[0])
            )
        comparisons[experiment] = plots.read(own)
        report.write(comparisons[experiment])
    several = list(comparisons.values())
    if len(several) > 1:
        report.merge(several, folder)
    with report_full_disk(folder):
        record = {
            "preset": name,
            "title": facts.title,
            "paper": facts.paper,
            "smoke": smoke,
            "experiments": list(folders),
            "figures": _figures(facts, several, folder / "figures"),
            "curves": _curves(facts, configs, folder),
            "deviations": list(facts.deviations),
        }
        write_json(folder / FILE, record)
    return {experiment: one.results for experiment, one in comparisons.items()}


def _data_folder(config: Config, folder: Path, data_dir: Path | None, smoke: bool) -> Path | None:
    """The folder with the files of the data set; None: they are found or downloaded as usual."""
    if config.data not in SAMPLES:
        return None
    name = config.data.rpartition("/")[2]
    if data_dir is not None:
        named = data_dir / name
        if named.is_dir():
            return named
        if not smoke or any(path.suffix in _DATA for path in data_dir.iterdir()):
            return data_dir
    if not smoke:
        return None
    synthetic = folder / "data" / name
    sample(config.data, synthetic)
    return synthetic


def _published(facts: Preset, experiment: str, config: Config) -> list[dict[str, Any]]:
    """The published numbers of an experiment's losses, as the report reads them."""
    return [
        {
            "loss": one.loss,
            "metric": "validation_nll",
            "at": one.selection,
            "scaling": one.scaling,
            "value": one.value,
            "source": one.source,
        }
        for one in facts.published
        if one.experiment == experiment and one.loss in config.losses
    ]


def _curves(facts: Preset, configs: dict[str, Config], folder: Path) -> dict[str, Any] | None:
    """Draw the published curves with ours, and return their distances; None without curves.

    The file of the figure is under "figure", the rest as in :func:`penex.paper.published.write`.
    """
    curves = facts.curves
    if curves is None or curves.experiment not in configs:
        return None
    figure = "figures/published.png"
    own = folder / curves.experiment
    found = published.write(curves, configs[curves.experiment], own, folder / figure)
    return {"figure": figure, **found}


def _figures(facts: Preset, comparisons: Sequence[plots.Comparison], into: Path) -> dict[str, str]:
    """Draw the preset's figures; for each name, the file or the reason why there is none."""
    drawn = {}
    for name in facts.figures:
        try:
            figures.save(name, comparisons, into / f"{name}.png")
            drawn[name] = f"{into.name}/{name}.png"
        except figures.NothingToShowError as error:
            drawn[name] = str(error)
    return drawn
