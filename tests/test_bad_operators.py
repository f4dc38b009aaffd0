"""Operators are reachable by anyone, so they trust nothing: whatever indexes memory is checked first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moa_ops
from helpers import FORWARD, make_mixture, moa, raises
from moa_ops import Routing
from moa_ops.reference import SOFTMAX

F64 = torch.float64


def corrupted(tensor: Tensor, position: int, value: int) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[position] = value
    return tensor


def segment_problems() -> list[tuple[str, dict[str, Any]]]:
    p = make_mixture(10, 8, 6, 4, 2, 3, ranks=True, expert_scaling=True, bias=True)
    offsets, order = p.expert_offsets, p.order
    big = 2**31 - 1
    return [
        (r"offsets", {"expert_offsets": corrupted(offsets, -1, 21)}),
        (r"offsets", {"expert_offsets": corrupted(offsets, -1, big)}),
        (r"offsets", {"expert_offsets": corrupted(offsets, 0, -1)}),
        (r"offsets", {"expert_offsets": corrupted(offsets, 0, 1)}),
        (r"offsets", {"expert_offsets": corrupted(offsets, 2, -5)}),
        (r"offsets", {"expert_offsets": corrupted(offsets, 2, big)}),
        (r"offsets", {"expert_offsets": offsets[:-1]}),
        (r"offsets", {"expert_offsets": offsets.long()}),
        (r"offsets", {"expert_offsets": offsets.float()}),
        (r"offsets", {"expert_offsets": offsets.view(1, -1)}),
        (r"order", {"order": corrupted(order, 0, 20)}),
        (r"order", {"order": corrupted(order, 19, -1)}),
        (r"order", {"order": corrupted(order, 5, big)}),
        (r"order", {"order": corrupted(order, 5, -big)}),
        (r"order", {"order": order[:-1]}),
        (r"order", {"order": order.long()}),
        (r"x", {"x": p.x[:, :7]}),
        (r"x|weights|base", {"x": p.x[:9]}),
        (r"x", {"x": p.x[0]}),
        (r"lora_A|x", {"x": p.x.double()}),
        (r"x", {"x": p.x.long()}),
        (r"x", {"x": p.x.to(torch.complex64)}),
        (r"lora_A", {"lora_A": p.lora_A[0]}),
        (r"lora", {"lora_A": p.lora_A[:3]}),
        (r"lora", {"lora_A": p.lora_A.double()}),
        (r"lora", {"lora_A": p.lora_A.bfloat16(), "lora_B": p.lora_B.bfloat16()}),
        (r"lora_B", {"lora_B": p.lora_B[:, :, :2]}),
        (r"lora_A", {"lora_A": p.lora_A[:, :0], "lora_B": p.lora_B[:, :, :0]}),
        (r"lora_A", {"lora_A": p.lora_A[:0], "lora_B": p.lora_B[:0], "expert_offsets": offsets[:1] * 0}),
        (r"weights", {"weights": p.weights[0]}),
        (r"weights", {"weights": p.weights.double()}),
        (r"weights", {"weights": p.weights.half()}),
        (r"order|weights|indices", {"weights": p.weights[:, :1]}),
        (r"expert_scaling", {"expert_scaling": p.expert_scaling[:3]}),
        (r"expert_scaling", {"expert_scaling": p.expert_scaling.long()}),
        (r"ranks", {"ranks": p.ranks[:3]}),
        (r"ranks", {"ranks": p.ranks.float()}),
        (r"ranks\[0\] is 4", {"ranks": corrupted(p.ranks, 0, 4)}),
        (r"ranks\[3\] is -1", {"ranks": corrupted(p.ranks, 3, -1)}),
        (r"ranks", {"ranks": corrupted(p.ranks, 3, 2**40)}),
        (r"base", {"base": p.base[:9]}),
        (r"base", {"base": p.base.double()}),
        (r"bias", {"bias": torch.randn(7)}),
        (r"bias", {"bias": torch.randn(6).half()}),
        *(
            (rf"{name}|CPU|meta|device", {name: getattr(p, name).to("meta")})
            for name in FORWARD
            if name != "scaling"
        ),
    ]


PROBLEMS = segment_problems()


@pytest.mark.parametrize("problem", range(len(PROBLEMS)))
def test_segment_lora_operators(problem: int) -> None:
    message, given = PROBLEMS[problem]
    p = make_mixture(10, 8, 6, 4, 2, 3, ranks=True, expert_scaling=True, bias=True)
    h = p.forward()[1]
    for name, value in given.items():
        setattr(p, name, value)
    raises(message, p.forward)
    if not {"base", "bias"} & set(given):
        raises(message, p.backward, h)


def test_segment_lora_backward_operator() -> None:
    p = make_mixture(10, 8, 6, 4, 2, 3)
    h = p.forward()[1]
    raises(r"h", p.backward, h[:-1])
    raises(r"h", p.backward, h[:, :2])
    raises(r"h", p.backward, h.double())
    for grad in (p.grad_y[:9], p.grad_y[:, :5], p.grad_y.double(), p.grad_y[0]):
        p.grad_y = grad
        raises(r"grad_y", p.backward, h)


def test_router_arguments_of_the_backward() -> None:
    p = make_mixture(10, 8, 6, 4, 2, 3)
    h = p.forward()[1]
    good = {
        "router_weight": torch.randn(4, 8),
        "logits": torch.randn(10, 4),
        "indices": p.indices,
        "score": 0,
    }

    def backward(**given: Any) -> Any:
        a = {**good, **given}
        lora = (
            p.x,
            p.lora_A,
            p.lora_B,
            p.weights,
            a["indices"],
            p.expert_offsets,
            p.order,
            h,
            None,
            1.0,
            None,
        )
        flags = (a["router_weight"], a["logits"], a["score"], False, True, False, False, False, True)
        return moa.segment_lora_backward(p.grad_y, *lora, *flags)

    backward()
    for message, given in (
        (r"router_weight", {"router_weight": torch.randn(4, 7)}),
        (r"router_weight", {"router_weight": torch.randn(3, 8)}),
        (r"router_weight", {"router_weight": torch.randn(4, 8).bfloat16()}),
        (r"logits", {"logits": torch.randn(10, 5)}),
        (r"logits", {"logits": torch.randn(9, 4)}),
        (r"logits", {"logits": torch.randn(10, 4).bfloat16()}),
        (r"logits", {"logits": None}),
        (r"router", {"router_weight": None}),
        (r"indices", {"indices": corrupted(p.indices, 3, 4)}),
        (r"indices", {"indices": corrupted(p.indices, 3, -2)}),
        (r"indices", {"indices": corrupted(p.indices, 3, 2**40)}),
        (r"indices", {"indices": p.indices.int()}),
        (r"indices", {"indices": p.indices[:9]}),
        (r"score_func", {"score": 2}),
        (r"score_func", {"score": -1}),
    ):
        raises(message, backward, **given)


def test_routing_operators() -> None:
    logits = torch.randn(5, 4)

    def topk(z: Any = logits, k: int = 2, score: int = SOFTMAX, bias: Any = None, mask: Any = None) -> Any:
        return moa.topk_routing(z, k, score, False, bias, mask)

    topk()
    raises(r"top_k is 5 with 4 experts", topk, k=5)
    raises(r"top_k is 0", topk, k=0)
    raises(r"top_k", topk, k=-(2**60))
    raises(r"top_k", topk, k=2**60)
    raises(r"score_func is 7", topk, score=7)
    raises(r"logits", topk, z=logits[0])
    raises(r"logits", topk, z=logits.long())
    raises(r"top_k|logits", topk, z=logits[:, :0])
    raises(r"selection_bias", topk, bias=torch.randn(5))
    raises(r"selection_bias", topk, bias=torch.randn(4, dtype=F64))
    raises(r"mask", topk, mask=torch.ones(4, dtype=torch.bool))
    raises(r"mask", topk, mask=torch.ones(5))

    _, ids, _, _ = topk()
    grad = torch.randn(5, 2)

    def backward(g: Any = grad, z: Any = logits, i: Any = ids, score: int = SOFTMAX) -> Any:
        return moa.topk_routing_backward(g, z, i, score, True)

    backward()
    for bad in (4, -2, 2**40, -(2**40)):
        raises(r"indices", backward, i=corrupted(ids, 3, bad))
    raises(r"indices", backward, i=ids.int())
    raises(r"indices", backward, i=ids[:4])
    raises(r"grad_weights", backward, g=grad[:, :1])
    raises(r"grad_weights", backward, g=grad.double())
    raises(r"logits|indices", backward, z=logits[:4])
    raises(r"score_func", backward, score=3)

    for bad in (4, -2, 2**40, -(2**40)):
        raises(r"id|range", moa.sort_by_expert, corrupted(ids, 3, bad), 4)
    raises(r"indices", moa.sort_by_expert, ids.int(), 4)
    raises(r"num_experts is 0", moa.sort_by_expert, ids, 0)
    raises(r"num_experts", moa.sort_by_expert, ids, -3)
    raises(r"experts", moa.sort_by_expert, ids, 2**40)


def test_routed_operators() -> None:
    good = {"x": torch.randn(5, 8), "w": torch.randn(4, 8), "k": 2, "score": 0, "A": torch.randn(4, 3, 8)}
    good |= {"B": torch.randn(4, 6, 3), "bias": torch.randn(6), "weight": torch.randn(6, 8)}

    def routed(**given: Any) -> Any:
        a = {**good, **given}
        lora = (a["A"], a["B"], a["w"], a["k"], a["score"], True, 1.0)
        return moa.routed_linear(a["x"], a["weight"], a["bias"], *lora)

    def lora(**given: Any) -> Any:
        a = {**good, **given}
        return moa.routed_lora(a["x"], a["A"], a["B"], a["w"], a["k"], a["score"], True, 1.0, a["bias"])

    def linear(**given: Any) -> Any:
        a = {**good, **given}
        return moa.linear_routing(a["x"], a["w"], a["k"], a["score"], True, None, None)

    routed()
    lora()
    linear()
    for message, given in (
        (r"top_k is 5", {"k": 5}),
        (r"top_k is 0", {"k": 0}),
        (r"score_func is 2", {"score": 2}),
        (r"router_weight", {"w": torch.randn(4, 7)}),
        (r"router_weight", {"w": torch.randn(4, 8).bfloat16()}),
        (r"x", {"x": torch.ones(5, 8).long()}),
    ):
        raises(message, routed, **given)
        raises(message, linear, **given)
        raises(message, lora, **given)
    for message, given in (
        (r"router_weight", {"w": torch.randn(3, 8)}),
        (r"lora_A", {"A": torch.randn(4, 3, 7)}),
        (r"lora_B", {"B": torch.randn(4, 6, 2)}),
        (r"lora", {"A": torch.randn(4, 3, 8, dtype=F64)}),
        (r"bias", {"bias": torch.randn(5)}),
        (r"bias", {"bias": torch.randn(6).half()}),
        (r"weight", {"weight": torch.randn(6, 7)}),
        (r"weight", {"weight": torch.randn(5, 8)}),
        (r"weight", {"weight": torch.randn(6, 8).half()}),
        (r"x|lora_A", {"x": torch.randn(2, 4, 4)}),
        (r"x", {"x": torch.randn(())}),
    ):
        raises(message, routed, **given)
        if "weight" not in given:
            raises(message, lora, **given)


def test_more_slots_than_int32_counts() -> None:
    """Refused before anything of that size is copied or read: all of it is one row, expanded."""
    x, one = torch.randn(1, 8).expand(2**31, 8), torch.ones(1, 1).expand(2**31, 1)
    order, lora = torch.zeros(1).int().expand(2**31), (torch.randn(1, 2, 8), torch.randn(1, 6, 2))
    segments = (one, torch.zeros(2).int(), order, None, 1.0, None)
    raises(r"2147483648 tokens x 1 .*route in pieces", moa.segment_lora, x, *lora, *segments, None, None)
    raises(r"route in pieces", moa.segment_linear, x, None, None, None, *lora, *segments)
    raises(r"route in pieces", moa.topk_routing, one, 1, SOFTMAX, False, None, None)


def test_order_must_ascend_within_a_segment() -> None:
    """Kernels find an expert's slots in a block of tokens by bisection, so disorder leads them astray."""
    p = make_mixture(1500, 40, 24, 2, 2, 4)  # several blocks of tokens
    _, h = p.forward()
    good = p.order
    for order in (good.flip(0), torch.full_like(good, 7), good.roll(3)):
        p.order = order
        raises(r"does not ascend within the segment of expert", p.forward)
        raises(r"does not ascend within the segment of expert", p.backward, h)


def test_one_token_many_times_under_one_expert() -> None:
    p = make_mixture(64, 40, 24, 8, 2, 4)
    one = Routing.from_indices(torch.zeros(64, 40).long(), torch.rand(64, 40), num_experts=8)
    y = moa_ops.segment_lora(p.x, p.lora_A, p.lora_B, one)  # one expert, forty times in every row
    once = Routing.from_indices([0] * 64, one.weights.sum(1), num_experts=8)
    torch.testing.assert_close(y, moa_ops.segment_lora(p.x, p.lora_A, p.lora_B, once), rtol=1e-4, atol=1e-3)


def test_an_unknown_instruction_set() -> None:
    before = moa.cpu_isa()
    raises(r"'sse9'.*allowed are", moa.set_cpu_isa, "sse9")
    assert moa.cpu_isa() == before
