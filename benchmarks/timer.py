"""The one timer of all benchmarks: interleaved, paired samples.

In every round each function is sampled once, so that all of them see the same machine; what a neighbour or
the clock does to one round it does to all. What is reported is the median over rounds of *this function's
time / the baseline's time in the same round*, which is steadier than a ratio of two separate medians.

A sample is preceded by untimed calls of the same function, so each is timed in its own steady state ("warm"),
or by a sweep through a buffer larger than the last cache ("cold"), as a layer deep in a model finds its
weights. Without either, a function would pay for whatever the one before it left in the caches.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

MIN_SAMPLE = 1e-3  # seconds: faster functions are called several times per sample
WARM_UP = 2e-3  # seconds of untimed calls before a warm sample, one call at least
LONG = 0.05  # seconds of a call beyond which it fills the caches itself: no warm-up, and one to calibrate
OUTSIDER, OUTSIDER_ROUNDS = 1.5, 5  # beyond so many times ``beside``'s time: sampled so often
MIN_ROUNDS = 6  # the fewest of which the least and the greatest enclose the median in 95 of 100 runs
FLUSH_BYTES = 128 << 20  # beyond the share of the last cache that a core or two get


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles, the 95 % confidence interval of the median itself, and the least value."""

    median: float
    q1: float
    q3: float
    low: float
    high: float
    least: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The interval is that of the order statistics: nothing is assumed about the distribution."""
        ordered = sorted(values)
        n = len(ordered)
        reach = 0.98 * math.sqrt(n)
        low, high = math.floor((n - 1) / 2 - reach), math.ceil((n - 1) / 2 + reach)
        return cls(
            _quantile(ordered, 0.5),
            _quantile(ordered, 0.25),
            _quantile(ordered, 0.75),
            ordered[max(low, 0)],
            ordered[min(high, n - 1)],
            ordered[0],
        )


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one function, and its paired ratio to the baseline."""

    seconds: Spread
    ratio: Spread
    rounds: int
    calls: int  # per sample
    beside: Spread | None = None  # its paired ratio to ``beside`` of :func:`measure`

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def measure(
    functions: dict[str, Callable[[], object]],
    baseline: str,
    *,
    budget: float,
    beside: str | None = None,
    cold: bool = False,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = 300,
) -> dict[str, Timing]:
    """Times ``functions`` against the one named ``baseline``, for about ``budget`` seconds in all.

    Every round has its own order, so that no function always follows the same one. The garbage collector is
    off meanwhile. With ``beside``, ratios to the function of that name are given too, and functions that are
    far slower than it are sampled in a few of the rounds only. What takes longer than foreseen ends after
    ``min_rounds`` or twice the budget.
    """
    once = {name: _calibrate(function) for name, function in functions.items()}
    calls = {name: 1 if cold else math.ceil(MIN_SAMPLE / once[name]) for name in functions}
    before = {n: 0 if cold or once[n] > LONG else math.ceil(WARM_UP / once[n]) for n in functions}
    flush = _flusher() if cold else None
    sweep = _calibrate(flush) if flush else 0.0
    cost = {name: once[name] * (before[name] + calls[name]) + sweep for name in functions}
    slow = {n for n in functions if beside and n != baseline and once[n] > OUTSIDER * once[beside]}
    deadline = 2 * budget
    budget -= OUTSIDER_ROUNDS * sum(cost[name] for name in slow)
    rounds = round(budget / sum(cost[name] for name in functions if name not in slow))
    rounds = min(max_rounds, max(min_rounds, rounds))
    every = {name: math.ceil(rounds / OUTSIDER_ROUNDS) if name in slow else 1 for name in functions}

    deadline += time.perf_counter()
    samples: dict[str, dict[int, float]] = {name: {} for name in functions}
    names, shuffle = list(functions), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            if number >= min_rounds and time.perf_counter() > deadline:
                break  # it was calibrated in a better moment
            shuffle.shuffle(names)
            for name in names:
                if number % every[name]:
                    continue
                if flush:
                    flush()
                for _ in range(before[name]):
                    functions[name]()
                samples[name][number] = _sample(functions[name], calls[name])
    finally:
        gc.enable()
    return {
        name: Timing(
            Spread.of(list(times.values())),
            _paired(times, samples[baseline]),
            len(times),
            calls[name],
            _paired(times, samples[beside]) if beside else None,
        )
        for name, times in samples.items()
    }


def _paired(mine: dict[int, float], others: dict[int, float]) -> Spread:
    """The ratios within rounds that have both."""
    return Spread.of([mine[number] / others[number] for number in mine])


def _sample(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _calibrate(function: Callable[[], object]) -> float:
    """Warms the function up (three calls and 20 ms, or a long one) and says roughly how long a call takes."""
    deadline = time.perf_counter() + 0.02
    times: list[float] = []
    while not times or (times[0] < LONG and (len(times) < 3 or time.perf_counter() < deadline)):
        times.append(_sample(function, 1))
    return min(times)


def _flusher() -> Callable[[], object]:
    buffer = torch.zeros(FLUSH_BYTES // 4)
    return lambda: buffer.add_(1)


def _quantile(ordered: list[float], q: float) -> float:
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
