"""A run as data: cases of timed variants, written as JSON, read back and compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import noise
from benchmarks.timer import MIN_ROUNDS, measure

SCHEMA = 1
OURS = "moa_ops"  # the name of our variant in every case
BASE = "nn.Linear"
PLAIN = "plain model"  # the baseline of whole models
GEMMS = "GEMMs, same FLOPs"
PEFT = "PEFT"
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
    visits: int = 0  # how often it was measured, apart in time; in records before there were any, 0

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.section, self.label, self.dtype, self.cache

    def timed(self) -> dict[str, dict[str, Any]]:
        return {name: values for name, values in self.variants.items() if "ratio" in values}

    def time(
        self, functions: dict[str, Callable[[], object]], budget: float, min_rounds: int = MIN_ROUNDS
    ) -> None:
        """Measures ``functions`` and files the result."""
        beside = OURS if OURS in functions else None
        settings = {"budget": budget, "min_rounds": min_rounds, "cold": self.cache == "cold"}
        timings = measure(functions, self.baseline, beside=beside, **settings)
        for name, timing in timings.items():
            values = timing.to_dict()
            for of in noise.OF.keys() & values.keys():
                noise.visit(values[of])
            self.variants.setdefault(name, {}).update(values)

    def join(self, before: dict[str, dict[str, Any]]) -> None:
        """Joins the variants of an earlier visit to those of this one, which made the same tensors anew."""
        for name, was in before.items():
            now = self.variants.setdefault(name, was)
            if now is was or "ratio" not in was:
                continue
            if "ratio" not in now or was.get("of") != now.get(
                "of"
            ):  # left out by chance; another form compiled
                self.variants[name] = min(
                    was, now, key=lambda v: v["ratio"]["median"] if "ratio" in v else math.inf
                )
                continue
            of_both = {"seconds", *noise.OF} & was.keys() & now.keys()
            self.variants[name] = {**was, **now, **{of: noise.joined(was[of], now[of]) for of in of_both}}

    def ratio(self, variant: str) -> float | None:
        """Median of the paired ratios to the baseline."""
        values = self.variants.get(variant, {})
        return values["ratio"]["median"] if "ratio" in values else None

    def best_alternative(self) -> tuple[str, float] | None:
        """The fastest variant that computes the same as ours, and its ratio to the baseline."""
        others = [n for n in self.timed() if n not in (*NOT_OPPONENTS, *self.yardsticks)]
        best = min(others, key=lambda name: self.ratio(name), default=None)
        return None if best is None else (best, self.ratio(best))

    def called(self, variant: str) -> str:
        """The variant's name; of what was compiled, whose compiled form it is."""
        of = self.variants[variant].get("of")
        return f"{of}, compiled" if of else variant

    def lead(self) -> dict[str, float] | None:
        """Best alternative ÷ ours, median and 95 % interval of the pairs: below 1 where we lose."""
        best = self.best_alternative()
        return self.beside(best[0]) if best and self.ratio(OURS) else None

    def beside(self, variant: str) -> dict[str, float] | None:
        """The variant's time ÷ ours: median, and the stated 95 % interval; without one, unbounded."""
        pairs = self.variants[variant].get("beside")
        return None if pairs is None else {"low": 0.0, "high": math.inf, **pairs}

    def floor(self, ceilings: dict[str, float]) -> float | None:
        """The least ratio to the baseline: by arithmetic, or by bytes at the rate of the measured copy."""
        arithmetic, moved = self.facts.get("floor"), self.facts.get("moved")
        if not (arithmetic and moved and ceilings and BASE in self.timed()):
            return arithmetic
        seconds = 1e-9 * moved / ceilings["copy_gbytes_per_s"]
        return max(arithmetic, 1 + seconds / self.variants[BASE]["seconds"]["median"])


def save(path: Path, record: dict[str, Any], cases: Iterable[Case]) -> None:
    """JSON with a case per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(_rounded({"schema": SCHEMA, **record}), indent=1, ensure_ascii=False)
    lines = (json.dumps(_rounded(_short(case)), ensure_ascii=False) for case in cases)
    path.write_text(head[:-2] + ',\n "cases": [\n' + ",\n".join(lines) + "\n]}\n")


def _short(case: Case) -> dict[str, Any]:
    """The case as data; on the grid, of what is far from the best alternative the medians alone."""
    data, best = asdict(case), case.best_alternative()
    if case.section != "grid" or best is None:
        return data
    for name, values in data["variants"].items():
        if "ratio" not in values or name in (case.baseline, OURS, best[0]):
            continue
        if values["ratio"]["median"] > 1.1 * best[1] or name in case.yardsticks:
            for of in {"seconds", "ratio", "beside"} & values.keys():
                values[of] = {"median": values[of]["median"]}
    return data


def load(path: Path) -> tuple[dict[str, Any], list[Case]]:
    document = json.loads(path.read_text())
    if document.get("schema") != SCHEMA:
        raise SystemExit(f"{path} has schema {document.get('schema')!r}; this version reads {SCHEMA}")
    cases = [Case(**case) for case in document.pop("cases")]
    noise.state(cases)
    return document, cases


def resume(path: Path, record: dict[str, Any]) -> dict[tuple[str, ...], Case]:
    """The cases that ``path`` holds, if any; ``record`` takes over its ceilings and its time."""
    if not path.exists():
        return {}
    before, cases = load(path)
    for key in ("commit", "modified", "machine"):
        if before[key] != record[key]:
            raise SystemExit(f"{path} cannot be resumed, its {key} is {before[key]}, not {record[key]}")
    record["ceilings"] = before.get("ceilings", {})
    record["settings"]["wall_seconds"] = before["settings"].get("wall_seconds", 0)
    return {case.key: case for case in cases}


def highest(before: dict[str, float] | None, now: dict[str, float]) -> dict[str, float]:
    """A ceiling is the best that was seen."""
    return {name: max(rate, (before or {}).get(name, 0)) for name, rate in now.items()}


@dataclass(frozen=True)
class Loss:
    """A point where something else is faster than we are."""

    case: Case
    other: str
    lead: float  # its time / ours, median of the pairs
    interval: tuple[float, float]  # of that median, 95 %

    @property
    def certain(self) -> bool:
        """Beyond the noise."""
        return self.interval[1] < 1


def losses(cases: Iterable[Case], to: str | None = None) -> Iterator[Loss]:
    """Where an alternative beats ours; with ``to``, where the variant of that name does, yardstick or not."""
    for case in cases:
        for name in case.timed():
            other = name == to if to else name not in (*NOT_OPPONENTS, *case.yardsticks)
            pairs = case.beside(name)
            if other and pairs and pairs["median"] < 1:
                yield Loss(case, name, pairs["median"], (pairs["low"], pairs["high"]))


def _rounded(value: Any) -> Any:
    """Six digits are more than a clock gives."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
