"""topk_routing, sort_by_expert and Routing: exact ids, exact ties, weights and gradients against float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import moa_ops
from helpers import DTYPES, assert_close, error, make_indices, moa, strided
from moa_ops import Routing, reference
from moa_ops.reference import SIGMOID, SOFTMAX

NAMES = {"softmax": SOFTMAX, "sigmoid": SIGMOID}
FLAGS = list(itertools.product(NAMES, (False, True)))
NAN, INF = math.nan, math.inf


def check_routing(
    logits: torch.Tensor, top_k: int, score_func: str, norm: bool, **given: torch.Tensor
) -> None:
    """Ids equal the reference's, weights and their gradient come within the tolerance of float64."""
    flags = (NAMES[score_func], norm)
    logits = logits.requires_grad_()
    routing = moa_ops.topk_routing(logits, top_k, score_func=score_func, norm_topk_prob=norm, **given)
    exact = {name: t.double() if t.dtype.is_floating_point else t for name, t in given.items()}
    rows = logits.detach().double()
    weights, indices, expert_offsets, order = reference.topk_routing(rows, top_k, *flags, **exact)

    assert routing.weights.dtype == reference.accumulation_dtype(logits.dtype)
    assert routing.num_experts == logits.shape[-1]
    assert torch.equal(routing.indices, indices)
    assert torch.equal(routing.expert_offsets, expert_offsets)
    assert torch.equal(routing.order, order)
    assert_close(routing.weights, weights, "weights")

    grad = torch.randn_like(routing.weights)
    (actual,) = torch.autograd.grad(routing.weights, logits, grad)
    expected = reference.topk_routing_backward(grad.double(), rows, indices, *flags)
    assert actual.dtype == logits.dtype
    if expected.norm() > 1e-6:  # k = 1 renormalised is constant: nothing but rounding
        # Where weights sum to 1, dg - c cancels: an error of rounding in c is measured against dg.
        scale = max(1.0, (grad.norm() / expected.norm()).item()) if norm else 1.0
        assert error(actual, expected) < {torch.float32: 1e-6}.get(logits.dtype, 5e-3) * scale


@pytest.mark.parametrize("score_func, norm", FLAGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_routing_in_every_dtype(isa: str, dtype: torch.dtype, score_func: str, norm: bool) -> None:
    check_routing(torch.randn(70, 13).to(dtype), 3, score_func, norm)


@pytest.mark.parametrize("score_func, norm", FLAGS)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [
        (0, 8, 2),
        (1, 1, 1),
        (5, 3, 3),
        (33, 7, 1),
        (64, 64, 2),
        (65, 65, 65),
        (300, 513, 8),
        (1030, 8, 2),
        (9, 17, 16),
    ],
)
def test_sizes(edge_isa: str, tokens: int, experts: int, top_k: int, score_func: str, norm: bool) -> None:
    check_routing(torch.randn(tokens, experts), top_k, score_func, norm)


@pytest.mark.parametrize("top_k", [1, 4, 8, 9])
@pytest.mark.parametrize("experts", [31, 32, 33, 64, 257])
def test_ties_among_many(isa: str, experts: int, top_k: int) -> None:
    """Few values, each at many places, NaN and infinities among them: the lower id comes first."""
    values = torch.tensor([-INF, -1.0, -0.0, 0.0, 1.0, 2.0, INF, NAN])
    logits = values[torch.randint(0, 8, (60, experts))]
    logits[:30] = values[torch.randint(0, 4, (30, experts))]
    _, indices, _, _ = moa.topk_routing(logits, top_k, SOFTMAX, True, None, None)
    assert torch.equal(indices, reference.topk_routing(logits.double(), top_k, SOFTMAX, True)[1])


@pytest.mark.parametrize("score_func, norm", FLAGS)
def test_mask_and_selection_bias(isa: str, score_func: str, norm: bool) -> None:
    given = {"mask": torch.rand(50) < 0.6, "selection_bias": torch.randn(6)}
    check_routing(torch.randn(50, 6), 2, score_func, norm, **given)


