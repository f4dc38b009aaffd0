"""What does it cost to call the layer at all? One token through tiny matrices, and the time of the import."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch

from benchmarks.alternatives import GatherBmm, PlainLora
from benchmarks.beside import step
from benchmarks.inputs import Problem, Shape
from benchmarks.machine import ROOT
from benchmarks.options import Functions, Options, Trial
from benchmarks.record import BASE, OURS, Case
from moa_ops import ops, reference

TINY = Shape(1, 32, 32, 8, r=4)
OPERATORS = "operators by hand"
IMPORT = """
from time import perf_counter as now
a = now(); import torch; b = now(); import moa_ops; print(b - a, now() - b)
"""


def trials(options: Options) -> Iterator[Trial]:
    """A call without gradients, a training step, and the import."""
    yield _trial("a call, no gradients", _call, [OPERATORS, PlainLora.name], grad=False)
    yield _trial("a training step", _training, [PlainLora.name], grad=True)
    imported = Case("import", "import", "", "")
    yield Trial(imported, lambda: imported.facts.update(_import(3 if options.quick else 7).facts) or {})


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


def _import(times: int) -> Case:
    """Medians over fresh interpreters; moa_ops after torch, so what it adds."""
    rows = []
    for _ in range(times):
        command = [sys.executable, "-c", IMPORT]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        rows.append([float(value) for value in done.stdout.split()])
    torch_s, moa_ops_s = (statistics.median(column) for column in zip(*rows, strict=True))
    return Case("import", "import", "", "", facts={"torch": torch_s, "moa_ops": moa_ops_s})
