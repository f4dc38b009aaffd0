"""What the files of single kernels share: their points, their calls, and GEMMs of the same arithmetic.

The kernels are reached through their operators. "GEMMs, same FLOPs" are products of the same arithmetic with
one plain LoRA of rank k·r: nothing is routed, gathered or combined, so they are a ceiling, not an opponent.
Opponents are the mixture's forms in plain PyTorch, given the same routing as ours, sorted ids included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.alternatives import DenseMasked, GroupedMM
from benchmarks.beside import leave_out_hopeless, timed
from benchmarks.inputs import DTYPES, Problem, Shape, check
from benchmarks.options import Functions, Options, Trial
from benchmarks.record import GEMMS, OURS, Case
from moa_ops import Routing, ops, reference

POINTS = (Shape(512, 1024, 1024, 64), Shape(512, 2048, 2048, 8), Shape(2048, 1024, 1024, 256))
TINY = 16  # a width at which next to nothing is left of one half of the mixture
SHARE = 0.12  # of the budget per case

Call = Callable[[], tuple[Tensor, ...]]
Make = Callable[[Problem], tuple[Functions, dict[int, Tensor]]]


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
    make: Make,
) -> Trial:
    """Ours beside GEMMs and plain PyTorch.

    ``make`` gives the calls by name and what all but the GEMMs must return, by place, in float64.
    """
    case = Case(section, label, dtype, GEMMS, facts={"flop": flop, "bytes": moved})

    def prepare() -> Functions:
        functions, wanted = make(problem())
        seconds = {}
        for name, function in functions.items():
            if name == GEMMS:
                continue
            seconds[name], found = timed(function)
            errors = [check(f"{label}, {name}", found[i], want, DTYPES[dtype]) for i, want in wanted.items()]
            case.variants[name] = {"error": max(errors)}
        del seconds[OURS]
        leave_out_hopeless(case, functions, seconds)
        return functions

    return Trial(case, prepare, (GEMMS, OURS, GroupedMM.name, DenseMasked.name), SHARE)


def mixture(section: str, label: str, shape: Shape, dtype: str, popularity: str = "uniform") -> Trial:
    """``segment_lora`` with a given routing: shrink, then expand-combine."""

    def make(problem: Problem) -> tuple[Functions, dict[int, Tensor]]:
        routing = problem.routing(popularity)
        x, (a, b) = problem.x, plain(problem)
        functions: Functions = {GEMMS: lambda: (x @ a) @ b, OURS: segment_lora(problem, routing)}
        for name, form in forms(problem, routing).items():
            tensors = Tensors(x, problem.lora_A, problem.lora_Bt, routing.weights)
            functions[name] = lambda form=form, tensors=tensors: (form(tensors),)
        return functions, {0: expected(problem, routing)[0]}

    moved = mixture_bytes(shape, dtype, popularity)
    problem = lambda: Problem(shape, DTYPES[dtype])  # noqa: E731
    return beside_gemms(section, label, problem, shape.mixture_flop, moved, dtype, make)


class Tensors(NamedTuple):
    """Of what the mixture is a function: x ``[T, in]``, A ``[E, r, in]``, B ``[E, r, out]``, gates."""

    x: Tensor
    lora_A: Tensor
    lora_Bt: Tensor
    gates: Tensor


def forms(problem: Problem, routing: Routing) -> dict[str, Callable[[Tensors], Tensor]]:
    """The mixture alone in plain PyTorch, its routing given: the best forms of ``alternatives.py``."""
    shape, dtype = problem.shape, problem.dtype
    slots = routing.order.long()
    tokens, ends = slots // shape.top_k, routing.expert_offsets[1:]

    def grouped(t: Tensors) -> Tensor:
        gates = (t.gates.view(-1)[slots, None] * problem.scaling).to(dtype)
        h = F.grouped_mm(t.x[tokens], t.lora_A.transpose(1, 2), offs=ends) * gates
        y = t.x.new_zeros(shape.tokens, shape.out_features)
        return y.index_add(0, tokens, F.grouped_mm(h, t.lora_Bt, offs=ends))

    def dense(t: Tensors) -> Tensor:
        mask = t.gates.new_zeros(shape.tokens, shape.experts).scatter(1, routing.indices, t.gates)
        h = (t.x @ t.lora_A.flatten(0, 1).t()).view(shape.tokens, shape.experts, shape.r)
        h = h * (mask * problem.scaling).to(dtype)[..., None]
        return h.flatten(1) @ t.lora_Bt.flatten(0, 1)

    found = {GroupedMM.name: grouped} if GroupedMM.why_not(problem, train=False) is None else {}
    return {**found, DenseMasked.name: dense}


def backward_of(form: Callable[[Tensors], Tensor], tensors: Tensors, needed: str, grad_y: Tensor) -> Call:
    """The backward of a form alone, again and again over one graph: gradients of "x", "A", "B", "w"."""
    leaves = {n: t.detach().requires_grad_(n in needed) for n, t in zip("xABw", tensors, strict=True)}
    with torch.enable_grad():
        y = form(Tensors(*leaves.values()))
    wanted = [leaves[name] for name in needed]

    def call() -> tuple[Tensor, ...]:
        found = dict(zip(needed, torch.autograd.grad(y, wanted, grad_y, retain_graph=True), strict=True))
        if "B" in found:
            found["B"] = found["B"].transpose(1, 2)
        return tuple(found.get(name) for name in "xABw")

    return call


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
