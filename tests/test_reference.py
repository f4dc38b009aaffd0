"""The reference itself: routing by brute force, backward formulas by autograd, finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from helpers import assert_close, make_indices, make_mixture
from moa_ops import reference
from moa_ops.reference import SIGMOID, SOFTMAX

FLAGS = list(itertools.product((SOFTMAX, SIGMOID), (False, True)))


@pytest.mark.parametrize("score_func, norm_topk_prob", FLAGS)
def test_topk_routing_is_what_the_table_says(score_func: int, norm_topk_prob: bool) -> None:
    logits = torch.randn(9, 6, dtype=torch.float64)
    weights, indices, _, _ = reference.topk_routing(logits, 3, score_func, norm_topk_prob)
    for row, (w, ids) in zip(
        logits.tolist(), zip(weights.tolist(), indices.tolist(), strict=True), strict=True
    ):
        assert ids == sorted(range(6), key=lambda e: (-row[e], e))[:3]
        if score_func == SOFTMAX:
            scores = [math.exp(z) / sum(map(math.exp, row)) for z in row]
        else:
            scores = [1 / (1 + math.exp(-z)) for z in row]
        chosen = [scores[e] for e in ids]
        expected = [s / sum(chosen) for s in chosen] if norm_topk_prob else chosen
        assert w == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("score_func, norm_topk_prob", FLAGS)
def test_topk_backward_is_the_derivative(score_func: int, norm_topk_prob: bool) -> None:
    logits = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(9) < 0.7
    weights, indices, _, _ = reference.topk_routing(logits, 3, score_func, norm_topk_prob, mask=mask)
    grad = torch.randn_like(weights)
    (expected,) = torch.autograd.grad(weights, logits, grad)
    formula = reference.topk_routing_backward(grad, logits.detach(), indices, score_func, norm_topk_prob)
    assert_close(formula, expected)


def test_sort_by_expert_by_brute_force() -> None:
    indices = make_indices(23, 3, 7, "holes")
    expert_offsets, order = reference.sort_by_expert(indices, 7)
    flat = indices.flatten().tolist()
    assert order.tolist() == sorted(range(len(flat)), key=lambda slot: (flat[slot] % 8, slot))
    counts = [flat.count(e) for e in range(7)]
    assert expert_offsets.tolist() == [0, *itertools.accumulate(counts)]


def test_segment_lora_equals_the_dense_sum_over_experts() -> None:
    p = make_mixture(dtype=torch.float64, kind="holes", expert_scaling=True, bias=True)
    y, _ = p.forward(reference)
    every = torch.einsum("ti,eri,eor->teo", p.x, p.lora_A, p.lora_B)
    expected = p.base + p.bias
    for j in range(2):
        ids = p.indices[:, j].clamp(min=0)
        gate = torch.where(p.indices[:, j] >= 0, p.weights[:, j] * p.scaling * p.expert_scaling[ids], 0.0)
        expected = expected + gate[:, None] * every[torch.arange(len(ids)), ids]
    assert_close(y, expected)


@pytest.mark.parametrize("ranks", [False, True])
def test_segment_lora_backward_is_the_derivative(ranks: bool) -> None:
    p = make_mixture(dtype=torch.float64, kind="holes", expert_scaling=True, ranks=ranks)
    inputs = [p.x, p.lora_A, p.lora_B, p.weights]
    for tensor in inputs:
        tensor.requires_grad_()
    y, h = p.forward(reference)
    expected = torch.autograd.grad(y, inputs, p.grad_y)
    for tensor in inputs:
        tensor.requires_grad_(False)
    for name, grad, want in zip("xABw", p.backward(h, reference), expected, strict=True):
        assert_close(grad, want, name)


@pytest.mark.parametrize("score_func, norm_topk_prob", FLAGS)
def test_router_part_of_the_backward_is_the_derivative(score_func: int, norm_topk_prob: bool) -> None:
    p = make_mixture(dtype=torch.float64)
    weight = torch.randn(80, 96, dtype=torch.float64)
    x, router_weight = p.x.requires_grad_(), torch.randn(5, 96, dtype=torch.float64, requires_grad=True)
    flags = (score_func, norm_topk_prob)
    logits, weights, indices, expert_offsets, order = reference.linear_routing(x, router_weight, 2, *flags)
    y, h = reference.segment_lora(x, p.lora_A, p.lora_B, weights, expert_offsets, order, weight=weight)
    expected = torch.autograd.grad(y, (x, router_weight), p.grad_y)
    with torch.no_grad():
        segments = (weights, indices, expert_offsets, order, h, None, 1.0, None)
        need = (True, False, False, False, True)
        grads = reference.segment_lora_backward(
            p.grad_y, x, p.lora_A, p.lora_B, *segments, router_weight, logits, *flags, *need, weight
        )
    assert_close(grads[0], expected[0], "x")
    assert_close(grads[4], expected[1], "router")
    assert [grad.numel() for grad in grads[1:4]] == [0, 0, 0]


def test_gradcheck_of_the_whole_layer() -> None:
    shapes = [(4, 6), (5, 6), (5,), (3, 2, 6), (3, 5, 2), (3, 6)]
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *tensors: reference.moa_linear(*tensors, 2), inputs)


def test_no_kernel_is_needed_off_the_cpu() -> None:
    """What other devices run is the reference, registered for all devices without kernels of their own."""
    from moa_ops import ops

    assert ops.has_kernels("cpu")
    for name in (*ops.KERNELS, "routed_lora", "segment_linear", "routed_linear"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moa_ops::{name}", "CompositeExplicitAutograd")
    p = make_mixture()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach into an operator
        y, _ = ops.plain(reference.segment_lora)(
            *[getattr(p, name) for name in type(p).__dataclass_fields__][:11]
        )
    assert torch.equal(y, p.forward(reference)[0])
