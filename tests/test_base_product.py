"""The base's product beside a mixture, ``x Wᵀ``, and its gradient, ``dy W``, by kernels of our own.

The reference is the same in float64. For how many tokens they are used hangs on the instruction set: all are
tested. The mixture beside them is one adapter of rank 1 on every token: without one the library multiplies.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moa_ops import MoALinear, reference
from moa_ops.reference import SOFTMAX, accumulation_dtype
from tests.helpers import FORWARD, assert_close, make_mixture

moa = torch.ops.moa_ops
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# in, out: whole tiles; one more and one fewer than a vector, a panel, a run of outputs; a single column.
SHAPES = ((512, 256), (513, 130), (255, 769), (2050, 66), (64, 1), (1, 64))


def make(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, W, A, B and dy; x every second row of a wider one, as a view into it would be."""
    width, out = shape
    x = torch.randn(tokens, 2 * width).to(dtype)[:, :width]
    scale = max(width, 1) ** 0.5
    weight, A = ((torch.randn(n, width) / scale).to(dtype) for n in (out, 1))
    return x, weight, A[None], torch.randn(1, out, 1).to(dtype), torch.randn(tokens, out).to(dtype)


def forward(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, tuple[Any, ...]]:
    """y, and the arguments of the operator's backward up to which gradients are needed."""
    gates = torch.ones(x.shape[0], 1, dtype=accumulation_dtype(x.dtype))
    indices = torch.zeros(x.shape[0], 1, dtype=torch.int64)
    offsets, order = moa.sort_by_expert(indices, 1)
    y, h = moa.segment_lora(x, A, B, gates, offsets, order, None, 1.0, None, None, bias, weight)
    return y, (x, A, B, gates, indices, offsets, order, h, None, 1.0, None, None, None, SOFTMAX, False)


def backward(grad: Tensor, arguments: tuple[Any, ...], weight: Tensor) -> Tensor:
    """dx."""
    needs = (True, False, False, False, False)
    return moa.segment_lora_backward(grad, *arguments, *needs, weight)[0]


def run(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx."""
    y, arguments = forward(x, weight, A, B)
    return y, backward(grad, arguments, weight)


def exact(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64."""
    merged = weight.double() + B[0].double() @ A[0].double()
    return x.double() @ merged.t(), grad.double() @ merged


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 16, 33, 300, 1030])
def test_product_and_gradient(isa: str, tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    problem = make(tokens, shape, dtype)
    (y, dx), (expected_y, expected_dx) = run(*problem), exact(*problem)
    assert_close(y, expected_y, "y")
    assert_close(dx, expected_dx, "dx")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 24), (24, 0), (0, 0)])
