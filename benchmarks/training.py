"""How much slower is a training step? Base frozen, gradients of x, of the router and of the adapters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.alternatives import ALTERNATIVES, YARDSTICKS, GatherBmm, Loop
from benchmarks.inputs import DTYPES, Problem, Shape, check
from benchmarks.options import Options
from benchmarks.record import BASE, OURS, Case

POINTS = (Shape(512, 2048, 2048, 8), Shape(512, 1024, 1024, 64))
AIMS = dict(zip(POINTS, (1.12, 1.32), strict=True))  # float32, two AVX-512 cores
KINDS = tuple(kind for kind in ALTERNATIVES if kind not in (GatherBmm, Loop))  # the loop is never the best


def run(options: Options) -> list[Case]:
    """Every gradient of every variant is checked against float64 before it is timed."""
    return [_point(shape, dtype, options) for dtype in options.dtypes for shape in options.select(POINTS)]


def step(function: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor], grad_y: Tensor):
    """One forward and backward; the gradients as a tuple: x first."""
    return torch.autograd.grad(function(x), [x, *parameters], grad_y)


def _point(shape: Shape, dtype: str, options: Options) -> Case:
    problem = Problem(shape, DTYPES[dtype])
    x, grad_y = problem.x.clone().requires_grad_(), problem.grad_y
    linear, layer = problem.linear, problem.layer
    ours = [layer.lora_A, layer.lora_B, layer.router.weight]
    expected = problem.expected_gradients()
    case = Case("training", shape.label, dtype, BASE, yardsticks=list(YARDSTICKS))
    case.facts = {"floor": shape.training_floor, "aim": AIMS[shape] if dtype == "float32" else None}

    def checked(name: str, gradients: tuple[Tensor, ...]) -> dict[str, float]:
        pairs = zip(expected.items(), gradients, strict=True)
        return {"error": max(check(f"{name}, {of}", got, want, problem.dtype) for (of, want), got in pairs)}

    case.variants[OURS] = checked(OURS, step(layer, x, ours, grad_y))
    functions: dict[str, Callable[[], object]] = {
        BASE: lambda: step(linear, x, [], grad_y),
        OURS: lambda: step(layer, x, ours, grad_y),
    }
    for kind in KINDS:
        if absent := kind.why_not(problem, train=True):
            case.variants[kind.name] = {"absent": absent}
            continue
        case.variants[kind.name] = {}
        alternative = kind(problem, train=True)
        if kind.same_result:
            dx, dA, dB, dr = step(alternative, x, alternative.parameters(), grad_y)
            case.variants[kind.name] = checked(kind.name, (dx, dA, dB.transpose(1, 2), dr))
        functions[kind.name] = lambda f=alternative: step(f, x, f.parameters(), grad_y)
    options.timed(case, functions)
    return case
