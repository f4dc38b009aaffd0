"""A layer at one point beside ``nn.Linear`` and every form in plain PyTorch: shared by the layer files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.alternatives import ALTERNATIVES, COMPILABLE, COMPILED, YARDSTICKS, Alternative
from benchmarks.inputs import CACHE, DTYPES, Problem, Shape, check
from benchmarks.machine import SLOW_GEMM, library_rate
from benchmarks.options import Functions, Trial
from benchmarks.record import BASE, OURS, Case

LONG = 0.2  # seconds of a call beyond which warming up does not matter
HOPELESS, WORTH = 4.0, 0.1  # left out: a call beyond so many times the best one's, and so many seconds
CERTAIN = 3.0  # so many times beyond both, chance is no explanation: it is not called again
COMPILED_GAINS = 2.5  # compiled are forms whose time uncompiled is within so many times the best one's
COMPARED = 5  # calls of each compiled form, to find the fastest
NAMES = (BASE, OURS, *(kind.name for kind in ALTERNATIVES), COMPILED)


def step(function: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor], grad_y: Tensor):
    """One forward and backward; the gradients as a tuple: x first."""
    return torch.autograd.grad(function(x), [x, *parameters], grad_y)


def trial(
    section: str,
    shape: Shape,
    dtype: str,
    *,
    train: bool = False,
    cache: str = "warm",
    aim: float | None = None,
    compile: bool = False,
    label: str | None = None,
    share: float = 1.0,
    sure: bool = False,
    visits: int = 2,
) -> Trial:
    """Forward without gradients; with ``train`` a step, base frozen, gradients of x, router, adapters."""
    case = Case(section, label or shape.label, dtype, BASE, cache, yardsticks=list(YARDSTICKS))
    moved = shape.extra_bytes(DTYPES[dtype].itemsize, train)
    case.facts = {
        "floor": shape.training_floor if train else shape.floor,
        "moved": moved if cache == "cold" or moved > CACHE else 0,
        "aim": aim,
        "train": train,
        "shape": asdict(shape),
    }
    names = NAMES if compile else NAMES[:-1]
    job = (shape, dtype, train) if compile else None
    prepare = lambda: _prepare(case, shape, train, compile)  # noqa: E731
    return Trial(case, prepare, names, share, train, sure, job, visits, _slow(shape, dtype, train))


def _slow(shape: Shape, dtype: str, train: bool) -> float:
    """Seconds of a call of nn.Linear, as :class:`Trial` wants them."""
    rates = [library_rate(dtype, gradient) for gradient in ((False, True) if train else (False,))]
    return sum(1e-9 * shape.base_flop / rate for rate in rates if rate < SLOW_GEMM)


class Point:
    """The tensors of a point, and what is called there."""

    def __init__(self, problem: Problem, train: bool) -> None:
        self.problem, self.train = problem, train
        self.x = problem.x.clone().requires_grad_() if train else problem.x

    def call(self, function: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> Callable[[], object]:
        x, grad_y = self.x, self.problem.grad_y
        return (lambda: step(function, x, parameters, grad_y)) if self.train else (lambda: function(x))

    def seconds(self, function: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> float:
        """Roughly how long a call takes: the shorter of the first two."""
        call = self.call(function, parameters)
        return _again(call, timed(call)[0])

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """What everybody is to find, in float64."""
        return self.problem.expected_gradients() if self.train else {"y": self.problem.expected()}

    def check(self, name: str, result: object) -> float:
        """The largest relative error; raises where one is too large."""
        dtype = self.problem.dtype
        found = dict(zip(self.expected, result if self.train else (result,), strict=True))
        if "lora_B" in found and name != OURS:
            found["lora_B"] = found["lora_B"].transpose(1, 2)
        return max(check(f"{name}, {key}", found[key], want, dtype) for key, want in self.expected.items())


def _prepare(case: Case, shape: Shape, train: bool, compile: bool) -> Functions:
    """Every result, and every gradient, is compared with float64 before it is timed for the first time."""
    point = Point(Problem(shape, DTYPES[case.dtype]), train)
    problem, layer = point.problem, point.problem.layer
    ours = point.call(layer, [layer.lora_A, layer.lora_B, layer.router.weight])
    functions: Functions = {BASE: point.call(problem.linear, []), OURS: ours}
    case.variants[OURS] = _checked(case, point, OURS, ours())
    seconds: dict[type[Alternative], float] = {}
    for kind in ALTERNATIVES:
        if absent := kind.why_not(problem, train):
            case.variants[kind.name] = {"absent": absent}
            continue
        alternative = kind(problem, train)
        function = point.call(alternative, alternative.parameters())
        took, result = timed(function)
        took = _again(function, took)
        case.variants[kind.name] = _checked(case, point, kind.name, result) if kind.same_result else {}
        functions[kind.name] = function
        if kind.same_result:
            seconds[kind] = took
    leave_out_hopeless(case, functions, {kind.name: took for kind, took in seconds.items()})
    if compile:
        seconds = {kind: took for kind, took in seconds.items() if kind.name in functions}
        _add_compiled(case, point, functions, seconds)
    return functions


def leave_out_hopeless(case: Case, functions: Functions, seconds: dict[str, float]) -> None:
    """Takes those that would cost much time, and are far behind, out of ``functions``; the case says so.

    seconds: of the forms in plain PyTorch, about what a call took.
    """
    least = min(seconds.values(), default=0.0)
    hopeless = max(HOPELESS * least, WORTH)
    for name, took in seconds.items():
        if hopeless < took < CERTAIN * hopeless:  # against chance
            took = min(took, timed(functions[name])[0])
        if took > hopeless:
            case.variants[name]["absent"] = f"a call took {took / least:.0f} × the best one's"
            del functions[name]


def _checked(case: Case, point: Point, name: str, result: object) -> dict[str, float]:
    """The error of a result, on the first visit: on the second the same tensors give the same."""
    return {} if case.visits else {"error": point.check(name, result)}


def timed(function: Callable[[], object]) -> tuple[float, object]:
    """Seconds of a call, and what it returned."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def _again(function: Callable[[], object], took: float) -> float:
    """The shorter of what it took and what it takes again, if that is not long."""
    return min(took, timed(function)[0]) if took < LONG else took


