"""The layer for a given routing, without gradients, in one operator: what a step of decoding calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moa_ops
from helpers import DTYPES, Mixture, assert_close, make_layer, make_mixture, moa, raises
from moa_ops import Routing, functional, ops, reference

SEGMENTS = ("weights", "expert_offsets", "order", "expert_scaling", "scaling", "ranks")


def arguments(p: Mixture, weight: Tensor | None) -> dict[str, Any]:
    """Those of the operator, by name, with the mixture's."""
    names = ("bias", "base", "lora_A", "lora_B", *SEGMENTS)
    return {"x": p.x, "weight": weight, **{name: getattr(p, name) for name in names}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("weight", "base", "bias"), [(True, False, True), (True, True, False), (False, True, True)]
)
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 1), (1, 1), (1, 2), (130, 3)])
def test_values(
    isa: str, dtype: torch.dtype, weight: bool, base: bool, bias: bool, tokens: int, top_k: int
) -> None:
    p = make_mixture(
        tokens,
        96,
        80,
        5,
        top_k,
        8,
        dtype,
        None,
        "holes",
        ranks=True,
        expert_scaling=True,
        base=base,
        bias=bias,
    )
    matrix = torch.randn(80, 96).to(dtype) if weight else None
    expected, _ = p.double().forward(reference)
    if matrix is not None:
        expected = expected + p.x.double() @ matrix.double().t()
    given = arguments(p, matrix)
    y = moa.segment_linear(**given)
    assert y.dtype == dtype
    assert_close(y, expected)
    assert torch.equal(
        y, ops._compose_segment_linear(*given.values())
    )  # what devices without this kernel run
    leading = {"x": p.x[None, :, None], "base": None if p.base is None else p.base[None, :, None]}
    assert torch.equal(moa.segment_linear(**{**given, **leading}), y[None, :, None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 16, 130])
@pytest.mark.parametrize("shape", [(256, 192), (33, 65), (2048, 96)])
@pytest.mark.parametrize("absent", ["no adapter", "rank 0"])
def test_without_adapters_it_is_the_base_bit_for_bit(
    dtype: torch.dtype, bias: bool, tokens: int, shape: tuple[int, int], absent: str
) -> None:
    layer = make_layer(*shape, bias=bias, num_experts=3, r=4, dtype=dtype).requires_grad_(False)
    x = torch.randn(tokens, shape[0]).to(dtype)
    ids = torch.full((tokens,), -1) if absent == "no adapter" else torch.randint(0, 2, (tokens,))
    routing = Routing.from_indices(ids, num_experts=3)
    ranks = None if absent == "no adapter" else torch.tensor([0, 0, 4])
    expected = F.linear(x, layer.weight, layer.bias)
    for data, want in ((x, expected), (x[:, None], F.linear(x[:, None], layer.weight, layer.bias))):
        with torch.no_grad():
            y = moa_ops.moa_linear(
                data, layer.weight, layer.bias, layer.lora_A, layer.lora_B, routing, ranks=ranks
            )
        assert torch.equal(y, want)
    if absent == "no adapter":
        assert torch.equal(layer(x, routing=routing), expected)


def test_experts_of_rank_0_are_left_out(isa: str) -> None:
    """An adapter without this module: its slots get the base, whatever its rows and gradients hold."""
    p = make_mixture(40, 96, 80, 4, 2, 8)
    p.ranks = torch.tensor([0, 8, 0, 3])
    for expert in (0, 2):
        p.lora_A[expert], p.lora_B[expert] = float("nan"), float("nan")
    y, h = p.forward()
    grads = p.backward(h)
    clean = p.double()
    clean.lora_A, clean.lora_B = clean.lora_A.nan_to_num(0), clean.lora_B.nan_to_num(0)
    exact_y, exact_h = clean.forward(reference)
    assert_close(y, exact_y, "y")
    for grad, expected in zip(grads, clean.backward(exact_h, reference), strict=True):
        assert_close(grad, expected)
    assert not grads[1][[0, 2]].any()
    assert not grads[2][[0, 2]].any()
    only = torch.isin(p.indices, torch.tensor([0, 2])).all(1)
    assert only.any()
    assert torch.equal(y[only], p.base[only])


