"""A run as data: cases of timed variants, written as JSON, read back and compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.timer import measure

SCHEMA = 1
OURS = "moa_ops"  # the name of our variant in every case
BASE = "nn.Linear"
PLAIN = "plain model"  # the baseline of whole models
GEMMS = "GEMMs, same FLOPs"
NOT_OPPONENTS = (OURS, BASE, PLAIN, GEMMS)


@dataclass
class Case:
    """One line of a table: what was measured, beside what.

    ``variants`` holds per name the times (``timer.Timing.to_dict()``, and the relative ``error`` where one
    was checked) or ``{"absent": why}``. ``facts`` are further numbers: floor, aim, FLOPs, bytes.
    """

    section: str
    label: str
    dtype: str
    baseline: str
    cache: str = "warm"
    facts: dict[str, Any] = field(default_factory=dict)
    yardsticks: list[str] = field(default_factory=list)  # variants that compute something else or less
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.section, self.label, self.dtype, self.cache

    def timed(self) -> dict[str, dict[str, Any]]:
        return {name: values for name, values in self.variants.items() if "ratio" in values}

    def time(self, functions: dict[str, Callable[[], object]], budget: float) -> None:
        """Measures ``functions`` and files the result."""
        timings = measure(functions, self.baseline, budget=budget, cold=self.cache == "cold")
        for name, timing in timings.items():
            self.variants.setdefault(name, {}).update(timing.to_dict())

    def ratio(self, variant: str) -> float | None:
        """Median of the paired ratios to the baseline."""
        values = self.variants.get(variant, {})
        return values["ratio"]["median"] if "ratio" in values else None

    def best_alternative(self) -> tuple[str, float] | None:
        """The fastest variant that computes the same as ours, and its ratio to the baseline."""
        others = [n for n in self.timed() if n not in (*NOT_OPPONENTS, *self.yardsticks)]
        best = min(others, key=lambda name: self.ratio(name), default=None)
        return None if best is None else (best, self.ratio(best))


def save(path: Path, record: dict[str, Any], cases: list[Case]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": SCHEMA, **record, "cases": [asdict(case) for case in cases]}
    path.write_text(json.dumps(_rounded(document), indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> tuple[dict[str, Any], list[Case]]:
    document = json.loads(path.read_text())
    if document.get("schema") != SCHEMA:
        raise SystemExit(f"{path} has schema {document.get('schema')!r}; this version reads {SCHEMA}")
    return document, [Case(**case) for case in document.pop("cases")]


@dataclass(frozen=True)
class Loss:
    """A point where something else is faster than we are."""

    case: Case
    other: str
    factor: float  # our time / theirs
    certain: bool  # the 95 % intervals of the two medians do not touch


def losses(cases: list[Case], to: str | None = None) -> Iterator[Loss]:
    """Where an alternative beats ours; with ``to``, where the variant of that name does, yardstick or not."""
    for case in cases:
        timed = case.timed()
        ours = timed.get(OURS)
        for name, theirs in timed.items():
            if (
                ours is None
                or name in NOT_OPPONENTS
                or (name in case.yardsticks if to is None else name != to)
            ):
                continue
            factor = ours["ratio"]["median"] / theirs["ratio"]["median"]
            if factor > 1:
                yield Loss(case, name, factor, ours["ratio"]["low"] > theirs["ratio"]["high"])


@dataclass(frozen=True)
class Change:
    """Our ratio to the baseline in two runs, where their intervals do not touch."""

    key: tuple[str, str, str, str]
    before: float
    after: float


def changes(before: list[Case], after: list[Case], least: float = 0.01) -> tuple[list[Change], int]:
    """What changed beyond the noise and by more than ``least``, and how many points were compared."""
    old = {case.key: case for case in before}
    found, compared = [], 0
    for case in after:
        pair = [c.timed().get(OURS) for c in (old.get(case.key), case) if c is not None]
        if len(pair) < 2 or None in pair:
            continue
        compared += 1
        a, b = (values["ratio"] for values in pair)
        apart = a["high"] < b["low"] or b["high"] < a["low"]
        if apart and abs(b["median"] / a["median"] - 1) > least:
            found.append(Change(case.key, a["median"], b["median"]))
    return found, compared


def _rounded(value: Any) -> Any:
    """Six digits are more than a clock gives."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
