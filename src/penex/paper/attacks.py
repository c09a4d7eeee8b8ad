"""Accuracy on test rows that an adversary changes, by attacks of adversarial-robustness-toolbox.

The adversary sees the network and moves each input within a radius: of pixels, on the scale [0, 1]
and never out of it (normalisation is a layer of the attacked model); or of scaled features,
anywhere. Rows still classified rightly go from one attack to the next, so an accuracy is that under
the strongest of them for every row:

pgd
    Projected gradient descent on cross-entropy (Madry et al., 2018).
apgd-ce, apgd-dlr, square
    Of AutoAttack (Croce and Hein, 2020), its parts without parameters that the toolbox has: on
    cross-entropy; on the difference of logits ratio (from three classes on); a search without
    gradients (pictures only). AutoAttack's fourth, FAB, is not in the toolbox.

What is attacked are the logits of the loss's own probabilities, so a PENEX network's times 1 + α.
That factor changes no prediction, nor apgd-dlr and square, which do not depend on the scale of
logits. It does change pgd and apgd-ce: on cross-entropy a confident network has gradients of nearly
zero, and these attacks then find less. A network is not more robust for it; the others tell.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penex._extras import need
from penex.compare.analysis.robustness import FILE, NORMS, final, read
from penex.compare.errors import CompareError
from penex.compare.files import write_json
from penex.compare.output_folder import lock, read_comparison, report_full_disk, run_folder
from penex.compare.training.selection import LAST, in_sentence

if TYPE_CHECKING:
    from torch import nn

RADII: Mapping[str, tuple[float, ...]] = {"linf": (1 / 255, 2 / 255, 4 / 255), "l2": (0.25, 0.5)}
"""For pixels; the paper's."""
ROWS = 1000
STEPS = {"pgd": 40, "apgd-ce": 100, "apgd-dlr": 100, "square": 200}
"""Steps of each attack, in the order in which they are tried; of one start each."""
BATCH = 256


@dataclass(frozen=True)
class Target:
    """A model and what of its inputs an adversary may change.

    Attributes:
        model: Gives the logits (N, K) of its probabilities for float32 inputs (N, ...).
        classes: K.
        box: Least and largest value of an input; None: there is none.
    """

    model: "nn.Module"
    classes: int
    box: tuple[float, float] | None = None


def radii(text: str) -> list[float]:
    """Radii as people write them: ``1/255,0.25``.

    Raises:
        CompareError: One is not a number above 0.
    """
    found = []
    for word in filter(None, map(str.strip, text.split(","))):
        try:
            found.append(float(Fraction(word)))
        except (ValueError, ZeroDivisionError):
            raise CompareError(
                f"radius: expected a number such as 0.25 or 2/255, got {word!r}"
            ) from None
    return found