def test_selection_bias_chooses_but_does_not_weigh() -> None:
    logits = torch.randn(20, 6)
    bias = torch.zeros(6)
    bias[4] = 100.0
    routing = moa_ops.topk_routing(logits, 1, selection_bias=bias)
    assert (routing.indices == 4).all()
    assert_close(routing.weights[:, 0], logits.double().softmax(-1)[:, 4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_selection_bias_may_have_any_dtype(dtype: torch.dtype) -> None:
    logits, bias = torch.randn(20, 6).to(dtype), torch.randn(6).to(dtype)
    for given in (bias, bias.float(), bias.double(), bias.requires_grad_()):
        routing = moa_ops.topk_routing(logits, 2, selection_bias=given)
        score = logits.double().softmax(-1) + given.detach().double()
        assert torch.equal(routing.indices, score.topk(2).indices)


def test_masked_rows_count_nowhere() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    logits = torch.randn(2, 3, 5)
    routing = moa_ops.topk_routing(logits, 2, mask=mask)
    off = ~mask.flatten()
    assert (routing.indices[off] == -1).all()
    assert (routing.weights[off] == 0).all()
    assert routing.expert_offsets[-1] == 2 * 3
    kept = moa_ops.topk_routing(logits[mask], 2)
    assert torch.equal(routing.indices[~off], kept.indices)
    assert torch.equal(routing.weights[~off], kept.weights)
    nothing = moa_ops.topk_routing(logits, 2, mask=torch.zeros_like(mask))
    assert nothing.expert_offsets.tolist() == [0] * 6


def test_ties_go_to_the_lower_id(isa: str) -> None:
    ties = torch.randint(0, 3, (200, 37)).float()
    expected = ties.sort(dim=-1, descending=True, stable=True).indices[:, :9]
    assert torch.equal(moa_ops.topk_routing(ties, 9).indices, expected)
    zeros = torch.where(torch.rand(50, 21) < 0.5, 0.0, -0.0)  # +0 and -0 are equal
    assert torch.equal(moa_ops.topk_routing(zeros, 5).indices, torch.arange(5).expand(50, 5))


ROWS = [
    [NAN, 1.0, 2.0, 3.0, 0.0],
    [0.0, 1.0, NAN, 3.0, NAN],
    [NAN] * 5,
    [-INF] * 5,
    [INF, 1.0, INF, 0.0, -INF],
    [-INF, -INF, 1.0, -INF, -INF],
    [INF, NAN, -INF, 0.0, 1.0],
    [3e38, -3e38, 3e38, 0.0, 1.0],
    [1e-45, -1e-45, 0.0, -0.0, 1e-38],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("score_func, norm", FLAGS)
@pytest.mark.parametrize("biased", [False, True])
def test_nan_and_infinities(isa: str, biased: bool, score_func: str, norm: bool, dtype: torch.dtype) -> None:
    """Ids stay in range, distinct and as the reference has them; NaN shows in the weights exactly where
    PyTorch's softmax and sigmoid show it.
    """
    logits = torch.tensor(ROWS, dtype=torch.float64).to(dtype)
    bias = torch.randn(5, dtype=reference.accumulation_dtype(dtype)) if biased else None
    for top_k in (1, 2, 5):
        flags = (top_k, NAMES[score_func], norm, bias, None)
        weights, indices, _, _ = moa.topk_routing(logits, *flags)
        expected, expected_ids, _, _ = reference.topk_routing(logits, *flags)
        assert indices.min() >= 0
        assert indices.max() < 5
        assert all(len(set(row)) == top_k for row in indices.tolist())
        assert torch.equal(indices, expected_ids)
        assert torch.equal(weights.isnan(), expected.isnan())
        torch.testing.assert_close(weights, expected, rtol=2e-6, atol=0, equal_nan=True)


def test_underflowing_weights_are_still_routed(isa: str) -> None:
    logits = torch.tensor([[0.0, -200.0, -300.0], [500.0, 0.0, -1000.0]])
    routing = moa_ops.topk_routing(logits, 3)
    assert routing.weights.tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert routing.indices.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert routing.expert_offsets.tolist() == [0, 2, 4, 6]
    low = moa_ops.topk_routing(logits - 1e4, 2, norm_topk_prob=True)  # no 0/0 where all would underflow
    assert low.weights.sum(-1).tolist() == [1.0, 1.0]


def test_small_probabilities_keep_their_relative_accuracy(isa: str) -> None:
    logits = torch.linspace(-80, 0, 400).view(50, 8)
    logits[:, 0] = 0
    weights, indices, _, _ = moa.topk_routing(logits, 8, SOFTMAX, False, None, None)
    expected = logits.double().softmax(-1).gather(1, indices)
    torch.testing.assert_close(weights.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_without_a_softmax_shows_it_under_a_selection_bias(isa: str, bad: float) -> None:
    """All biased scores of the row are NaN, so the ids are the first ones and may miss the culprit."""
    logits = torch.randn(3, 8)
    logits[1, 6] = bad
    weights, indices, _, _ = moa.topk_routing(logits, 2, SOFTMAX, True, torch.zeros(8), None)
    assert weights[1].isnan().all() and not weights[[0, 2]].isnan().any()
    assert indices[1].tolist() == [0, 1]
    expected, _, _, _ = reference.topk_routing(logits, 2, SOFTMAX, True, torch.zeros(8))
    assert torch.equal(expected.isnan(), weights.isnan())


def test_saturated_sigmoids_keep_their_gradient(isa: str) -> None:
    logits = torch.linspace(8, 30, 64).view(16, 4)
    grad = torch.randn(16, 2)
    indices = moa.topk_routing(logits, 2, SIGMOID, False, None, None)[1]
    got = moa.topk_routing_backward(grad, logits, indices, SIGMOID, False)
    z = logits.double().gather(1, indices)
    wanted = torch.zeros(16, 4, dtype=torch.float64).scatter(1, indices, grad * z.sigmoid() * (-z).sigmoid())
    for row, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert error(a, b) < 1e-6, row


def test_layouts_of_logits_and_gradients(edge_isa: str) -> None:
    logits, grad = torch.randn(40, 12), torch.randn(40, 3)
    expected = moa.topk_routing(logits, 3, SOFTMAX, False, None, None)
    dz = moa.topk_routing_backward(grad, logits, expected[1], SOFTMAX, False)
    for name, other in strided(logits):
        for have, want in zip(moa.topk_routing(other, 3, SOFTMAX, False, None, None), expected, strict=True):
            assert torch.equal(have, want), name
    for (name, other), (_, ids) in zip(strided(grad), strided(expected[1]), strict=True):
        assert torch.equal(moa.topk_routing_backward(other, logits, ids, SOFTMAX, False), dz), name
    row = torch.randn(1, 12)
    same = moa.topk_routing(row.expand(40, 12), 3, SOFTMAX, False, None, None)
    assert torch.equal(same[0], moa.topk_routing(row, 3, SOFTMAX, False, None, None)[0].expand(40, 3))
    dz = moa.topk_routing_backward(torch.ones(1, 1).expand(40, 3), logits, expected[1], SIGMOID, False)
    assert torch.equal(dz, moa.topk_routing_backward(torch.ones(40, 3), logits, expected[1], SIGMOID, False))


def test_renormalised_top_1_gives_the_router_no_gradient() -> None:
    logits = torch.randn(30, 6, requires_grad=True)
    routing = moa_ops.topk_routing(logits, 1, norm_topk_prob=True)
    (routing.weights * torch.randn(30, 1)).sum().backward()
    assert torch.equal(logits.grad, torch.zeros(30, 6))


@pytest.mark.parametrize("kind", ["random", "one", "holes", "none"])
@pytest.mark.parametrize(
    "tokens, top_k, experts", [(0, 2, 4), (1, 1, 1), (700, 3, 65), (2500, 8, 513), (40, 7, 7)]
)
def test_sort_by_expert(tokens: int, top_k: int, experts: int, kind: str) -> None:
    indices = make_indices(tokens, top_k, experts, kind)
    expert_offsets, order = moa.sort_by_expert(indices, experts)
    expected_offsets, expected_order = reference.sort_by_expert(indices, experts)
    assert torch.equal(expert_offsets, expected_offsets)
    assert torch.equal(order, expected_order)
    for _, other in strided(indices):
        assert torch.equal(moa.sort_by_expert(other, experts)[1], order)


def test_linear_routing_is_a_matmul_and_topk(isa: str) -> None:
    for tokens, in_features, experts in ((1, 2048, 8), (40, 513, 7), (300, 96, 65), (0, 8, 3), (17, 64, 513)):
        x, weight = torch.randn(tokens, in_features), torch.randn(experts, in_features)
        logits, *fields = moa.linear_routing(x, weight, 2, SOFTMAX, False, None, None)
        assert_close(logits, x.double() @ weight.double().t(), "logits")
        expected = reference.topk_routing(logits, 2, SOFTMAX, False)
        for have, want in zip(fields[1:], expected[1:], strict=True):
            assert torch.equal(have, want)
        assert_close(fields[0], expected[0], "weights")


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_routing_in_every_dtype(isa: str, dtype: torch.dtype) -> None:
    """Logits are as accurate as the accumulation dtype, not as x's."""
    acc = reference.accumulation_dtype(dtype)
    x, weight = torch.randn(50, 200).to(dtype), torch.randn(8, 200, dtype=acc)
    logits, *_ = moa.linear_routing(x, weight, 2, SOFTMAX, False, None, None)
    assert logits.dtype == acc
    assert_close(logits, x.double() @ weight.double().t(), "logits")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "in_features", "experts"),
    [(48, 256, 32), (50, 257, 33), (131, 700, 48), (96, 63, 65), (49, 1030, 240), (70, 1100, 130)],
)
def test_linear_routing_of_many(
    isa: str, tokens: int, in_features: int, experts: int, dtype: torch.dtype
) -> None:
    """Where W is turned over for the product (csrc/lora/panel.h), and just beside; each expert's logits."""
    x = torch.randn(tokens, in_features + 5, dtype=torch.float64).to(dtype)[:, 3:-2]
    scale = 10.0 ** torch.randint(-6, 4, (experts, 1))
    weight = (torch.randn(experts, in_features) * scale).to(reference.accumulation_dtype(dtype))
    logits, *_ = moa.linear_routing(x, weight, 2, SOFTMAX, False, None, None)
    exact = x.double() @ weight.double().t()
    for column in range(experts):
        assert error(logits[:, column], exact[:, column]) < 2e-6
    weight[3, 5] = math.inf
    x[1] = NAN
    logits, *_ = moa.linear_routing(x, weight, 2, SOFTMAX, False, None, None)
    assert logits[1].isnan().all()
    finite = torch.ones_like(logits, dtype=torch.bool)
    finite[1], finite[:, 3] = False, False
    assert logits[finite].isfinite().all() and not logits[:, 3].isfinite().any()


# ---------------------------------------------------------------------------------------------------- Routing


def test_from_indices() -> None:
    one = Routing.from_indices(torch.tensor([2, -1, 0]), num_experts=3)
    assert one.weights.tolist() == [[1.0], [0.0], [1.0]]
    assert one.indices.tolist() == [[2], [-1], [0]]
    assert one.expert_offsets.tolist() == [0, 1, 1, 2]
    assert one.order.tolist() == [2, 0, 1]
    assert (one.num_tokens, one.top_k, one.num_experts) == (3, 1, 3)
    from_list = Routing.from_indices([2, -1, 0], num_experts=3)
    assert torch.equal(from_list.order, one.order)
    assert Routing.from_indices(torch.tensor([[0, 1]], dtype=torch.int32), num_experts=2).top_k == 2
    weights = torch.rand(3, 2, dtype=torch.bfloat16)
    two = Routing.from_indices([[0, 1], [1, 0], [-1, 1]], weights, num_experts=2)
    assert two.weights.dtype == torch.float32
    assert (
        Routing.from_indices([[0]], torch.rand(1, 1).double(), num_experts=1).weights.dtype == torch.float64
    )


def test_an_id_twice_in_a_row_counts_twice(edge_isa: str) -> None:
    x, lora_A, lora_B = torch.randn(5, 16), torch.randn(3, 4, 16), torch.randn(3, 12, 4)
    twice = Routing.from_indices([[1, 1]] * 5, torch.full((5, 2), 0.5), num_experts=3)
    once = Routing.from_indices([1] * 5, num_experts=3)
    assert_close(
        moa_ops.segment_lora(x, lora_A, lora_B, twice), moa_ops.segment_lora(x, lora_A, lora_B, once).double()
    )


def test_given_weights_are_differentiable() -> None:
    weights = torch.rand(4, requires_grad=True)
    routing = Routing.from_indices([0, 1, 1, -1], weights, num_experts=2)
    y = moa_ops.segment_lora(torch.randn(4, 8), torch.randn(2, 3, 8), torch.randn(2, 5, 3), routing)
    y.backward(torch.randn_like(y))
    assert (weights.grad[:3] != 0).all()
    assert weights.grad[3] == 0


def test_repeat_gives_a_sequence_one_decision() -> None:
    logits = torch.randn(3, 6, requires_grad=True)
    routing = moa_ops.topk_routing(logits, 2)
    many = routing.repeat(4)
    assert torch.equal(many.indices, routing.indices.repeat_interleave(4, 0))
    assert torch.equal(many.weights, routing.weights.repeat_interleave(4, 0))
    offsets, order = reference.sort_by_expert(many.indices, 6)
    assert torch.equal(many.expert_offsets, offsets)
    assert torch.equal(many.order, order)
    mask = torch.rand(3, 4) < 0.5
    masked = routing.repeat(4, mask)
    assert (masked.indices[~mask.flatten()] == -1).all()
    assert (masked.weights[~mask.flatten()] == 0).all()
    assert masked.expert_offsets[-1] == 2 * mask.sum()
    grad = torch.randn(12, 2)
    (through,) = torch.autograd.grad(masked.weights, routing.weights, grad)
    assert_close(through, (grad * mask.view(12, 1)).view(3, 4, 2).double().sum(1))


def test_a_routing_is_a_pytree_and_moves() -> None:
    routing = Routing.from_indices([0, 1], num_experts=3)
    tensors, spec = torch.utils._pytree.tree_flatten({"routing": routing})
    assert len(tensors) == 4
    back = torch.utils._pytree.tree_unflatten(tensors, spec)["routing"]
    assert back.num_experts == 3
    assert back.order is routing.order
    assert routing.to("meta").indices.device.type == "meta"
    assert "num_experts=3" in repr(routing)
