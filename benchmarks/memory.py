"""How much does a layer keep alive for its backward? Bytes saved by autograd, x and the parameters aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from benchmarks.alternatives import ALTERNATIVES
from benchmarks.inputs import DTYPES, Problem, Shape
from benchmarks.options import Options, Trial
from benchmarks.record import BASE, OURS, Case

POINT = Shape(2048, 2048, 2048, 8)
AIM = 3e6  # bytes, float32


def trials(options: Options) -> Iterator[Trial]:
    """Ours beside the alternatives, at T=2048, 2048→2048, E=8. Nothing is timed."""
    for dtype in options.dtypes:
        case = Case("memory", POINT.label, dtype, BASE, facts={"aim": AIM if dtype == "float32" else None})
        yield Trial(case, lambda case=case: _measure(case) or {}, grad=True, visits=1)


def saved_bytes(function: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes of the storages that the graph of ``function()`` keeps, those of ``known`` not counted."""
    free = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in free:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor  # and so alive, and its address its own, as long as the graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    del y
    return sum(saved.values())


def _measure(case: Case) -> None:
    problem = Problem(POINT, DTYPES[case.dtype])
    x = problem.x.clone().requires_grad_()
    case.facts["x"] = x.nbytes
    layer = problem.layer
    case.variants[BASE] = {"bytes": saved_bytes(lambda: problem.linear(x), [x, problem.linear.weight])}
    case.variants[OURS] = {"bytes": saved_bytes(lambda: layer(x), [x, *layer.parameters()])}
    for kind in ALTERNATIVES:
        if absent := kind.why_not(problem, train=True):
            case.variants[kind.name] = {"absent": absent}
            continue
        other = kind(problem, train=True)
        known = [x, other.weight, *other.parameters()]
        case.variants[kind.name] = {"bytes": saved_bytes(lambda other=other: other(x), known)}