def attack(
    folder: Path,
    *,
    radii: Mapping[str, Sequence[float]] = RADII,
    rows: int = ROWS,
    steps: Mapping[str, int] = STEPS,
    data: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Attack the selected and the last epoch of every finished run, and write robustness.json.

    What it holds already is not attacked again, so the same call continues.

    Args:
        folder: An output folder, whose data can still be read.
        radii: By norm, "linf" and "l2".
        rows: So many test rows are attacked, the same ones for every loss at a seed; all if fewer.
        steps: Of each attack, in this order; one that is not named is not made.
        data: Where the data are now, if not where the folder says.
        say: Is given a line for every finished checkpoint.

    Raises:
        CompareError: There is no finished run, the inputs are no numbers, the data have changed, or
            robustness.json is of other rows.
        ImportError: The extra 'attacks' is not installed.
    """
    need("penex attack", "attacks", "art")
    from penex.paper.trained_networks import Source

    _check(radii, rows)
    config, _ = read_comparison(folder)
    runs = [
        (spec, seed)
        for seed, spec in product(range(config.seeds), config.losses)
        if (run_folder(folder, spec, seed) / "run.json").exists()
    ]
    if not runs:
        raise CompareError(f"{folder} has no finished run yet; run penex compare first")
    source = Source(folder, data)
    with lock(folder), report_full_disk(folder):
        records = read(folder)
        if records and records[0]["asked"] != rows:
            raise CompareError(
                f"rows: {folder / FILE} is of {records[0]['asked']} rows; ask for these, or "
                "remove it"
            )
        known = {(r["loss"], r["seed"], r["epoch"], r["norm"], r["radius"]) for r in records}
        for (spec, seed), epoch in product(runs, dict.fromkeys((config.select, LAST))):
            wanted = {
                norm: [r for r in sorted(each) if (spec, seed, epoch, norm, r) not in known]
                for norm, each in radii.items()
            }
            if not any(wanted.values()):
                continue
            target = source.target(spec, seed, epoch)
            x, y = source.test_rows(seed, rows)
            for norm, each in wanted.items():
                for radius, left in zip(
                    each, accuracies(target, x, y, norm, each, seed, steps), strict=True
                ):
                    about = {"loss": spec, "seed": seed, "epoch": epoch}
                    within = {"norm": norm, "radius": radius, "box": target.box is not None}
                    count = {"asked": rows, "rows": len(y), "test_share": config.test_size}
                    records.append({**about, **within, **count, "accuracy": left})
            write_json(folder / FILE, records)
            say(f"{spec}, seed {seed}, {in_sentence(epoch)}: {_line(records, spec, seed, epoch)}")


def _check(radii: Mapping[str, Sequence[float]], rows: int) -> None:
    if rows < 1:
        raise CompareError(f"rows: expected at least 1, got {rows}")
    for norm, each in radii.items():
        if norm not in NORMS:
            raise CompareError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
        for radius in each:
            if not (np.isfinite(radius) and radius > 0):
                raise CompareError(f"radius: expected a number above 0, got {radius}")


def _line(records: Sequence[dict[str, Any]], *run: object) -> str:
    own = [r for r in records if (r["loss"], r["seed"], r["epoch"]) == run]
    found = [f"{NORMS[r['norm']]} {r['radius']:.3g}: {100 * final(r):.1f} %" for r in own]
    return f"{100 * own[0]['accuracy']['clean']:.1f} % right; {', '.join(found)}"


def accuracies(
    target: Target,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    norm: str,
    radii: Sequence[float],
    seed: int = 0,
    steps: Mapping[str, int] = STEPS,
) -> list[dict[str, float]]:
    """The share of rows classified rightly, clean and after each attack in turn, for each radius.

    Args:
        target: What is attacked.
        x: (N, ...) inputs.
        y: (N,) labels in [0, K).
        norm: "linf" or "l2", over all elements of an input.
        radii: In ascending order: what is misled within one is so within the next.
        seed: Of the attacks' random starts.
        steps: As in :func:`attack`.
    """
    right = _right(target, x, y)
    clean = float(right.mean())
    found = []
    for radius in radii:
        left = {"clean": clean}
        for name in _attacks(target, x, steps):
            if right.any():
                with _seeded(seed):
                    moved = _moved(name, target, x[right], y[right], norm, radius, steps[name])
                right[right] = _right(
                    target, _within(x[right], moved, norm, radius, target), y[right]
                )
            left[name] = float(right.mean())
        found.append(left)
    return found


def _attacks(target: Target, x: NDArray[np.float32], steps: Mapping[str, int]) -> list[str]:
    possible = {
        "apgd-dlr": target.classes > 2,
        # Its squares have to fit, and it needs to know how far a pixel can go.
        "square": x.ndim == 4 and min(x.shape[2:]) >= 16 and target.box is not None,
    }
    return [name for name in steps if possible.get(name, True)]


def _moved(
    name: str,
    target: Target,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    norm: str,
    radius: float,
    steps: int,
) -> NDArray[np.float32]:
    """Inputs as an attack of the toolbox leaves them."""
    import torch
    from art.attacks.evasion import (
        AutoProjectedGradientDescent,
        ProjectedGradientDescentPyTorch,
        SquareAttack,
    )
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        target.model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=x.shape[1:],
        nb_classes=target.classes,
        clip_values=target.box,
        device_type="gpu" if torch.cuda.is_available() else "cpu",
    )
    shared: dict[str, Any] = {
        "norm": {"linf": np.inf, "l2": 2}[norm],
        "eps": radius,
        "max_iter": steps,
        "batch_size": BATCH,
        "verbose": False,
    }
    apgd = partial(AutoProjectedGradientDescent, eps_step=2 * radius, nb_random_init=1, **shared)
    attack = {
        "pgd": lambda: ProjectedGradientDescentPyTorch(
            classifier, eps_step=2.5 * radius / steps, num_random_init=1, **shared
        ),
        "apgd-ce": lambda: apgd(classifier, loss_type="cross_entropy"),
        "apgd-dlr": lambda: apgd(classifier, loss_type="difference_logits_ratio"),
        "square": lambda: SquareAttack(classifier, p_init=0.8, nb_restarts=1, **shared),
    }[name]()
    with np.errstate(divide="ignore", invalid="ignore"):  # a row whose logits are all alike
        moved = attack.generate(x, np.eye(target.classes, dtype=np.float32)[y])
    return np.asarray(moved, np.float32)


def _within(
    x: NDArray[np.float32],
    moved: NDArray[np.float32],
    norm: str,
    radius: float,
    target: Target,
) -> NDArray[np.float32]:
    """`moved`, but `x` in rows where the attack has left its bounds or the numbers."""
    axes = tuple(range(1, x.ndim))
    change = np.abs(moved.astype(np.float64) - x)
    size = change.max(axes) if norm == "linf" else np.sqrt((change**2).sum(axes))
    kept = size <= radius * (1 + 1e-4) + 1e-6  # rounding; NaN is not kept
    if target.box is not None:
        low, high = target.box
        kept &= ((moved >= low) & (moved <= high)).all(axes)
    return np.where(kept.reshape(-1, *[1] * len(axes)), moved, x)


def _right(target: Target, x: NDArray[np.float32], y: NDArray[np.int64]) -> NDArray[np.bool_]:
    import torch

    device = next((p.device for p in target.model.parameters()), torch.device("cpu"))
    target.model.eval()
    found = []
    with torch.no_grad():
        for start in range(0, len(x), BATCH):
            logits = target.model(torch.from_numpy(x[start : start + BATCH]).to(device))
            found.append(logits.argmax(1).cpu().numpy() == y[start : start + BATCH])
    return np.concatenate(found)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The toolbox draws from global generators; afterwards they stand where they stood."""
    before = np.random.get_state(), random.getstate()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before[0])  # noqa: NPY002
        random.setstate(before[1])
