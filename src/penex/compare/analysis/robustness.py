"""Reading and averaging the accuracies under attack that ``penex attack`` has recorded."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from penex.compare.analysis.statistics import resplit_interval
from penex.compare.files import read_json, reading

FILE = "robustness.json"
NORMS = {"linf": "L∞", "l2": "L2"}
Share = Annotated[float, Field(ge=0, le=1)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    loss: str
    seed: int
    epoch: str
    norm: Literal["linf", "l2"]
    radius: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    box: bool
    asked: int
    test_share: Annotated[float, Field(gt=0)]
    accuracy: Annotated[dict[str, Share], Field(min_length=1)]

    @model_validator(mode="after")
    def _clean(self) -> "_Record":
        if "clean" not in self.accuracy:
            raise ValueError("accuracy: expected clean")
        return self


_RECORDS = TypeAdapter(list[_Record])


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of robustness.json; none if the comparison was not attacked.

    Each has loss, seed, epoch, norm, radius, box (whether inputs are pixels), and accuracy: the
    share of correctly classified rows, first "clean" and then after each attack.
    """
    path = folder / FILE
    if not path.exists():
        return []
    remedy = "remove it and run penex attack again"
    records: list[dict[str, Any]] = read_json(path, remedy)
    with reading(path, remedy):
        _RECORDS.validate_python(records)
    return records


def final(record: dict[str, Any]) -> float:
    """The accuracy of a record after all its attacks."""
    return float(list(record["accuracy"].values())[-1])


def summary(
    records: Sequence[dict[str, Any]], spec: str, epoch: str, norm: str
) -> dict[float, dict[str, Any]]:
    """Means over seeds and intervals of a loss's accuracy, by radius; radius 0 is no attack."""
    own = [r for r in records if (r["loss"], r["epoch"], r["norm"]) == (spec, epoch, norm)]
    found: dict[float, list[float]] = {}
    for record in own:
        found.setdefault(record["radius"], []).append(final(record))
    clean = {record["seed"]: record["accuracy"]["clean"] for record in own}
    found |= {0.0: list(clean.values())} if clean else {}
    return {
        radius: asdict(
            resplit_interval(found[radius], test_share=own[0]["test_share"], bounds=(0.0, 1.0))
        )
        for radius in sorted(found)
    }
