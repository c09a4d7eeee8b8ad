"""Output folders of comparisons that nobody trained: any logits, at any epochs, in no time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax

from penex.compare.config import Config
from penex.compare.files import write_json
from penex.compare.output_folder import run_folder
from penex.compare.registry import parse_loss
from penex.compare.training.selection import LAST, validation_scores

Floats = NDArray[np.float64]

CLASSES = ("a", "b", "c")
TEST = np.arange(120) % 3
"""Labels of the test rows."""
VALIDATION = np.arange(240) % 3
EPOCHS = {"refined": 8, "nll": 8, "accuracy": 6, LAST: 20}
"""The selected epochs, unless a test says otherwise."""
VERSIONS = {"python": "3.11.0", "penex": "0.1.0", "torch": "2.13.0"}


def calibrated(target: NDArray[np.int64], separation: float, seed: int) -> Floats:
    """Logits that are calibrated: the true posterior of Gaussian classes that far apart."""
    noise = np.random.default_rng(seed).normal(size=(len(target), 3))
    return separation**2 * np.eye(3)[target] + separation * noise


def with_nll(target: NDArray[np.int64], nll: ArrayLike) -> Floats:
    """Log-probabilities with these NLLs of the rows; the other classes share what is left."""
    p = np.exp(-np.broadcast_to(np.asarray(nll, np.float64), target.shape))[:, None]
    return np.log(np.where(np.eye(3, dtype=bool)[target], p, (1 - p) / 2))


def with_right(target: NDArray[np.int64], right: int) -> Floats:
    """Log-probabilities by which so many rows are right, all with the same confidence."""
    wrong = np.arange(len(target)) >= right
    return log_softmax(3 * np.eye(3)[(target + wrong) % 3], axis=1)


def write(
    folder: Path,
    test: Mapping[str, Sequence[ArrayLike | None]],
    *,
    validation: Mapping[str, Sequence[ArrayLike]] | None = None,
    last: Mapping[str, Sequence[ArrayLike]] | None = None,
    epochs: Mapping[str, Mapping[str, int]] | None = None,
    test_target: NDArray[np.int64] = TEST,
    validation_target: NDArray[np.int64] = VALIDATION,
    class_counts: Sequence[int] = (160, 160, 160),
    parts: Sequence[str] = (),
    versions: Mapping[tuple[str, int], Mapping[str, str]] | None = None,
    seconds: Mapping[str, float] | None = None,
    **config: Any,
) -> Path:
    """Write the folder of a comparison.

    Args:
        folder: Where.
        test: For each loss and seed the log-probabilities of the test rows, (N, 3); None for a run
            that has not finished. What is saved are the logits that have them by the loss's link,
            which is softmax for losses other than PENEX: set their hyperparameters to 0.
        validation: The same for the validation rows; calibrated by default.
        last: The test rows at the last epoch, if they differ.
        epochs: By loss, in place of :data:`EPOCHS`.
        test_target: Labels (N,).
        validation_target: Labels (M,).
        class_counts: Training rows of each class.
        parts: That the data come with.
        versions: By loss and seed, in place of :data:`VERSIONS`.
        seconds: The content of timing.json.
        **config: Of the comparison.
    """
    settings = {"data": "made-up", "epochs": 20, "losses": tuple(test)} | config
    settings |= {"seeds": max(map(len, test.values()))}
    data = {"name": settings["data"], "fingerprint": "f" * 64, "rows": 600}
    data |= {"classes": list(CLASSES), "parts": list(parts)}
    folder.mkdir(parents=True)
    saved = Config(**settings).settings()
    write_json(folder / "comparison.json", {"config": saved, "data": data})
    if seconds is not None:
        write_json(folder / "timing.json", dict(seconds))
    for spec, runs in test.items():
        for seed, wanted in enumerate(runs):
            if wanted is None:
                continue
            at = dict((epochs or {}).get(spec, EPOCHS))
            known = calibrated(validation_target, 2.0, seed)
            if validation is not None and spec in validation:
                known = np.asarray(validation[spec][seed])
            final = last[spec][seed] if last is not None and spec in last else wanted
            _write_run(
                run_folder(folder, spec, seed),
                spec,
                seed,
                at,
                {e: (known, final if e == at[LAST] else wanted) for e in set(at.values())},
                (validation_target, test_target),
                {"train": sum(class_counts), "class_counts": list(class_counts)},
                dict((versions or {}).get((spec, seed), VERSIONS)),
                saved,
            )
    return folder


def _write_run(
    where: Path,
    spec: str,
    seed: int,
    at: dict[str, int],
    logits: Mapping[int, tuple[ArrayLike, ArrayLike]],
    targets: tuple[NDArray[np.int64], NDArray[np.int64]],
    train: Mapping[str, Any],
    versions: dict[str, str],
    config: Mapping[str, Any],
) -> None:
    where.mkdir(parents=True)
    candidate = parse_loss(spec)
    scale = 1 + candidate.untuned if candidate.loss.name == "penex" else 1.0
    arrays, scores = {}, {}
    for epoch, both in logits.items():
        for part, values in zip(("validation", "test"), both, strict=True):
            arrays[f"{part}_{epoch}"] = np.asarray(values, np.float32) / np.float32(scale)
        log_proba = log_softmax(np.asarray(both[0], np.float64), axis=1)
        scores[epoch] = dict(validation_scores(log_proba / scale, log_proba, targets[0]))
    np.savez(where / "logits.npz", validation_target=targets[0], test_target=targets[1], **arrays)
    finite = {epoch: all(map(np.isfinite, found.values())) for epoch, found in scores.items()}
    record = {
        "loss": spec,
        "seed": seed,
        "lr": config["lr_of"].get(spec, config["lr"]),
        "knob": candidate.untuned if candidate.loss.knob else None,
        "rows": {
            "train": train["train"],
            "validation": len(targets[0]),
            "test": len(targets[1]),
        },
        "class_counts": train["class_counts"],
        "model": "mlp",
        "parameters": 1234,
        "epochs": at,
        "validation": {
            name: scores[epoch] if finite[epoch] else None for name, epoch in at.items()
        },
        "seconds_per_epoch": 0.5,
        "versions": versions,
    }
    write_json(where / "run.json", record)
    columns = ("train_nll", "train_accuracy", "validation_nll", "validation_refined_nll")
    columns += ("validation_softmax_nll", "validation_accuracy", "gradient_norm", "seconds")
    lines = [
        ",".join([str(epoch), *[f"{(1 + seed / 10) / epoch:.6g}"] * len(columns)])
        for epoch in range(1, config["epochs"] + 1)
    ]
    lines.insert(0, ",".join(("epoch", *columns)))
    (where / "curve.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
