"""A preset from facts to figures: its comparisons, its report, and its numbers beside the paper's.

out/
<experiment>/        a comparison's folder, for each experiment, with published.json
figures/             the preset's figures, and its published curves beside ours
reproduction.json    what was reproduced, and where it differs from the paper
report.html ...      of several experiments together
data/                what --smoke made up, where no data was given
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
"""How --smoke attacks."""


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
    """Run what is missing of a preset in `folder`, and report what is there.

    Args:
        name: Of the preset.
        configs: Its experiments, of :meth:`~penex.paper.presets.Preset.configs`.
        folder: New, or of the same preset and settings.
        smoke: Whether missing data may be made up, and attacks be short.
        data_dir: A folder with the files of the data set, or with a folder of them by the data
            set's name.
        execution: Where, and how many runs at a time.
        display: Where progress is shown.

    Returns:
        The content of results.json by experiment; nothing on a process that does not lead.

    Raises:
        CompareError: As :func:`~penex.compare.runner.compare`. What was finished stays, and the
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
    # Those of an earlier call with other losses are still part of the reproduction.
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
    """Where the files of the data set are; None: where they are by themselves."""
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
    made_up = folder / "data" / name
    sample(config.data, made_up)
    return made_up


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
    """Draw the published curves beside ours, and say how far they are apart; None: there are none.

    The file of the figure is under "figure", the rest as of :func:`penex.paper.published.write`.
    """
    curves = facts.curves
    if curves is None or curves.experiment not in configs:
        return None
    figure = "figures/published.png"
    own = folder / curves.experiment
    found = published.write(curves, configs[curves.experiment], own, folder / figure)
    return {"figure": figure, **found}


def _figures(facts: Preset, comparisons: Sequence[plots.Comparison], into: Path) -> dict[str, str]:
    """Draw the preset's figures; by name the file, or why there is none."""
    drawn = {}
    for name in facts.figures:
        try:
            figures.save(name, comparisons, into / f"{name}.png")
            drawn[name] = f"{into.name}/{name}.png"
        except figures.NothingToShowError as error:
            drawn[name] = str(error)
    return drawn
