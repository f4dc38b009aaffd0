"""What does it cost to call the layer at all? One token through tiny matrices, and the time of the import."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks.alternatives import GatherBmm, PlainLora
from benchmarks.inputs import Problem, Shape
from benchmarks.machine import ROOT
from benchmarks.options import Options
from benchmarks.record import BASE, OURS, Case
from benchmarks.training import step
from moa_ops import ops, reference

TINY = Shape(1, 32, 32, 8, r=4)
OPERATORS = "operators by hand"
IMPORT = """
from time import perf_counter as now
a = now(); import torch; b = now(); import moa_ops; print(b - a, now() - b)
"""


def run(options: Options) -> list[Case]:
    """A call without gradients, a training step, and the import."""
    return [_call(options), _training(options), _import(3 if options.quick else 7)]


def _call(options: Options) -> Case:
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

    functions: dict[str, Callable[[], object]] = {
        BASE: lambda: linear(x),
        OURS: lambda: layer(x),
        OPERATORS: operators,
        PlainLora.name: lambda: plain(x),
        GatherBmm.name: lambda: gather(x),
    }
    case = Case("overhead", "a call, no gradients", "float32", BASE)
    case.yardsticks = [OPERATORS, PlainLora.name]
    with torch.no_grad():
        options.timed(case, functions, share=0.3)
    return case


def _training(options: Options) -> Case:
    problem = Problem(TINY, torch.float32)
    x, grad_y, layer = problem.x.clone().requires_grad_(), problem.grad_y, problem.layer
    ours = [layer.lora_A, layer.lora_B, layer.router.weight]
    plain, gather = PlainLora(problem, train=True), GatherBmm(problem, train=True)
    functions: dict[str, Callable[[], object]] = {
        BASE: lambda: step(problem.linear, x, [], grad_y),
        OURS: lambda: step(layer, x, ours, grad_y),
        PlainLora.name: lambda: step(plain, x, plain.parameters(), grad_y),
        GatherBmm.name: lambda: step(gather, x, gather.parameters(), grad_y),
    }
    case = Case("overhead", "a training step", "float32", BASE, yardsticks=[PlainLora.name])
    options.timed(case, functions, share=0.3)
    return case


def _import(times: int) -> Case:
    """Medians over fresh interpreters; moa_ops after torch, so what it adds."""
    rows = []
    for _ in range(times):
        command = [sys.executable, "-c", IMPORT]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        rows.append([float(value) for value in done.stdout.split()])
    torch_s, moa_ops_s = (statistics.median(column) for column in zip(*rows, strict=True))
    return Case("import", "import", "", "", facts={"torch": torch_s, "moa_ops": moa_ops_s})
