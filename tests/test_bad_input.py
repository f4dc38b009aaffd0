"""What does not fit is a clear Python error before memory is read with it, at every level; never a crash."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moa_ops
from helpers import raises
from moa_ops import MoALinear, Routing, functional

F64 = torch.float64


# ---------------------------------------------------------------------------------------------- the functions


def test_topk_routing() -> None:
    logits = torch.randn(4, 5)
    route = moa_ops.topk_routing
    raises(r"top_k must be between 1 and the number of experts, 5; got 6", route, logits, 6)
    raises(r"got 0", route, logits, 0)
    raises(r"got -1", route, logits, -1)
    raises(
        r"score_func must be one of \['sigmoid', 'softmax'\], got 'relu'", route, logits, 2, score_func="relu"
    )
    raises(r"floating, got torch.int64", route, logits.long(), 2)
    raises(r"got a scalar", route, torch.tensor(1.0), 1)
    raises(r"mask must be .*\[4\], got shape \[5\]", route, logits, 2, mask=torch.ones(5, dtype=torch.bool))
    raises(r"mask must be torch.bool, got torch.float32", route, logits, 2, mask=torch.ones(4))
    raises(
        r"selection_bias must be \[E\] = \[5\], got shape \[4\]",
        route,
        logits,
        2,
        selection_bias=torch.ones(4),
    )


def test_linear_routing() -> None:
    x, weight = torch.randn(4, 8), torch.randn(5, 8)
    route = functional.linear_routing
    raises(r"got 6", route, x, weight, 6)
    raises(r"router_weight must be \[E, in\] = \[\*, 8\], got shape \[5, 7\]", route, x, weight[:, :7], 2)
    raises(r"mask must be .*\[4\]", route, x, weight, 2, mask=torch.ones(3, dtype=torch.bool))


def test_from_indices() -> None:
    make = Routing.from_indices
    for bad in ([0, 5], [-2, 0], [2**40], [-(2**40)], [[0], [5]]):
        raises(r"outside|out of range", make, bad, num_experts=5)
    raises(r"5", make, [0, 5], num_experts=5)
    raises(r"integers.*got torch.float32", make, torch.rand(3), num_experts=5)
    raises(r"integers.*got torch.bool", make, torch.rand(3) < 1, num_experts=5)
    raises(r"\[T\] or \[T, k\], got shape \[1, 1, 1\]", make, torch.zeros(1, 1, 1).long(), num_experts=5)
    raises(r"num_experts must be at least 1, got 0", make, [-1], num_experts=0)
    raises(r"shape of indices, \[2\], got \[3\]", make, [0, 1], torch.rand(3), num_experts=5)
    raises(r"weights must be floating, got torch.int64", make, [0, 1], torch.ones(2).long(), num_experts=5)
    routing = make([0, 1], num_experts=5)
    raises(r"mask must be bool of shape \[2, 3\]", routing.repeat, 3, torch.ones(2, 4, dtype=torch.bool))
    raises(r"repeats must be at least 0, got -1", routing.repeat, -1)


FUNCTION_ERRORS: list[tuple[str, dict[str, Any]]] = [
    (r"x must be \[\.\.\., 8\].*got shape \[6, 9\]", {"x": torch.randn(6, 9)}),
    (r"x must be floating, got torch.int64", {"x": torch.ones(6, 8).long()}),
    (r"lora_A must be torch.float32, got torch.float64", {"lora_A": torch.randn(3, 4, 8, dtype=F64)}),
    (r"lora_A must be torch.float32, got torch.bfloat16", {"lora_A": torch.randn(3, 4, 8).bfloat16()}),
    (r"lora_A must be \[E, r, in\].*got shape \[4, 8\]", {"lora_A": torch.randn(4, 8)}),
    (r"lora_A must be \[E, r, in\] with E, r >= 1", {"lora_A": torch.randn(3, 0, 8)}),
    (r"lora_B must be \[E, out, r\] = \[3, \*, 4\], got", {"lora_B": torch.randn(3, 10, 5)}),
    (r"lora_B must be \[E, out, r\]", {"lora_B": torch.randn(2, 10, 4)}),
    (r"routing must be a moa_ops.Routing, got Tensor", {"routing": torch.zeros(6)}),
    (r"routing is for 4 experts, lora_A holds 3", {"routing": Routing.from_indices([0] * 6, num_experts=4)}),
    (
        r"routing is for 5 tokens, x .* has 6.*repeat",
        {"routing": Routing.from_indices([0] * 5, num_experts=3)},
    ),
    (r"scaling must be a float or \[E\] = \[3\], got shape \[4\]", {"scaling": torch.ones(4)}),
    (r"scaling has no gradient", {"scaling": torch.ones(3, requires_grad=True)}),
    (r"ranks must be \[E\] = \[3\]", {"ranks": torch.ones(4).long()}),
    (r"ranks must be torch.int32 or torch.int64, got torch.float32", {"ranks": torch.ones(3)}),
    (r"ranks\[1\] is 5; allowed are 0 to 4", {"ranks": torch.tensor([4, 5, 1])}),
    (r"ranks\[2\] is -1", {"ranks": torch.tensor([4, 4, -1], dtype=torch.int32)}),
    (r"lora_B is on meta, x on cpu; move one", {"lora_B": torch.randn(3, 10, 4, device="meta")}),
    (r"routing is on meta", {"routing": Routing.from_indices([0] * 6, num_experts=3).to("meta")}),
]


@pytest.mark.parametrize(("message", "given"), FUNCTION_ERRORS, ids=[m for m, _ in FUNCTION_ERRORS])
@pytest.mark.parametrize("mode", ["no_grad", "nothing to train", "grad"])
def test_segment_lora_and_moa_linear(message: str, given: dict[str, Any], mode: str) -> None:
    arguments = {
        "x": torch.randn(6, 8, requires_grad=mode == "grad"),
        "lora_A": torch.randn(3, 4, 8),
        "lora_B": torch.randn(3, 10, 4),
        "routing": Routing.from_indices([0, 1, 2] * 2, num_experts=3),
        **given,
    }
    if mode == "no_grad" and "gradient" in message:
        return  # without gradients there is nothing wrong with it
    with torch.set_grad_enabled(mode != "no_grad"):
        raises(message, moa_ops.segment_lora, **arguments)
        raises(message, moa_ops.moa_linear, weight=torch.randn(10, 8), bias=torch.randn(10), **arguments)


def test_base_weight_and_bias() -> None:
    x, lora = torch.randn(6, 8), (torch.randn(3, 4, 8), torch.randn(3, 10, 4))
    routing = Routing.from_indices([0, 1, 2] * 2, num_experts=3)
    for shape in ((6, 9), (5, 10), (10,)):
        raises(
            r"base must be .*\[6, 10\], got", moa_ops.segment_lora, x, *lora, routing, base=torch.randn(shape)
        )
    raises(
        r"base must be torch.float32, got torch.float64",
        moa_ops.segment_lora, x, *lora, routing, base=torch.randn(6, 10, dtype=F64),
    )  # fmt: skip
    linear = moa_ops.moa_linear
    raises(
        r"weight must be \[out, in\] = \[10, 8\], got", linear, x, torch.randn(8, 10), None, *lora, routing
    )
    raises(r"bias must be \[out\] = \[10\]", linear, x, torch.randn(10, 8), torch.randn(8), *lora, routing)
    raises(r"weight must be torch.float32", linear, x, torch.randn(10, 8, dtype=F64), None, *lora, routing)
    raises(r"on meta", linear, x, torch.randn(10, 8, device="meta"), None, *lora, routing)


# -------------------------------------------------------------------------------------------------- the layer


LAYER_ERRORS: list[tuple[str, dict[str, Any]]] = [
    (r"top_k must be between 1 and the number of experts, 4; got 5", {"num_experts": 4, "top_k": 5}),
    (r"got 0", {"top_k": 0}),
    (r"num_experts must be at least 1, got 0", {"num_experts": 0}),
    (r"r, the rank of the adapters, must be at least 1, got 0", {"r": 0}),
    (r"routing_level must be one of \['token', 'sequence'\], got 'block'", {"routing_level": "block"}),
    (r"score_func must be one of", {"score_func": "relu"}),
    (r"lora_dropout must lie in \[0, 1\), got 1", {"lora_dropout": 1.0}),
    (r"lora_dropout", {"lora_dropout": -0.1}),
]


@pytest.mark.parametrize(("message", "options"), LAYER_ERRORS, ids=[m for m, _ in LAYER_ERRORS])
def test_layer_options(message: str, options: dict[str, Any]) -> None:
    raises(message, MoALinear, 8, 8, **options)
    raises(message, MoALinear.from_linear, nn.Linear(8, 8), **options)


@pytest.mark.parametrize("grad", [False, True])
def test_layer_input(grad: bool) -> None:
    layer = MoALinear(8, 10, num_experts=3).requires_grad_(grad)
    raises(r"x must be \[\.\.\., 8\] \(in_features\), got shape \[4, 9\]", layer, torch.randn(4, 9))
    raises(r"got shape \[2, 2, 16\]", layer, torch.randn(2, 2, 16))  # as many numbers as 8 rows of 8
    for dtype in (F64, torch.bfloat16, torch.int64):
        raises(rf"x is {dtype}, the layer's weight torch.float32", layer, torch.ones(4, 8, dtype=dtype))
    raises(r"meta", layer, torch.randn(4, 8, device="meta"))
    raises(r"mask must be bool of shape \[4\]", layer, torch.randn(4, 8), mask=torch.ones(4))
    raises(r"mask must be bool of shape \[2, 3\]", layer, torch.randn(2, 3, 8), mask=torch.ones(6) > 0)
    routing = Routing.from_indices([0] * 4, num_experts=3)
    raises(r"either routing or mask", layer, torch.randn(4, 8), routing, torch.ones(4) > 0)
    raises(r"routing is for 4 tokens, x .* has 6", layer, torch.randn(6, 8), routing)
    raises(r"must be a moa_ops.Routing, got Tensor", layer, torch.randn(6, 8), torch.ones(6) > 0)
    layer.router = None
    raises(r"no router.*give it a routing", layer, torch.randn(4, 8))
    assert layer(torch.randn(4, 8), routing=routing).shape == (4, 10)
    pooling = MoALinear(8, 10, routing_level="sequence")
    raises(r"sequence.*takes x \[B, S, in\], got shape \[4, 8\]", pooling, torch.randn(4, 8))
