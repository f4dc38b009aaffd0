"""How far two runs of the same code are apart, and what of a difference is more than that.

The rounds of one run say how well its median is known *for the memory that its tensors happened to get*.
Other memory, or another process, gives another median: 9 medians of each of 12 figures (3 processes, 3 times
fresh tensors in each; T = 1 to 512, E = 8 and 64, float32, two Zen 4 cores) scattered by 1 to 10 %, where the
rounds of each promised 0.4 to 1.1 %. The rounds are uncorrelated (+0.03), so blocks of them promise the same.
What describes the 12 figures is a part of the whole time, ``COMMON``, and a larger one of what the baseline
has no share in, ``EXTRA``. Tried on four other runs (12 points, float32 and bfloat16, 384 pairs of figures):
by the rounds alone 66 % of the pairs agree within their 95 % intervals, with these two terms 94 %.

A record holds what the rounds say; every judgement on it uses the wider interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.record import Case

COMMON = 0.01  # relative standard deviation between runs, of the time as a whole
EXTRA = 0.12  # and of the part by which it differs from the baseline's
NORMAL = 1.96  # standard deviations in half of a 95 % interval


def between_runs(ratio: float) -> float:
    """Relative standard deviation of a ratio to the baseline from run to run, beside what its rounds say."""
    return math.hypot(COMMON, EXTRA * (1 - 1 / ratio))


def stated(values: dict[str, float], further: float) -> dict[str, float]:
    """A spread of the record, its interval widened by a relative standard deviation; if none, unbounded."""
    median, wider = values["median"], NORMAL * further
    down = math.hypot(math.log(median / values["low"]), wider) if values.get("low") else math.inf
    up = math.hypot(math.log(values["high"] / median), wider) if "high" in values else math.inf
    return {**values, "low": median * math.exp(-down), "high": median * math.exp(up)}


def stated_ratio(values: dict[str, float]) -> dict[str, float]:
    """A variant's ratio to the baseline with the interval in which another run has it."""
    return stated(values, between_runs(values["median"]))


@dataclass(frozen=True)
class Change:
    """A ratio to the baseline in two runs."""

    key: tuple[str, str, str, str]
    variant: str
    before: dict[str, float]
    after: dict[str, float]

    @property
    def factor(self) -> float:
        """After ÷ before."""
        return self.after["median"] / self.before["median"]

    @property
    def certain(self) -> bool:
        """The intervals do not touch, which two runs of the same code do in one of 150 cases."""
        a, b = stated_ratio(self.before), stated_ratio(self.after)
        return a["high"] < b["low"] or b["high"] < a["low"]

    @property
    def expected(self) -> bool:
        """Within what 95 of 100 pairs of runs of the same code show."""
        lower, upper = sorted((self.before, self.after), key=lambda values: values["median"])
        a, b = stated_ratio(lower), stated_ratio(upper)
        reach = math.hypot(math.log(a["high"] / a["median"]), math.log(b["median"] / b["low"]))
        return math.log(b["median"] / a["median"]) <= reach


def pairs(before: Iterable[Case], after: Iterable[Case]) -> Iterator[Change]:
    """Every variant, the baselines aside, that both runs timed at the same point with an interval."""
    old = {case.key: case.timed() for case in before}
    for case in after:
        for name, values in case.timed().items():
            was: dict[str, Any] = old.get(case.key, {}).get(name, {})
            if name != case.baseline and all("low" in v.get("ratio", {}) for v in (was, values)):
                yield Change(case.key, name, was["ratio"], values["ratio"])
