"""How fast is routing? Top-k with the sort by expert, and the router's product with it, beside PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import DTYPES, Problem, Shape, check
from benchmarks.kernels import SHARE, points
from benchmarks.options import Functions, Options, Trial
from benchmarks.record import OURS, Case
from moa_ops import ops, reference

PYTORCH = "PyTorch"


def trials(options: Options) -> Iterator[Trial]:
    """Routing on float32 logits once per shape; with the product, in every dtype."""
    for dtype, shape in points(options):
        if dtype == options.dtypes[0]:
            yield topk(shape)
        yield linear(shape, dtype)


def pytorch_routing(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax over the chosen, and the sort by expert: weights, indices, expert_offsets, order."""
    top, indices = logits.topk(top_k)
    flat = indices.view(-1)
    order = flat.argsort(stable=True)
    offsets = F.pad(torch.bincount(flat, minlength=logits.shape[1]).cumsum(0, dtype=torch.int32), (1, 0))
    return torch.softmax(top, -1), indices, offsets, order


def topk(shape: Shape) -> Trial:
    """Logits given."""
    case = Case("routing", f"topk_routing T={shape.tokens} E={shape.experts}", "float32", PYTORCH)
    case.facts = {"bytes": 4 * shape.tokens * shape.experts + shape.tokens * shape.top_k * 16}

    def prepare() -> Functions:
        logits = torch.randn(shape.tokens, shape.experts, generator=torch.Generator().manual_seed(0))
        functions: Functions = {
            PYTORCH: lambda: pytorch_routing(logits, shape.top_k),
            OURS: lambda: ops.topk_routing(logits, shape.top_k, reference.SOFTMAX, True, None, None),
        }
        _same(case.label, functions[OURS](), functions[PYTORCH]())
        return functions

    return Trial(case, prepare, (PYTORCH, OURS), SHARE)


def linear(shape: Shape, dtype: str) -> Trial:
    """From x: logits in float32, and the routing."""
    case = Case("routing", f"linear_routing {shape.label}", dtype, PYTORCH)
    size = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    case.facts = {
        "flop": 2 * shape.tokens * shape.in_features * shape.experts,
        "bytes": size * shape.tokens * shape.in_features + 4 * shape.experts * shape.in_features,
    }

    def prepare() -> Functions:
        problem = Problem(shape, DTYPES[dtype])
        x, router = problem.x, problem.router_weight
        functions: Functions = {
            PYTORCH: lambda: pytorch_routing(F.linear(x.float(), router), shape.top_k),
            OURS: lambda: ops.linear_routing(x, router, shape.top_k, reference.SOFTMAX, True, None, None),
        }
        logits, *routing = functions[OURS]()
        check(case.label, logits, x.double() @ router.double().t(), torch.float32)
        _same(case.label, routing, functions[PYTORCH]())
        return functions

    return Trial(case, prepare, (PYTORCH, OURS), SHARE)


def _same(label: str, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """Indices, offsets and order to the bit, the weights within rounding."""
    if not all(torch.equal(a, b.to(a.dtype)) for a, b in zip(ours[1:], theirs[1:], strict=True)):
        raise ArithmeticError(f"{label}: the routing differs from PyTorch's")
    check(label, ours[0], theirs[0].double(), torch.float32)
