"""For people used to pytest-benchmark.

``pytest benchmarks --benchmark-only``: the tests of a group are ways to the same numbers, at one point.
``python -m benchmarks`` says more: paired ratios and floors.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.alternatives import ALTERNATIVES, Alternative
from benchmarks.inputs import DTYPES, Problem, Shape
from benchmarks.kernels import pytorch_routing
from benchmarks.training import step
from moa_ops import segment_lora, topk_routing

SHAPES = [Shape(512, 1024, 1024, 8), Shape(512, 1024, 1024, 64), Shape(1, 1024, 1024, 8)]


CASES = [(shape, dtype) for dtype in DTYPES for shape in SHAPES]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].label} {case[1]}".replace("→", "-"))
def case(request: pytest.FixtureRequest, benchmark) -> Problem:
    shape, dtype = request.param
    benchmark.group += f", {shape.label} {dtype}"
    torch.set_num_threads(2)
    return Problem(shape, DTYPES[dtype])


@pytest.mark.benchmark(group="layer")
def test_nn_linear(benchmark, case):
    with torch.no_grad():
        benchmark(case.linear, case.x)


@pytest.mark.benchmark(group="layer")
def test_moa_linear(benchmark, case):
    with torch.no_grad():
        benchmark(case.layer, case.x)


@pytest.mark.benchmark(group="layer")
@pytest.mark.parametrize("kind", ALTERNATIVES, ids=lambda kind: kind.name.replace(" ", "_"))
def test_alternative(benchmark, case, kind: type[Alternative]):
    if absent := kind.why_not(case, train=False):
        pytest.skip(absent)
    with torch.no_grad():
        benchmark(kind(case), case.x)


@pytest.mark.benchmark(group="training step")
def test_moa_linear_step(benchmark, case):
    layer, x = case.layer, case.x.requires_grad_()
    benchmark(step, layer, x, [layer.lora_A, layer.lora_B, layer.router.weight], case.grad_y)


@pytest.mark.benchmark(group="mixture alone")
def test_segment_lora(benchmark, case):
    with torch.no_grad():
        benchmark(segment_lora, case.x, case.lora_A, case.lora_B, case.routing(), scaling=case.scaling)


@pytest.mark.benchmark(group="routing")
@pytest.mark.parametrize("experts", [8, 64, 256])
@pytest.mark.parametrize("route", [topk_routing, pytorch_routing], ids=["moa_ops", "pytorch"])
def test_routing(benchmark, route, experts):
    benchmark(route, torch.randn(2048, experts), 2)
