"""How fast is each kernel alone? GF/s and GB/s beside PyTorch's routing and beside GEMMs of the same FLOPs.

The kernels are reached through their operators. Shrink is the mixture with 16 outputs, expand-combine that
with 16 inputs: next to nothing is left of the other half. "GEMMs, same FLOPs" are the products of one plain
LoRA of rank k·r: nothing is routed, gathered or combined, so they are a ceiling rather than an opponent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import DTYPES, Problem, Shape, check
from benchmarks.options import Options
from benchmarks.record import GEMMS, OURS, Case
from moa_ops import ops, reference

POINTS = (Shape(512, 2048, 2048, 8), Shape(512, 1024, 1024, 64), Shape(2048, 1024, 1024, 256))
TINY = 16
PYTORCH = "PyTorch"


def run(options: Options) -> list[Case]:
    """Routing on float32 logits; the other kernels in every dtype."""
    shapes = options.select(POINTS[1:] if options.quick else POINTS)
    cases = []
    with torch.no_grad():
        for shape in shapes:
            cases.append(_topk_routing(shape, options))
        for dtype in options.dtypes:
            for shape in shapes:
                cases.append(_linear_routing(shape, dtype, options))
                cases.append(_mixture("shrink", replace(shape, out_features=TINY), dtype, options))
                cases.append(_mixture("expand-combine", replace(shape, in_features=TINY), dtype, options))
                cases.append(_mixture("segment_lora", shape, dtype, options))
                if not options.quick:
                    cases.append(_mixture("segment_lora, Zipf", shape, dtype, options, "zipf"))
                cases.append(_backward(shape, dtype, options))
    return cases


def pytorch_routing(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax over the chosen, and the sort by expert: weights, indices, expert_offsets, order."""
    top, indices = logits.topk(top_k)
    flat = indices.view(-1)
    order = flat.argsort(stable=True)
    offsets = F.pad(torch.bincount(flat, minlength=logits.shape[1]).cumsum(0, dtype=torch.int32), (1, 0))
    return torch.softmax(top, -1), indices, offsets, order


def _topk_routing(shape: Shape, options: Options) -> Case:
    logits = torch.randn(shape.tokens, shape.experts, generator=torch.Generator().manual_seed(0))
    case = Case("kernels", f"topk_routing T={shape.tokens} E={shape.experts}", "float32", PYTORCH)
    case.facts = {"tokens": shape.tokens, "bytes": logits.nbytes + shape.tokens * shape.top_k * 16}
    ours = ops.topk_routing(logits, shape.top_k, reference.SOFTMAX, True, None, None)
    theirs = pytorch_routing(logits, shape.top_k)
    if not all(torch.equal(a, b.to(a.dtype)) for a, b in zip(ours[1:], theirs[1:], strict=True)):
        raise ArithmeticError(f"{case.label}: the routing differs from PyTorch's")
    functions = {
        PYTORCH: lambda: pytorch_routing(logits, shape.top_k),
        OURS: lambda: ops.topk_routing(logits, shape.top_k, reference.SOFTMAX, True, None, None),
    }
    options.timed(case, functions, share=0.1)
    return case


def _linear_routing(shape: Shape, dtype: str, options: Options) -> Case:
    problem = Problem(shape, DTYPES[dtype])
    x, router = problem.x, problem.router_weight
    case = Case("kernels", f"linear_routing {shape.label}", dtype, PYTORCH)
    case.facts = {
        "tokens": shape.tokens,
        "flop": 2 * shape.tokens * shape.in_features * shape.experts,
        "bytes": x.nbytes + router.nbytes,
    }
    functions = {
        PYTORCH: lambda: pytorch_routing(F.linear(x.float(), router), shape.top_k),
        OURS: lambda: ops.linear_routing(x, router, shape.top_k, reference.SOFTMAX, True, None, None),
    }
    check(case.label, functions[OURS]()[0], x.double() @ router.double().t(), torch.float32)
    options.timed(case, functions, share=0.2)
    return case


def _mixture(name: str, shape: Shape, dtype: str, options: Options, popularity: str = "uniform") -> Case:
    problem = Problem(shape, DTYPES[dtype])
    call = _segment_lora(problem, popularity)
    x, (a, b) = problem.x, _plain(problem)
    case = Case("kernels", f"{name} {shape.label}", dtype, GEMMS)
    case.facts = {"tokens": shape.tokens, "flop": shape.mixture_flop, "bytes": _bytes(problem)}
    functions: dict[str, Callable[[], object]] = {GEMMS: lambda: (x @ a) @ b, OURS: call}
    options.timed(case, functions, share=0.2)
    return case


def _backward(shape: Shape, dtype: str, options: Options) -> Case:
    """Gradients of x, A, B and of the gate weights, from the mixture alone."""
    problem = Problem(shape, DTYPES[dtype])
    x, grad_y, routing = problem.x, problem.grad_y, problem.routing()
    _, h = _segment_lora(problem)()
    gates = (routing.weights, routing.indices, routing.expert_offsets, routing.order)
    tail = (None, problem.scaling, None, None, None, reference.SOFTMAX, True, True, True, True, True, False)
    a, b = _plain(problem)
    plain_h = x @ a

    def gemms() -> object:
        u = grad_y @ b.t()
        return u @ a.t(), u.t() @ x, plain_h.t() @ grad_y

    case = Case("kernels", f"backward {shape.label}", dtype, GEMMS)
    case.facts = {"tokens": shape.tokens, "flop": 2 * shape.mixture_flop, "bytes": 2 * _bytes(problem)}
    functions: dict[str, Callable[[], object]] = {
        GEMMS: gemms,
        OURS: lambda: ops.segment_lora_backward(grad_y, x, problem.lora_A, problem.lora_B, *gates, h, *tail),
    }
    options.timed(case, functions, share=0.3)
    return case


def _segment_lora(problem: Problem, popularity: str = "uniform") -> Callable[[], tuple[Tensor, Tensor]]:
    routing = problem.routing(popularity)
    gates = (routing.weights, routing.expert_offsets, routing.order)
    tail = (None, problem.scaling, None, None, None)
    return lambda: ops.segment_lora(problem.x, problem.lora_A, problem.lora_B, *gates, *tail)


def _plain(problem: Problem) -> tuple[Tensor, Tensor]:
    """``[in, k·r]`` and ``[k·r, out]``: the adapters of the first k experts, side by side."""
    k = problem.shape.top_k
    a = problem.lora_A[:k].flatten(0, 1).t()
    return a, problem.lora_B[:k].transpose(1, 2).flatten(0, 1).contiguous()


def _bytes(problem: Problem) -> int:
    """Read once: x and the adapters; written once: y."""
    size = problem.x.element_size()
    return problem.x.nbytes + (problem.shape.adapter_values + problem.grad_y.numel()) * size
