"""How much slower is a layer with a mixture than the plain layer? Forward, own router, from Python."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.alternatives import ALTERNATIVES, YARDSTICKS
from benchmarks.inputs import DTYPES, Problem, Shape, check
from benchmarks.options import Options
from benchmarks.record import BASE, OURS, Case

POINTS = (
    Shape(512, 2048, 2048, 8),
    Shape(512, 1024, 1024, 8),
    Shape(512, 1024, 1024, 64),
    Shape(2048, 1024, 1024, 256),
    Shape(16, 2048, 2048, 8),
    Shape(1, 2048, 2048, 8),
)
AIMS = {  # the layer / nn.Linear that two AVX-512 cores should reach
    "float32": dict(zip(POINTS, (1.055, 1.095, 1.20, 1.45, 1.09, 1.12), strict=True)),
    "bfloat16": {POINTS[0]: 1.08},
}
DECODE = 16  # up to so many tokens a layer finds its weights in memory, not in the caches: timed cold too


def run(options: Options) -> list[Case]:
    """MoALinear, one plain LoRA and the PyTorch forms, all over one weight, results checked before timing."""
    cases = []
    for dtype in options.dtypes:
        for shape in options.select(POINTS):
            with torch.no_grad():
                cases += _point(shape, dtype, options)
    return cases


def _point(shape: Shape, dtype: str, options: Options) -> list[Case]:
    problem = Problem(shape, DTYPES[dtype])
    x, linear, layer = problem.x, problem.linear, problem.layer
    expected = problem.expected()
    functions: dict[str, Callable[[], object]] = {BASE: lambda: linear(x), OURS: lambda: layer(x)}
    checked: dict[str, dict] = {OURS: {"error": check(OURS, layer(x), expected, problem.dtype)}}
    for kind in ALTERNATIVES:
        if absent := kind.why_not(problem, train=False):
            checked[kind.name] = {"absent": absent}
            continue
        checked[kind.name] = {}
        alternative = kind(problem)
        if kind.same_result:
            checked[kind.name] = {"error": check(kind.name, alternative(x), expected, problem.dtype)}
        functions[kind.name] = lambda alternative=alternative: alternative(x)

    cases = []
    for cache in ("warm", "cold") if shape.tokens <= DECODE and not options.quick else ("warm",):
        case = Case("layer", shape.label, dtype, BASE, cache, yardsticks=list(YARDSTICKS))
        case.facts = {"floor": shape.floor, "aim": AIMS[dtype].get(shape) if cache == "warm" else None}
        case.variants = {name: dict(values) for name, values in checked.items()}
        options.timed(case, functions)
        cases.append(case)
    return cases
