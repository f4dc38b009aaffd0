"""The base's product, ``y += x Wᵀ``, and its gradient, ``dx += dy W``, by kernels of our own.

The reference is the same in float64. For how many tokens they are used hangs on the instruction set: all are
tested.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moa_ops import MoALinear
from moa_ops.reference import accumulation_dtype
from tests.helpers import assert_close

moa = torch.ops.moa_ops
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# in, out: whole tiles; one more and one fewer than a vector, a panel, a run of outputs; a single column.
SHAPES = ((512, 256), (513, 130), (255, 769), (2050, 66), (64, 1), (1, 64))


def make(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, y and dy; every second row of a wider x, as a view into it would be."""
    width, out = shape
    x = torch.randn(tokens, 2 * width).to(dtype)[:, :width]
    return (
        x,
        (torch.randn(out, width) / width**0.5).to(dtype),
        torch.randn(tokens, out).to(dtype),
        torch.randn(tokens, out).to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 16, 33, 300, 1030])
def test_product_and_gradient(isa: str, tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, y, grad = make(tokens, shape, dtype)
    expected = y.double() + x.double() @ weight.double().t()
    moa.add_linear_(y, x, weight, None)
    assert_close(y, expected, "y")
    dx = torch.randn(tokens, shape[0]).to(dtype)
    expected = dx.double() + grad.double() @ weight.double()
    moa.add_linear_backward_(dx, grad, weight)
    assert_close(dx, expected, "dx")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 24), (24, 0), (0, 0)])
@pytest.mark.parametrize("tokens", [1, 20])
def test_empty_sums_add_nothing(isa: str, tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    width, out = shape
    x, grad, weight = (torch.randn(n).to(dtype) for n in ((tokens, width), (tokens, out), (out, width)))
    y, dx = grad.clone(), x.clone()
    moa.add_linear_(y, x, weight, None)
    moa.add_linear_backward_(dx, grad, weight)
    assert torch.equal(y, grad) and torch.equal(dx, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_keep_their_accuracy(isa: str, dtype: torch.dtype) -> None:
    """Sums of 8192 products, all of one sign: the worst for a single running sum."""
    if isa == "scalar":
        pytest.skip("the library's GEMM, which may sum in one run")
    x, weight = torch.rand(3, 8192).to(dtype), torch.rand(70, 8192).to(dtype)
    y = torch.ones(3, 70, dtype=dtype)
    expected = 1 + x.double() @ weight.double().t()
    moa.add_linear_(y, x, weight, None)
    assert_close(y, expected, "y")
    grad, weight = torch.rand(3, 8192).to(dtype), torch.rand(8192, 70).to(dtype)
    dx = torch.ones(3, 70, dtype=dtype)
    expected = 1 + grad.double() @ weight.double()
    moa.add_linear_backward_(dx, grad, weight)
    assert_close(dx, expected, "dx")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "fewer"), [(4, 2), (4, 1), (600, 41)])  # W streamed; packed
def test_same_bits_for_any_threads_and_in_any_company(
    isa: str, threads: None, tokens: int, fewer: int, dtype: torch.dtype
) -> None:
    """A token's result depends neither on the threads nor on the tokens beside it."""
    x, weight, _, grad = make(tokens, (1024, 515), dtype)
    grad, weight = grad[:, :514].contiguous(), weight[:514]
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        y, dx = torch.zeros(tokens, 514, dtype=dtype) + 1, torch.zeros(tokens, 1024, dtype=dtype)
        moa.add_linear_(y, x, weight, None)
        moa.add_linear_backward_(dx, grad, weight)
        results.append((y, dx))
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])
    if moa.own_linear(x, weight) and moa.own_linear(x[:fewer], weight):
        y = torch.ones(fewer, 514, dtype=dtype)
        moa.add_linear_(y, x[1 : 1 + fewer], weight, None)
        assert torch.equal(y, results[0][0][1 : 1 + fewer])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_without_a_mixture_it_is_the_library(dtype: torch.dtype, bias: bool) -> None:
    """What holds the bias alone, zeros of either sign included, becomes ``F.linear`` bit for bit."""
    x, weight, y, _ = make(3, (256, 40), dtype)
    added = torch.randn(40).to(dtype) if bias else None
    if bias:
        added[::3] = -0.0
    y[:] = added if bias else -0.0
    y[1] = y[1] + 0.0
    moa.add_linear_(y, x, weight, added)
    assert torch.equal(y, F.linear(x, weight, added))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [2, 3, 17])
def test_a_token_without_a_mixture_is_the_library(dtype: torch.dtype, bias: bool, tokens: int) -> None:
    """So is one row of the base model in a batch by id, whatever is beside it."""
    x, weight, y, _ = make(tokens, (256, 40), dtype)
    added = torch.randn(40).to(dtype) if bias else None
    y[1] = added if bias else 0.0
    start = y.double().clone()
    moa.add_linear_(y, x, weight, added)
    assert torch.equal(y[1], F.linear(x, weight, added)[1])
    assert_close(y, start + x.double() @ weight.double().t(), "y")


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
        (torch.float16, "avx512_fp16", 16),
    ):
        if word in cpu:
            most[dtype] = min(most[dtype], fast)
    # One token of a type that is converted is left to the library, but on AVX2.
    converted = {"avx512": (torch.bfloat16, torch.float16)}.get(best, (torch.float16,))
    for dtype in most:
        x, weight = torch.zeros(1, 1024, dtype=dtype), torch.zeros(64, 1024, dtype=dtype)
        ours = most[dtype] > 0 and (best == "avx2" or dtype not in converted)
        assert moa.own_linear(x, weight) == ours, dtype
    for dtype, limit in most.items():
        for tokens in (2, 4, 5, 16, 17, 32, 33, 128, 129, 1000):
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


@pytest.mark.parametrize(
    ("y", "x", "weight", "message"),
    [
        ((3, 4), (3, 8), (4, 9), "weight has shape"),
        ((3, 5), (3, 8), (4, 8), "y has shape"),
        ((2, 4), (3, 8), (4, 8), "y has shape"),
    ],
)
def test_wrong_shapes(y: tuple[int, int], x: tuple[int, int], weight: tuple[int, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        moa.add_linear_(torch.zeros(y), torch.zeros(x), torch.zeros(weight), None)


def test_wrong_kinds() -> None:
    x, weight, y = torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="weight is float64, expected float32"):
        moa.add_linear_(y, x, weight.double(), None)
    with pytest.raises(RuntimeError, match="x is int64"):
        moa.add_linear_(y, x.long(), weight, None)
    with pytest.raises(RuntimeError, match="y is not contiguous"):
        moa.add_linear_(torch.zeros(4, 3).t(), x, weight, None)
    with pytest.raises(RuntimeError, match="grad_x has shape"):
        moa.add_linear_backward_(torch.zeros(3, 9), y, weight)
    with pytest.raises(RuntimeError, match="bias has shape"):
        moa.add_linear_(y, x, weight, torch.zeros(5))


def test_operators_fit_their_schemas() -> None:
    x, weight, y = torch.randn(3, 64), torch.randn(16, 64), torch.randn(3, 16)
    torch.library.opcheck(moa.add_linear_.default, (y, x, weight, torch.randn(16)))
    torch.library.opcheck(moa.add_linear_backward_.default, (torch.randn(3, 64), y, weight))