def _add_compiled(
    case: Case, point: Point, functions: Functions, seconds: dict[type[Alternative], float]
) -> None:
    """``torch.compile`` of the forms that may win by it; the fastest of them stays."""
    torch.compiler.reset()  # what was compiled for the case before
    failed, found = [], {}
    for kind in worth_compiling(seconds):
        alternative = kind(point.problem, point.train)
        function = point.call(torch.compile(alternative, dynamic=False), alternative.parameters())
        try:
            checked = _checked(case, point, COMPILED, function())
        except Exception as reason:  # whatever stops the compiler is what is to be reported
            failed.append(f"{kind.name}: {_gist(reason)}")
            continue
        took = min(timed(function)[0] for _ in range(COMPARED))
        found[took] = function, {**checked, "of": kind.name}
    if found:
        functions[COMPILED], values = found[min(found)]
        case.variants[COMPILED] = {**values, "failed": failed}
    else:
        behind = f"what compiles takes over {COMPILED_GAINS:g} × the best one's time uncompiled"
        case.variants[COMPILED] = {"absent": "; ".join(failed) or behind}


def worth_compiling(seconds: dict[type[Alternative], float]) -> list[type[Alternative]]:
    """The forms that may win by being compiled: which compile at all, and are near the best uncompiled."""
    near = COMPILED_GAINS * min(seconds.values())
    return [kind for kind in COMPILABLE if seconds.get(kind, near + 1) <= near]


def _gist(reason: Exception) -> str:
    lines: Iterator[str] = (line.strip() for line in str(reason).splitlines())
    return next((line for line in lines if line), type(reason).__name__)[:120]
