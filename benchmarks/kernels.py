"""What the files of single kernels share: their points, their calls, and GEMMs of the same arithmetic.

The kernels are reached through their operators. "GEMMs, same FLOPs" are products of the same arithmetic with
one plain LoRA of rank k·r: nothing is routed, gathered or combined, so they are a ceiling, not an opponent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.inputs import DTYPES, Problem, Shape, check
from benchmarks.options import Functions, Options, Trial
from benchmarks.record import GEMMS, OURS, Case
from moa_ops import Routing, ops, reference

POINTS = (Shape(512, 1024, 1024, 64), Shape(512, 2048, 2048, 8), Shape(2048, 1024, 1024, 256))
TINY = 16  # a width at which next to nothing is left of one half of the mixture
SHARE = 0.12  # of the budget per case

Call = Callable[[], tuple[Tensor, ...]]


def points(options: Options) -> Iterator[tuple[str, Shape]]:
    """Types and shapes; one shape in a quick run."""
    for dtype in options.dtypes:
        for shape in POINTS[:1] if options.quick else POINTS:
            yield dtype, shape


def beside_gemms(
    section: str,
    label: str,
    problem: Callable[[], Problem],
    flop: int,
    moved: int,
    dtype: str,
    make: Callable[[Problem], tuple[Call, Callable[[], object], dict[int, Tensor]]],
) -> Trial:
    """Ours beside GEMMs. ``make`` gives our call, theirs, and what ours must return, by place, in float64."""
    case = Case(section, label, dtype, GEMMS, facts={"flop": flop, "bytes": moved})

    def prepare() -> Functions:
        ours, gemms, expected = make(problem())
        found = ours()
        errors = [check(label, found[i], want, DTYPES[dtype]) for i, want in expected.items()]
        case.variants[OURS] = {"error": max(errors)}
        return {GEMMS: gemms, OURS: ours}

    return Trial(case, prepare, (GEMMS, OURS), SHARE)


def mixture(section: str, label: str, shape: Shape, dtype: str, popularity: str = "uniform") -> Trial:
    """``segment_lora`` with a given routing: shrink, then expand-combine."""

    def make(problem: Problem) -> tuple[Call, Callable[[], object], dict[int, Tensor]]:
        routing = problem.routing(popularity)
        x, (a, b) = problem.x, plain(problem)
        return segment_lora(problem, routing), lambda: (x @ a) @ b, {0: expected(problem, routing)[0]}

    moved = mixture_bytes(shape, dtype, popularity)
    problem = lambda: Problem(shape, DTYPES[dtype])  # noqa: E731
    return beside_gemms(section, label, problem, shape.mixture_flop, moved, dtype, make)


def segment_lora(problem: Problem, routing: Routing) -> Call:
    """The operator: y and h."""
    gates = (routing.weights, routing.expert_offsets, routing.order)
    tail = (None, problem.scaling, None, None, None)
    return lambda: ops.segment_lora(problem.x, problem.lora_A, problem.lora_B, *gates, *tail)


def segment_lora_backward(problem: Problem, routing: Routing, h: Tensor, needed: str) -> Call:
    """The operator: gradients of what ``needed`` names, letters of "x", "A", "B", "w" (the gate weights)."""
    gates = (routing.weights, routing.indices, routing.expert_offsets, routing.order)
    want = tuple(letter in needed for letter in "xABw")
    tail = (None, problem.scaling, None, None, None, reference.SOFTMAX, True, *want, False)
    tensors = (problem.grad_y, problem.x, problem.lora_A, problem.lora_B)
    return lambda: ops.segment_lora_backward(*tensors, *gates, h, *tail)


def expected(problem: Problem, routing: Routing) -> tuple[Tensor, Tensor]:
    """y and h in float64."""
    tensors = (problem.x, problem.lora_A, problem.lora_B, routing.weights)
    wide = [tensor.double() for tensor in tensors]
    return reference.segment_lora(*wide, routing.expert_offsets, routing.order, scaling=problem.scaling)


def plain(problem: Problem) -> tuple[Tensor, Tensor]:
    """``[in, k·r]`` and ``[k·r, out]``: the adapters of the first k experts, side by side."""
    k = problem.shape.top_k
    a = problem.lora_A[:k].flatten(0, 1).t()
    return a, problem.lora_B[:k].transpose(1, 2).flatten(0, 1).contiguous()


def mixture_bytes(shape: Shape, dtype: str, popularity: str = "uniform") -> int:
    """Read once: x and the adapters that are used; written once: y."""
    used = min(shape.experts, shape.tokens * shape.top_k) if popularity != "one hot" else shape.top_k
    values = shape.tokens * (shape.in_features + shape.out_features)
    values += used * shape.r * (shape.in_features + shape.out_features)
    return values * torch.empty(0, dtype=DTYPES[dtype]).element_size()