@pytest.mark.parametrize("tokens", [1, 20])
def test_empty_sums_add_nothing(isa: str, tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    *problem, grad = make(tokens, shape, dtype)
    bias = torch.randn(shape[1]).to(dtype)
    y, arguments = forward(*problem, bias)
    assert torch.equal(y, bias.expand(tokens, -1))
    dx = backward(grad, arguments, problem[1])
    assert torch.equal(dx, torch.zeros(tokens, shape[0], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 200])  # W streamed; packed
def test_long_sums_keep_their_accuracy(isa: str, tokens: int, dtype: torch.dtype) -> None:
    """Sums of 8192 products, all of one sign: the worst for a single running sum."""
    if isa == "scalar":
        pytest.skip("the library's GEMM, which may sum in one run")
    for width, out in ((8192, 70), (70, 8192)):
        shapes = (tokens, width), (out, width), (tokens, out)
        x, weight, grad = (torch.rand(*shape).to(dtype) for shape in shapes)
        A, B = torch.full((1, 1, width), 1 / 8192, dtype=dtype), torch.ones(1, out, 1, dtype=dtype)
        for actual, expected in zip(run(x, weight, A, B, grad), exact(x, weight, A, B, grad), strict=True):
            assert_close(actual, expected, f"{width} to {out}")


def rows_of_every_scale(rows: int, width: int, powers: int) -> Tensor:
    """Float32 with all 24 bits in use; row by row, and within each, powers of two as far as 2^±powers."""
    values = torch.rand(rows, width, dtype=torch.float64) + 1
    exponents = torch.randint(-powers, powers + 1, (rows, 1)) + torch.randint(-12, 13, (rows, width))
    return (values * torch.randn(rows, width).sign() * 2.0**exponents).float()


@pytest.mark.parametrize("tokens", [3, 30, 65])  # W streamed; on AMX, terms of bfloat16
@pytest.mark.parametrize("powers", [0, 40])
def test_float32_keeps_all_its_bits_at_every_scale(isa: str, tokens: int, powers: int) -> None:
    """Each row within 2^-19 of what its products amount to, whatever the scale of the others."""
    width, out = 600, 200
    x, weight = rows_of_every_scale(tokens, width, powers), rows_of_every_scale(out, width, powers)
    grad, A, B = rows_of_every_scale(tokens, out, powers), torch.zeros(1, 1, width), torch.ones(1, out, 1)
    A[0, 0, 0] = 2.0**-90  # a mixture, too small to be seen
    y, dx = run(x, weight, A, B, grad)
    for actual, left, right in ((y, x, weight.t()), (dx, grad, weight)):
        left, right = left.double(), right.double()
        amount = (left.square() @ right.square()).sqrt()  # of products whose signs are random
        assert ((actual.double() - left @ right).norm(dim=1) <= 2.0**-19 * amount.norm(dim=1)).all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_row(isa: str, dtype: torch.dtype, value: float) -> None:
    x, weight, A, B, grad = make(70, (300, 150), dtype)
    y, dx = run(x, weight, A, B, grad)
    rows = [0, 17, 18, 64]
    x, grad = x.clone(), grad.clone()
    for i, row in enumerate(rows):
        x[row, 3 * i + 1], grad[row, 40 * i] = value, value
    mixed, mixed_dx = run(x, weight, A, B, grad)
    others = [row for row in range(70) if row not in rows]
    assert torch.equal(mixed[others], y[others])
    assert torch.equal(mixed_dx[others], dx[others])
    expected_y, expected_dx = x[rows].double() @ weight.double().t(), grad[rows].double() @ weight.double()
    for actual, expected in ((mixed, expected_y), (mixed_dx, expected_dx)):
        assert not actual[rows].isfinite().any()
        if dtype == torch.float32 and value == value:  # the mixture's own infinity may have the other sign
            decided = (actual[rows] == expected) | actual[rows].isnan()
            assert decided.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_shows(isa: str, dtype: torch.dtype) -> None:
    for value in (float("inf"), float("nan")):
        x, weight, A, B, grad = make(70, (300, 150), dtype)
        weight[5, 7] = value
        y, dx = run(x, weight, A, B, grad)
        assert not y[:, 5].isfinite().any() and y[:, 6:].isfinite().all()
        assert not dx[:, 7].isfinite().any() and dx[:, 8:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "fewer"), [(4, 2), (4, 1), (600, 41)])  # W streamed; packed
def test_same_bits_for_any_threads_and_in_any_company(
    isa: str, threads: None, tokens: int, fewer: int, dtype: torch.dtype
) -> None:
    """A token's result depends neither on the threads nor on the tokens beside it."""
    x, *rest, grad = make(tokens, (1024, 514), dtype)
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(run(x, *rest, grad))
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])
    if moa.own_linear(x, rest[0]) and moa.own_linear(x[:fewer], rest[0]):
        assert torch.equal(forward(x[1 : 1 + fewer], *rest)[0], results[0][0][1 : 1 + fewer])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_without_a_mixture_it_is_the_library(dtype: torch.dtype, bias: bool) -> None:
    """Where the bias alone is added, zeros of either sign included, it is ``F.linear`` bit for bit."""
    x, weight, A, B, _ = make(3, (256, 40), dtype)
    added = torch.randn(40).to(dtype) if bias else None
    if bias:
        added[::3] = -0.0
    for zero in (0.0, -0.0):
        y, _ = forward(x, weight, A, torch.full_like(B, zero), added)
        assert torch.equal(y, F.linear(x, weight, added))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [2, 3, 17])
