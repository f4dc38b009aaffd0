"""What a run was asked to do."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from benchmarks.inputs import Shape
from benchmarks.machine import DISTURBED, Company
from benchmarks.record import OURS, Case

T = TypeVar("T", bound=Shape)


@dataclass
class Options:
    """Settings shared by all sections.

    budget: seconds of timing per case. points: parts of labels; empty selects all. dtypes: names.
    """

    quick: bool = False
    budget: float = 10.0
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    points: tuple[str, ...] = ()
    threads: int = 2
    started: float = field(default_factory=time.perf_counter)

    def select(self, shapes: Iterable[T]) -> list[T]:
        """The shapes whose label contains one of ``points``."""
        return [s for s in shapes if not self.points or any(part in s.label for part in self.points)]

    def timed(self, case: Case, functions: dict[str, Callable[[], object]], share: float = 1.0) -> None:
        """Times the case with ``share`` of the budget, once more if it was disturbed; says so on stderr."""
        others = self._once(case, functions, self.budget * share)
        if others > DISTURBED:
            again = replace(case, variants={name: dict(values) for name, values in case.variants.items()})
            if (calmer := self._once(again, functions, self.budget * share)) < others:
                case.variants, others = again.variants, calmer
        case.facts["others_percent"] = others
        ratio = case.ratio(OURS)
        text = f"{ratio:.3f} × {case.baseline}" if ratio else ""
        if others > DISTURBED:
            text += f" (others took {others:.0f} % of the cores)"
        what = f"{case.section:<9} {case.label:<38} {case.dtype:<9} {case.cache}"
        print(f"{time.perf_counter() - self.started:5.0f} s  {what}  {text}", file=sys.stderr, flush=True)

    @staticmethod
    def _once(case: Case, functions: dict[str, Callable[[], object]], budget: float) -> float:
        """Times the case; the per cent of the cores that others took meanwhile."""
        company = Company()
        case.time(functions, budget)
        return company.percent()["others_percent"] or 0.0
