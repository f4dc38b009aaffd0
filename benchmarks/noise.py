"""How far two runs of the same code are apart: the spread that a record states, and how it is found.

The rounds of one measurement say how well its median is known for the memory that its tensors happened to
get and for the minute in which it was taken. Other memory, or another minute on a host shared with others,
gives another median. So a run visits its cases twice: all of them, then all of them again, with fresh
tensors. Of a figure (a ratio within pairs) with medians m1, m2 of its visits, and w1, w2 the standard
deviations of their logarithms by the rounds (the 95 % interval of order statistics over 2 · 1.96):

- the figure m is the geometric mean of m1 and m2;
- log(m1/m2) has the variance 2·(b·s)² + w1² + w2². The part of the time that the baseline does not have
  varies more than the rest, which s = √(1 + (EXTRA·(1 - min(m, 1/m)))²) describes; b is the deviation
  *between* visits of a figure near 1. Two visits of one case say little of it, many cases much: b is one
  number for all figures of a class, the one with which 95 of 100 pairs of visits of the class lie within
  1.96 standard deviations;
- the stated interval, 95 %, is m · exp(±1.96 · √((b·s)² + (w1² + w2²)/4)). That b² is not halved, as it
  might be for a mean of two, leaves room for what all of a run shares and the next run does not.

Classes: ratios to the baseline, and ratios to ours; each apart by the time of the baseline (``SLOW``), as
far as a class has ``ENOUGH`` pairs of visits; with fewer in all, b is ``UNKNOWN``. A case that was visited
once (most of the grid) takes the b of its class, and w1 alone.

Tried on two pairs of quick runs in bad hours of a shared host (443 figures): intervals of the rounds and
of constants from a better day held 86 and 89 % of ours, 94 and 90 % of the others'; these hold 96 and 98
%, 97 and 99 %. Half of them are within 13 and 20 % (ours; 11 and 16 % before), 19 and 30 % (the others';
16 and 23 %). The same pairs chose ``EXTRA`` and ``ENOUGH``. A default run has several times the rounds.
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
EXTRA = 4.0  # how much more varies what the baseline has no share in
SLOW = (1e-3, 1e-2)  # seconds of the baseline: what divides the classes
DURATIONS = ("under 1 ms", "1 to 10 ms", "over 10 ms")
ENOUGH = 60  # pairs of visits
UNKNOWN = 0.015  # b of two Zen 4 cores on a shared host, in a good hour
OF = {"ratio": "to the baseline", "beside": "to ours"}  # the figures that have visits, and their kind

Class = tuple[str, str]  # kind, duration


def visit(values: dict[str, Any]) -> None:
    """Files the median and interval of one measurement as its first visit."""
    values["visits"] = [[values["median"], values["low"], values["high"]]]


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """A spread of two visits: geometric means; the least of both. Its interval is given by :func:`state`. Of
    what a grid's record keeps the median alone, the median.
    """
    of_both = first.keys() & second.keys()
    means = [key for key in ("median", "q1", "q3", "low", "high") if key in of_both]
    both = {key: math.sqrt(first[key] * second[key]) for key in means}
    if "least" in of_both:
        both["least"] = min(first["least"], second["least"])
    if "visits" in of_both:
        both["visits"] = first["visits"] + second["visits"]
    return both


def between(pairs: list[list[list[float]]]) -> float:
    """b: with it, 95 of 100 pairs of visits lie within 1.96 standard deviations of their difference."""
    needed = []
    for first, second in pairs:
        apart = math.log(first[0] / second[0]) / NORMAL
        excess = max(0.0, apart**2 - _rounds(first) ** 2 - _rounds(second) ** 2)
        needed.append(math.sqrt(excess / 2) / _scale(math.sqrt(first[0] * second[0])))
    return sorted(needed)[min(math.ceil(0.95 * len(needed)), len(needed) - 1)]


def _scale(median: float) -> float:
    """s: how much more than one near 1 a ratio of this size varies."""
    return math.hypot(1, EXTRA * (1 - min(median, 1 / median)))


def _rounds(visit: list[float]) -> float:
    """w: the standard deviation of the logarithm of a visit's median, by its rounds."""
    return math.log(visit[2] / visit[1]) / (2 * NORMAL)


def state(cases: Iterable[Case]) -> dict[str, dict[str, float]]:
    """Gives every figure its interval, and says b of each class. Twice does the same as once."""
    found: list[tuple[Class, dict[str, Any]]] = []
    for case in cases:
        for name, values in case.timed().items():
            for of, kind in OF.items():
                if "low" not in values.get(of, {}) or name == case.baseline:
                    continue  # not measured so, or of a grid's record the median alone
                if "visits" not in values[of]:  # a record from before there were any
                    visit(values[of])
                seconds = case.variants[case.baseline]["seconds"]["median"]
                duration = DURATIONS[sum(seconds >= limit for limit in SLOW)]
                found.append(((kind, duration), values[of]))
    pairs: dict[Class, list[list[list[float]]]] = defaultdict(list)
    for (kind, duration), values in found:
        if len(values["visits"]) == 2:
            pairs[kind, duration].append(values["visits"])
            pairs[kind, "any"].append(values["visits"])
    known = {key: between(of) for key, of in pairs.items() if len(of) >= ENOUGH}
    for (kind, duration), values in found:
        b = known.get((kind, duration), known.get((kind, "any"), UNKNOWN))
        values["low"], values["high"] = _interval(values["visits"], b)
    return {
        f"{kind}, {duration}": {"between": b, "pairs": len(pairs[kind, duration])}
        for (kind, duration), b in sorted(known.items())
    }


def _interval(visits: list[list[float]], b: float) -> tuple[float, float]:
    """The 95 % interval of the visits' geometric mean, skewed as those of the rounds are."""
    count = len(visits)
    mean = math.exp(sum(math.log(median) for median, _, _ in visits) / count)
    apart = NORMAL * b * _scale(mean)
    down = math.hypot(apart, *(math.log(median / low) / count for median, low, _ in visits))
    up = math.hypot(apart, *(math.log(high / median) / count for median, _, high in visits))
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