def test_a_token_without_a_mixture_is_the_library(dtype: torch.dtype, bias: bool, tokens: int) -> None:
    """So is one row of the base model in a batch by id, whatever is beside it."""
    x, weight, A, B, grad = make(tokens, (256, 40), dtype)
    added = torch.randn(40).to(dtype) if bias else None
    x = x.clone()
    A[..., 128:] = 0
    x[1, :128] = 0
    y, _ = forward(x, weight, A, B, added)
    assert torch.equal(y[1], F.linear(x, weight, added)[1])
    expected, _ = exact(x, weight, A, B, grad)
    assert_close(y, expected + added.double() if bias else expected, "y")


@pytest.mark.skipif("MOA_TEST_LIBRARY" in os.environ, reason="there the processor is emulated, too")
def test_where_the_product_is_our_own() -> None:
    """Few tokens, fewer where the library is fast, any number where it is slow; never in float64."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    best = moa.cpu_isa()
    most = {
        torch.float32: {"scalar": 0, "avx2": 10**9}.get(best, 128),  # 8 tokens for each of 1024 inputs
        torch.bfloat16: {"scalar": 0, "avx512_bf16": 32, "amx_bf16": 32}.get(best, 10**9),
        torch.float16: 0 if best == "scalar" else 10**9,
        torch.float64: 0,
    }
    for dtype, word, fast in (
        (torch.float32, "GenuineIntel", 32),
        (torch.bfloat16, "amx_bf16", 4),
        (torch.float16, "avx512_fp16", 32),
    ):
        if word in cpu:
            most[dtype] = min(most[dtype], fast)
    if "GenuineIntel" in cpu and best.startswith("avx512"):
        most[torch.float32] = 1024  # from packed blocks of W
    if best == "amx_bf16":
        most[torch.float32] = 10**9  # as terms of bfloat16
    for dtype, limit in most.items():
        for tokens in (1, 2, 4, 5, 16, 17, 32, 33, 128, 129, 1000, 1024, 1025):
            x, weight = torch.zeros(tokens, 1024, dtype=dtype), torch.zeros(64, 1024, dtype=dtype)
            assert moa.own_linear(x, weight) == (tokens <= limit), (dtype, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_layer_with_and_without_gradients(isa: str, dtype: torch.dtype, tokens: int) -> None:
    """A layer that has learnt something: the same bits either way, also from a transposed weight."""
    layer = MoALinear(1024, 96, dtype=dtype)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(tokens, 1024).to(dtype).requires_grad_()
    for _ in range(2):
        y = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), y)
        y.sum().backward()
        _, routing = layer.route(x)
        rows = x.detach().double()
        expected = F.linear(rows, layer.weight.double(), layer.bias.double())
        acc = accumulation_dtype(dtype)
        for t in range(tokens):
            for j in range(layer.top_k):
                expert = int(routing.indices[t, j])
                hidden = layer.lora_A[expert].double() @ rows[t]
                share = routing.weights[t, j].to(acc).double() * layer.scaling
                expected[t] += share * (layer.lora_B[expert].double() @ hidden)
        if moa.own_linear(x, layer.weight):  # the library's product of one token may sum in one run
            assert_close(y, expected, "y")
        layer.weight.data = layer.weight.data.t().contiguous().t()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_base_and_a_weight_are_both_added(dtype: torch.dtype) -> None:
    p = make_mixture(9, 24, 16, 5, 2, 4, dtype, kind="holes", base=True, bias=True)
    weight = torch.randn(16, 24).to(dtype)
    arguments = [getattr(p, name) for name in FORWARD]
    y, h = moa.segment_lora(*arguments, weight)
    wide = [getattr(p.double(), name) for name in FORWARD]
    assert_close(y, reference.segment_lora(*wide, weight.double())[0], "y")
    assert torch.equal(h, p.forward()[1])


def test_wrong_weights() -> None:
    x, weight, A, B, grad = make(3, (8, 4), torch.float32)
    _, arguments = forward(x, weight, A, B)
    for wrong, message in (
        (torch.zeros(4, 9), r"weight has shape \[4, 9\], expected \[4, 8\]"),
        (torch.zeros(5, 8), r"weight has shape \[5, 8\], expected \[4, 8\]"),
        (weight.double(), "weight is float64, expected float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(x, wrong, A, B)
        with pytest.raises(RuntimeError, match=message):
            backward(grad, arguments, wrong)
        with pytest.raises(RuntimeError, match=message):
            moa.routed_lora(x, A, B, torch.zeros(1, 8), 1, SOFTMAX, False, 1.0, None, wrong)
