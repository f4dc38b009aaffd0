"""What a run was asked to do, and the running of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.machine import DISTURBED, Company
from benchmarks.record import OURS, Case
from benchmarks.timer import MIN_ROUNDS

QUICK_AGAIN = (
    "layer",
    "decode",
    "routing",
    "shrink",
    "expand",
    "gram",
)  # sections that a quick run visits twice
TOO_SLOW = 0.6  # seconds of one call of the baseline; it is called some twenty times, and every form after it
KEPT = 20.0  # seconds of measuring that a run that is ended may lose

Functions = dict[str, Callable[[], object]]


@dataclass
class Trial:
    """A case, and how to make what it times.

    prepare: makes the tensors, checks the results, files what it finds out in ``case`` and returns what is
        to be timed by name; nothing, if there is nothing to time. names: what it may return.
    share: of the budget per case. grad: with gradients. sure: what seems to be lost is measured again.
    compiled: what ``compiling.ahead`` is to compile for it, if anything.
    visits: how often it is measured, all other cases in between; each visit makes its tensors anew and has
        its part of the budget.
    slow: seconds of one call of nn.Linear where the library has no fast product of the dtype, else 0.
    """

    case: Case
    prepare: Callable[[], Functions]
    names: tuple[str, ...] = ()
    share: float = 1.0
    grad: bool = False
    sure: bool = False
    compiled: tuple[Any, ...] | None = None
    visits: int = 2
    slow: float = 0.0


@dataclass
class Options:
    """Settings shared by all sections.

    budget: seconds of timing per case. dtypes: names. points: parts of labels, "T=1+step" for one with both,
    or "2/8": the second of eight parts of every section; empty selects all. limit: seconds after which no
    further case is begun. done: what is measured, by key; a case that is there already is taken as it is.
    keep: called every KEPT seconds, and after the last case. build: time the build too.
    """

    quick: bool = False
    budget: float = 10.0
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    points: tuple[str, ...] = ()
    threads: int = 2
    limit: float = float("inf")
    done: dict[tuple[str, ...], Case] = field(default_factory=dict)
    keep: Callable[[], None] = lambda: None
    build: bool = False
    left: int = 0  # visits that the limit cut off
    too_slow: list[tuple[str, ...]] = field(default_factory=list)  # keys of what was left out for it
    started: float = field(default_factory=time.perf_counter)

    def select(self, trials: Iterable[Trial]) -> list[Trial]:
        """Those whose label is asked for by ``points``, and that are not too slow."""
        numbered = enumerate(trials)
        asked = [t for i, t in numbered if not self.points or any(_asked(t, i, p) for p in self.points)]
        self.too_slow = [t.case.key for t in asked if t.slow > TOO_SLOW]
        return [t for t in asked if t.slow <= TOO_SLOW]

    def run(self, trials: Iterable[Trial]) -> list[Case]:
        """The cases of the trials that are asked for, measured as far as the time limit allows.

        First all of them, then, far from their first visit, those that are visited again.
        """
        chosen, kept = self.select(trials), time.perf_counter()
        for trial in chosen:
            if was := self.done.get(trial.case.key):  # by an earlier run: its case takes over what it found
                trial.case.variants, trial.case.facts, trial.case.visits = was.variants, was.facts, was.visits
                self.done[trial.case.key] = trial.case
        for visit in range(max(map(self._visits, chosen), default=0)):
            for trial in chosen:
                if self._visits(trial) <= visit or trial.case.visits > visit:
                    continue
                if time.perf_counter() - self.started > self.limit:
                    self.left += 1
                    continue
                self._visit(trial)
                self.done[trial.case.key] = trial.case
                kept = self._keep(kept)
        self.keep()
        return [trial.case for trial in chosen if trial.case.key in self.done]

    def _visits(self, trial: Trial) -> int:
        return 1 if self.quick and trial.case.section not in QUICK_AGAIN else trial.visits

    def _keep(self, last: float) -> float:
        """Keeps what is measured, if not just done: a grid takes long to write. When it was done last."""
        now = time.perf_counter()
        if now - last < KEPT:
            return last
        self.keep()
        return now

    def _visit(self, trial: Trial) -> None:
        """Measures the case; if it was before, both count."""
        case, budget = trial.case, self.budget * trial.share / self._visits(trial)
        before, case.variants = case.variants, {}
        with torch.set_grad_enabled(trial.grad):
            functions = trial.prepare()
            if functions:
                self._timed(case, functions, budget)
            if trial.sure and (lead := case.lead()) and lead["median"] < 1:
                near = [n for n, values in case.timed().items() if values["beside"]["median"] < 1.1]
                near = {case.baseline, OURS, *near}.difference(case.yardsticks)
                self._timed(case, {name: functions[name] for name in functions if name in near}, 4 * budget)
        self._say(case)
        case.join(before)
        case.visits += 1

    def _timed(self, case: Case, functions: Functions, budget: float) -> None:
        """Times the case, once more if others were at work meanwhile."""
        others = self._once(case, functions, budget)
        if others > DISTURBED:
            again = replace(case, variants={name: dict(values) for name, values in case.variants.items()})
            if (calmer := self._once(again, functions, budget)) < others:
                case.variants, others = again.variants, calmer
        case.facts["others_percent"] = max(
            others, case.facts.get("others_percent", 0.0) if case.visits else 0.0
        )

    def _once(self, case: Case, functions: Functions, budget: float) -> float:
        """Times the case; the per cent of the cores that others took meanwhile."""
        company = Company()
        case.time(functions, budget, min_rounds=3 if self.quick else MIN_ROUNDS)
        return company.percent()["others_percent"] or 0.0

    def _say(self, case: Case) -> None:
        """One line on stderr."""
        ratio, lead = case.ratio(OURS), case.lead()
        text = f"{ratio:.3f} × {case.baseline}" if ratio else ""
        text += f", best alternative {lead['median']:.2f} × ours" if lead else ""
        if case.facts.get("others_percent", 0) > DISTURBED:
            text += f" (others took {case.facts['others_percent']:.0f} % of the cores)"
        what = f"{case.section:<9} {case.label:<38} {case.dtype:<9} {case.cache}"
        print(f"{time.perf_counter() - self.started:5.0f} s  {what}  {text}", file=sys.stderr, flush=True)


def _asked(trial: Trial, number: int, point: str) -> bool:
    """Whether every part of ``point`` is a word of the label, without "=" a part of it; or as a fraction."""
    part, _, parts = point.partition("/")
    if part.isdigit() and parts.isdigit():
        return number % max(1, int(parts)) == int(part) - 1
    label = trial.case.label
    return all(word in label.split() or ("=" not in word and word in label) for word in point.split("+"))
