"""How fast is gram, ``dB_e = Σ_t dyᵀ s·w·h``? And the whole backward: x, A, B and the gate weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.inputs import DTYPES, Problem, Shape
from benchmarks.kernels import (
    Tensors,
    backward_of,
    beside_gemms,
    expected,
    forms,
    mixture_bytes,
    plain,
    points,
    segment_lora,
    segment_lora_backward,
)
from benchmarks.options import Functions, Options, Trial
from benchmarks.record import GEMMS, OURS
from moa_ops import Routing, reference


def trials(options: Options) -> Iterator[Trial]:
    for dtype, shape in points(options):
        yield gram(shape, dtype)
        yield backward("gram", f"backward {shape.label}", shape, dtype)


def gram(shape: Shape, dtype: str) -> Trial:
    """The gradient of B alone, from h as the forward left it."""

    def make(problem: Problem) -> tuple[Functions, dict[int, Tensor]]:
        routing = problem.routing()
        ours = segment_lora_backward(problem, routing, segment_lora(problem, routing)()[1], "B")
        plain_h, grad_y = problem.x @ plain(problem)[0], problem.grad_y
        others = _others(problem, routing, "B")
        return {GEMMS: lambda: plain_h.t() @ grad_y, OURS: ours, **others}, {
            2: _expected(problem, routing)[2]
        }

    flop = 2 * shape.tokens * shape.top_k * shape.r * shape.out_features
    size = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    moved = size * shape.out_features * (shape.tokens + shape.experts * shape.r)
    moved += 4 * shape.tokens * shape.top_k * shape.r
    problem = lambda: Problem(shape, DTYPES[dtype])  # noqa: E731
    return beside_gemms("gram", f"gram {shape.label}", problem, flop, moved, dtype, make)


def backward(section: str, label: str, shape: Shape, dtype: str, popularity: str = "uniform") -> Trial:
    """All gradients of the mixture: a shrink of grad_y, an expand-combine for x, two grams."""

    def make(problem: Problem) -> tuple[Functions, dict[int, Tensor]]:
        routing = problem.routing(popularity)
        ours = segment_lora_backward(problem, routing, segment_lora(problem, routing)()[1], "xABw")
        x, grad_y, (a, b) = problem.x, problem.grad_y, plain(problem)
        plain_h = x @ a

        def gemms() -> object:
            u = grad_y @ b.t()
            return u @ a.t(), u.t() @ x, plain_h.t() @ grad_y

        functions = {GEMMS: gemms, OURS: ours, **_others(problem, routing, "xABw")}
        return functions, dict(enumerate(_expected(problem, routing)[:4]))

    moved = 2 * mixture_bytes(shape, dtype, popularity)
    problem = lambda: Problem(shape, DTYPES[dtype])  # noqa: E731
    return beside_gemms(section, label, problem, 2 * shape.mixture_flop, moved, dtype, make)


def _others(problem: Problem, routing: Routing, needed: str) -> Functions:
    """The same gradients in plain PyTorch."""
    tensors = Tensors(problem.x, problem.lora_A, problem.lora_Bt, routing.weights)
    return {
        name: backward_of(form, tensors, needed, problem.grad_y)
        for name, form in forms(problem, routing).items()
    }


def _expected(problem: Problem, routing: Routing) -> tuple[Tensor, ...]:
    """Gradients of x, A, B and the gate weights in float64."""
    wide = [t.double() for t in (problem.grad_y, problem.x, problem.lora_A, problem.lora_B, routing.weights)]
    rows = (routing.indices, routing.expert_offsets, routing.order, expected(problem, routing)[1])
    tail = (None, problem.scaling, None, None, None, reference.SOFTMAX, True, True, True, True, True, False)
    return reference.segment_lora_backward(*wide, *rows, *tail)
