"""How far two runs of the same code are apart: the spread that a record states, and how it is found.

The rounds of one measurement say how well its median is known for the memory that its tensors happened to get
and for the minute in which it was taken. Other memory, or another minute on a host shared with others, gives
another median. So a run visits its cases twice: all of them, then all of them again, with fresh tensors. Of a
figure (a ratio within pairs) with medians m1, m2 of its visits, and w1, w2 the standard deviations of their
logarithms by the rounds (the 95 % interval of order statistics over 2 · 1.96):

- the figure is the geometric mean of m1 and m2;
- log(m1/m2) has the variance 2·b² + w1² + w2², with b the deviation *between* visits. Two visits of one case
  say little of its b, many cases much: b is one number for all figures of a class, the one with which 95 of
  100 pairs of visits of the class lie within 1.96 standard deviations (:func:`between`);
- the stated interval, 95 %, is figure · exp(±1.96 · √(b² + (w1² + w2²)/4)). That b² is not halved, as it
  might be for the mean of two visits, leaves room for what a whole run shares and the next one does not.

Classes: ratios to the baseline near it (within ``NEAR``), others, and ratios to ours; each apart by the time
of the baseline (``SLOW``), as far as a class has ``ENOUGH`` pairs of visits. A kind with fewer than that
takes ``UNKNOWN``. A case that was visited once (most of the grid) takes the b of its class, and w1 alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.record import Case

NORMAL = 1.96  # standard deviations in half of a 95 % interval
NEAR = 1.2  # times the baseline
SLOW = (1e-3, 1e-2)  # seconds of the baseline: what divides the classes
DURATIONS = ("under 1 ms", "1 to 10 ms", "over 10 ms")
ENOUGH = 20  # pairs of visits
UNKNOWN = {"near": 0.015, "far": 0.04, "to ours": 0.04}  # b, from runs of two Zen 4 cores on a shared host
OF = ("ratio", "beside")  # the figures that have visits

Class = tuple[str, str]  # kind, duration


def visit(values: dict[str, Any]) -> None:
    """Files the median and interval of one measurement as its first visit."""
    values["visits"] = [[values["median"], values["low"], values["high"]]]


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """A spread of two visits: geometric means; the least of both. Its interval is given by :func:`state`."""
    means = {key: math.sqrt(first[key] * second[key]) for key in ("median", "q1", "q3", "low", "high")}
    both = {**means, "least": min(first["least"], second["least"])}
    return {**both, "visits": first["visits"] + second["visits"]} if "visits" in first else both


def between(pairs: list[list[list[float]]]) -> float:
    """b: with it, 95 of 100 pairs of visits lie within 1.96 standard deviations of their difference."""
    needed = sorted(
        max(0.0, (math.log(a[0] / b[0]) / NORMAL) ** 2 - _rounds(a) ** 2 - _rounds(b) ** 2) / 2
        for a, b in pairs
    )
    return math.sqrt(needed[min(math.ceil(0.95 * len(needed)), len(needed) - 1)])


def _rounds(visit: list[float]) -> float:
    """w: the standard deviation of the logarithm of a visit's median, by its rounds."""
    return math.log(visit[2] / visit[1]) / (2 * NORMAL)


def state(cases: Iterable[Case]) -> dict[str, dict[str, float]]:
    """Gives every figure its interval, and says b of each class. Twice does the same as once."""
    found: list[tuple[Class, dict[str, Any]]] = []
    for case in cases:
        for name, values in case.timed().items():
            for of in set(OF) & values.keys():
                if "low" in values[of] and name != case.baseline:
                    if "visits" not in values[of]:
                        visit(values[of])
                    found.append((_class(case, of, values[of]["median"]), values[of]))
    pairs: dict[Class, list[list[list[float]]]] = defaultdict(list)
    for (kind, duration), values in found:
        if len(values["visits"]) == 2:
            pairs[kind, duration].append(values["visits"])
            pairs[kind, ""].append(values["visits"])
    known = {key: between(of) for key, of in pairs.items() if len(of) >= ENOUGH}
    for (kind, duration), values in found:
        b = known.get((kind, duration), known.get((kind, ""), UNKNOWN[kind]))
        values["low"], values["high"] = _interval(values["visits"], b)
    return {
        f"{kind}, {duration or 'any'}": {"between": b, "pairs": len(pairs[kind, duration])}
        for (kind, duration), b in sorted(known.items())
    }


def _class(case: Case, of: str, median: float) -> Class:
    base = case.variants[case.baseline]["seconds"]["median"]
    duration = DURATIONS[sum(base >= limit for limit in SLOW)]
    if of == "beside":
        return "to ours", duration
    return "near" if 1 / NEAR <= median <= NEAR else "far", duration


def _interval(visits: list[list[float]], b: float) -> tuple[float, float]:
    """The 95 % interval of the visits' geometric mean, skewed as those of the rounds are."""
    count = len(visits)
    mean = math.exp(sum(math.log(median) for median, _, _ in visits) / count)
    down = math.hypot(NORMAL * b, *(math.log(median / low) / count for median, low, _ in visits))
    up = math.hypot(NORMAL * b, *(math.log(high / median) / count for median, _, high in visits))
    return mean * math.exp(-down), mean * math.exp(up)


@dataclass(frozen=True)
class Change:
    """A ratio to the baseline in two runs, each with its stated interval."""

    key: tuple[str, str, str, str]
    variant: str
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def factor(self) -> float:
        """After ÷ before."""
        return self.after["median"] / self.before["median"]

    @property
    def certain(self) -> bool:
        """The intervals do not touch, which two runs of the same code do in one of 150 cases."""
        return self.before["high"] < self.after["low"] or self.after["high"] < self.before["low"]

    @property
    def expected(self) -> bool:
        """Within what 95 of 100 pairs of runs of the same code show."""
        a, b = sorted((self.before, self.after), key=lambda values: values["median"])
        reach = math.hypot(math.log(a["high"] / a["median"]), math.log(b["median"] / b["low"]))
        return math.log(b["median"] / a["median"]) <= reach

    @property
    def spread(self) -> float:
        """Half of the wider interval, relative."""
        return max(math.log(values["high"] / values["low"]) / 2 for values in (self.before, self.after))


def pairs(before: Iterable[Case], after: Iterable[Case]) -> Iterator[Change]:
    """Every variant, the baselines aside, that both runs timed at the same point with an interval."""
    old = {case.key: case.timed() for case in before}
    for case in after:
        for name, values in case.timed().items():
            was: dict[str, Any] = old.get(case.key, {}).get(name, {})
            if name != case.baseline and all("low" in v.get("ratio", {}) for v in (was, values)):
                yield Change(case.key, name, was["ratio"], values["ratio"])
