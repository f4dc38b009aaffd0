"""What does it cost to call the layer at all? One token through tiny matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.alternatives import GatherBmm, PlainLora
from benchmarks.beside import step
from benchmarks.inputs import Problem, Shape
from benchmarks.options import Functions, Options, Trial
from benchmarks.record import BASE, OURS, Case
from moa_ops import ops, reference

TINY = Shape(1, 32, 32, 8, r=4)
OPERATORS = "operators by hand"


def trials(options: Options) -> Iterator[Trial]:
    """A call without gradients and a training step."""
    yield _trial("a call, no gradients", _call, [OPERATORS, PlainLora.name], grad=False)
    yield _trial("a training step", _training, [PlainLora.name], grad=True)


def _trial(label: str, make: Callable[[], Functions], yardsticks: list[str], grad: bool) -> Trial:
    case = Case("overhead", label, "float32", BASE, yardsticks=yardsticks)
    return Trial(case, make, (BASE, OURS, OPERATORS, PlainLora.name, GatherBmm.name), share=0.3, grad=grad)


def _call() -> Functions:
    """Beside the layer: routing, mixture and base as three operators called directly."""
    problem = Problem(TINY, torch.float32)
    x, linear, layer, k = problem.x, problem.linear, problem.layer, TINY.top_k
    weight_t = problem.weight.t()
    plain, gather = PlainLora(problem), GatherBmm(problem)

    def operators() -> object:
        _, weights, _, offsets, order = ops.linear_routing(
            x, problem.router_weight, k, reference.SOFTMAX, True, None, None
        )
        a, b, scaling = problem.lora_A, problem.lora_B, problem.scaling
        y, _ = ops.segment_lora(x, a, b, weights, offsets, order, None, scaling, None, None, None)
        return y.addmm_(x, weight_t)

    return {
        BASE: lambda: linear(x),
        OURS: lambda: layer(x),
        OPERATORS: operators,
        PlainLora.name: lambda: plain(x),
        GatherBmm.name: lambda: gather(x),
    }


def _training() -> Functions:
    problem = Problem(TINY, torch.float32)
    x, grad_y, layer = problem.x.clone().requires_grad_(), problem.grad_y, problem.layer
    ours = [layer.lora_A, layer.lora_B, layer.router.weight]
    plain, gather = PlainLora(problem, train=True), GatherBmm(problem, train=True)
    return {
        BASE: lambda: step(problem.linear, x, [], grad_y),
        OURS: lambda: step(layer, x, ours, grad_y),
        PlainLora.name: lambda: step(plain, x, plain.parameters(), grad_y),
        GatherBmm.name: lambda: step(gather, x, gather.parameters(), grad_y),
    }