def test_the_operator_checks_what_python_does_not() -> None:
    p = make_mixture(10, 8, 6, 4, 2, 3, ranks=True, expert_scaling=True, bias=True)
    weight = torch.randn(6, 8)
    moa.segment_linear(**arguments(p, weight))
    for message, given in (
        (r"weight has shape \[6, 7\]", {"weight": weight[:, :7]}),
        (r"weight has shape \[5, 8\]", {"weight": weight[:5]}),
        (r"weight is float64", {"weight": weight.double()}),
        (r"base has shape \[9, 6\] beside x of shape \[10, 8\]", {"base": p.base[:9]}),
        (r"base has shape \[2, 5, 6\] beside x", {"base": p.base.view(2, 5, 6)}),
        (r"base has shape", {"base": p.base[:, :5]}),
        (r"base is float64", {"base": p.base.double()}),
        (r"bias has shape", {"bias": p.bias[:5]}),
        (r"bias is float16", {"bias": p.bias.half()}),
        (r"x has no dimensions", {"x": torch.randn(())}),
        (r"weights", {"x": p.x.view(2, 5, 8)[:1]}),
        (r"lora_A", {"x": p.x[:, :7]}),
        (r"order has an entry outside", {"order": p.order + 1}),
        (r"ranks\[0\] is 4", {"ranks": torch.full((4,), 4)}),
        (r"on cpu and meta", {"weight": weight.to("meta")}),
    ):
        raises(message, moa.segment_linear, **{**arguments(p, weight), **given})


def test_what_the_operator_refuses_python_converts() -> None:
    """Weights of another precision than the kernels', or an autocast, take the way that looks closer."""
    layer = make_layer(24, 16, num_experts=3, r=4)
    x = torch.randn(5, 24)
    routing = Routing.from_indices([0, 1, 2, -1, 1], torch.rand(5, dtype=torch.float64), num_experts=3)
    with torch.no_grad():
        single = Routing.from_indices(routing.indices, routing.weights.float(), num_experts=3)
        assert torch.equal(layer(x, routing=routing), layer(x, routing=single))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x, routing=routing).dtype == torch.bfloat16


def test_the_common_call_asks_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(24, 16, num_experts=3, r=4)
    routing = Routing.from_indices([0, 1, 2, -1, 1], num_experts=3)
    monkeypatch.setattr(functional, "_check_mixture", lambda *_, **__: pytest.fail("checked in Python"))
    with torch.no_grad():
        for x in (torch.randn(5, 24), torch.randn(1, 5, 24)):
            layer(x, routing=routing)
            lora = (layer.lora_A, layer.lora_B, routing)
            moa_ops.segment_lora(x, *lora, scaling=torch.rand(3), ranks=torch.tensor([4, 0, 2]))
            moa_ops.moa_linear(x, layer.weight, None, *lora, scaling=torch.rand(3), ranks=torch.ones(3).int())


def test_offsets_beyond_int32(isa: str) -> None:
    """Tensors of more than 2³¹ elements, of which only the ends are touched: no page else is there."""
    bf16, features, far = torch.bfloat16, 4096, 2**31 + 4096
    experts, r = 2**15 + 1, 16  # lora_A and lora_B hold 2³¹ + 2¹⁶ elements
    wide = torch.empty(experts * r * features, dtype=bf16)
    lora_A, lora_B = wide.view(experts, r, features), torch.empty_like(wide).view(experts, features, r)
    x, base, grad_y = (torch.empty_strided((2, features), (far, 1), dtype=bf16) for _ in range(3))
    small = make_mixture(2, features, features, 2, 1, r, bf16)
    small.indices = torch.tensor([[1], [0]])
    small.expert_offsets, small.order = reference.sort_by_expert(small.indices, 2)
    large = make_mixture(2, 1, 1, experts, 1, 1, bf16)
    large.indices = torch.tensor([[experts - 1], [0]])
    large.expert_offsets, large.order = reference.sort_by_expert(large.indices, experts)
    large.weights = small.weights
    large.x, large.base, large.grad_y = x.copy_(small.x), base.copy_(small.base), grad_y.copy_(small.grad_y)
    for expert, at in ((0, 0), (1, experts - 1)):
        lora_A[at], lora_B[at] = small.lora_A[expert], small.lora_B[expert]
    large.lora_A, large.lora_B = lora_A, lora_B

    (y, h), (want_y, want_h) = large.forward(), small.forward()
    assert torch.equal(y, want_y)
    assert torch.equal(h, want_h)
    need = (True, False, False, True)  # the other two would be written whole
    for grad, want in zip(large.backward(h, need=need), small.backward(h, need=need), strict=True):
        assert torch.equal(grad, want)
    assert torch.equal(moa.segment_linear(**arguments(large, None)), want_y)
    logits, *_ = moa.linear_routing(x, torch.ones(3, features), 1, 0, True, None, None)
    assert torch.equal(
        logits, moa.linear_routing(small.x, torch.ones(3, features), 1, 0, True, None, None)[0]
    )
