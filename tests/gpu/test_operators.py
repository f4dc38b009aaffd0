"""What a card computes: the CPU's decisions bit for bit, its mixture within rounding, the same every time."""

from __future__ import annotations

import importlib.util
from dataclasses import fields, replace

import pytest
import torch

import moa_ops
from helpers import TOLERANCE, Mixture, assert_close, make_mixture, moa
from moa_ops import Routing

FLAGS = [(0, False), (0, True), (1, False), (1, True)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def moved(mixture: Mixture, device: torch.device) -> Mixture:
    values = {field.name: getattr(mixture, field.name) for field in fields(mixture)}
    return replace(mixture, **{k: v.to(device) for k, v in values.items() if isinstance(v, torch.Tensor)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [
        (0, 4, 2),
        (1, 1, 1),
        (7, 3, 3),
        (257, 64, 8),
        (300, 65, 2),
        (2048, 8, 2),
        (1000, 513, 4),
        (33, 4096, 8),
    ],
)
def test_decisions_are_the_cpus(device, dtype: torch.dtype, tokens: int, experts: int, top_k: int) -> None:
    logits = torch.randn(tokens, experts).to(dtype)  # half types: with ties
    logits[: tokens // 3, : experts // 2] = 0.5
    if tokens > 5:
        logits[0], logits[1, 0], logits[2, -1] = float("-inf"), float("nan"), float("inf")
    mask = torch.rand(tokens) < 0.9
    for score_func, norm in FLAGS:
        args = (logits, top_k, score_func, norm, None, mask)
        there = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
        (weights, *routing), (expected, *decisions) = moa.topk_routing(*there), moa.topk_routing(*args)
        for actual, wanted in zip(routing, decisions, strict=True):
            assert torch.equal(actual.cpu(), wanted)
        torch.testing.assert_close(weights.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("slots", [0, 1, 8192, 8193, 300_000])
@pytest.mark.parametrize("experts", [1, 8, 360, 513, 744, 8192])
def test_sort_is_the_cpus(device, slots: int, experts: int) -> None:
    ids = torch.randint(-1, experts, (slots,))
    for actual, wanted in zip(
        moa.sort_by_expert(ids.to(device), experts), moa.sort_by_expert(ids, experts), strict=True
    ):
        assert torch.equal(actual.cpu(), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "sizes", "experts"),
    [
        (0, (64, 48), 8),
        (1, (64, 48), 8),
        (65, (200, 136), 8),
        (700, (2049, 33), 8),
        (1100, (72, 64), 8),  # so many tokens, and then experts, that expand goes other ways
        (3000, (72, 64), 64),
    ],
)
def test_mixture_is_the_cpus(
    device, dtype: torch.dtype, tokens: int, sizes: tuple[int, int], experts: int
) -> None:
    options = {"ranks": True, "expert_scaling": True}
    mixture = make_mixture(tokens, *sizes, experts, 2, 16, dtype, None, "holes", **options)
    there = moved(mixture, device)
    y, h = mixture.forward()
    y_there, h_there = there.forward()
    assert_close(y_there.cpu(), y, "y")
    limit = TOLERANCE[dtype] if dtype == torch.float64 else 1e-5
    assert (h_there.cpu() - h).norm() <= limit * h.norm()
    for name, actual, wanted in zip("xABw", there.backward(h_there), mixture.backward(h), strict=False):
        difference = (actual.cpu().double() - wanted.double()).norm()
        assert difference <= 2 * max(TOLERANCE[actual.dtype], 2e-6) * wanted.double().norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts"), [(16, 8), (900, 8), (3000, 64)])
def test_bitwise_over_twenty_repeats(device, dtype: torch.dtype, tokens: int, experts: int) -> None:
    mixture = moved(make_mixture(tokens, 256, 192, experts, 2, 16, dtype), device)

    def everything() -> list[torch.Tensor]:
        y, h = mixture.forward()
        return [y, h, *mixture.backward(h)]

    first = everything()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(everything(), first, strict=True))


def test_no_output_is_left_unwritten(device) -> None:
    """Deterministic mode fills new memory with NaN: what a kernel leaves out shows."""
    mixture = moved(make_mixture(90, 70, 50, 9, 3, 12, torch.float32, None, "holes", ranks=True), device)
    plain, h = mixture.forward()
    grads = mixture.backward(h)
    torch.use_deterministic_algorithms(True)
    try:
        filled, h_filled = mixture.forward()
        again = mixture.backward(h_filled)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip([plain, h, *grads], [filled, h_filled, *again], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layer_is_the_eager_one(device, backend: str) -> None:
    if backend == "inductor" and (device.type != "cuda" or importlib.util.find_spec("triton") is None):
        pytest.skip("on the CPU tests/test_transforms.py does that; on a card it needs triton")
    layer = moa_ops.MoALinear(64, 48, num_experts=4, r=4).to(device)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(9, 64, device=device, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    layer(x).square().sum().backward()
    expected = [x.grad.clone(), layer.lora_A.grad.clone()]
    x.grad, layer.lora_A.grad = None, None
    compiled(x).square().sum().backward()
    for actual, wanted in zip((x.grad, layer.lora_A.grad), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_routing_by_id_moves(device) -> None:
    routing = Routing.from_indices([[0, 3], [-1, 2]], num_experts=4)
    there = Routing.from_indices(torch.tensor([[0, 3], [-1, 2]]).to(device), num_experts=4)
    for name in ("weights", "indices", "expert_offsets", "order"):
        assert torch.equal(getattr(routing.to(device), name), getattr(there, name))
