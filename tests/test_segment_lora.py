"""The kernels of the mixture, forward and backward, against float64: dtypes, edges, layouts, determinism."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import moa_ops
from helpers import (
    DTYPES,
    FORWARD,
    TOLERANCE,
    Mixture,
    assert_close,
    check_mixture,
    error,
    make_mixture,
    moa,
    strided,
    subsets,
)
from moa_ops import reference
from moa_ops.reference import SIGMOID, SOFTMAX

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MIXED = [(dtype, None) for dtype in DTYPES] + [(BF16, F32), (F16, F32)]
IDS = [f"{dtype}-{adapter or dtype}".replace("torch.", "") for dtype, adapter in MIXED]


# -------------------------------------------------------------------------------------------- against float64


@pytest.mark.parametrize(("dtype", "adapter_dtype"), MIXED, ids=IDS)
@pytest.mark.parametrize("tokens", [1, 37, 420])
def test_every_dtype(isa: str, dtype: torch.dtype, adapter_dtype: torch.dtype | None, tokens: int) -> None:
    check_mixture(make_mixture(tokens, 200, 136, 8, 2, 16, dtype, adapter_dtype, bias=True))


@pytest.mark.parametrize(("dtype", "adapter_dtype"), MIXED, ids=IDS)
def test_holes_ranks_and_scales(isa: str, dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> None:
    check_mixture(
        make_mixture(
            90, 70, 50, 9, 3, 12, dtype, adapter_dtype, "holes", ranks=True, expert_scaling=True, base=False
        )
    )


@pytest.mark.parametrize("r", [1, 3, 4, 8, 16, 64, 128])
@pytest.mark.parametrize(("in_features", "out_features"), [(2049, 33), (33, 2049), (1, 1), (64, 256)])
def test_ranks_and_odd_sizes(edge_isa: str, r: int, in_features: int, out_features: int) -> None:
    check_mixture(make_mixture(19, in_features, out_features, 3, 2, r))


@pytest.mark.parametrize("kind", ["random", "one", "holes", "none"])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(0, 4, 2), (1, 1, 1), (2, 3, 3), (7, 7, 1), (65, 64, 2), (50, 65, 65), (130, 513, 4), (800, 3, 2)],
)
def test_tokens_and_experts(edge_isa: str, tokens: int, experts: int, top_k: int, kind: str) -> None:
    check_mixture(make_mixture(tokens, 40, 24, experts, top_k, 4, kind=kind))


@pytest.mark.parametrize(("dtype", "adapter_dtype"), MIXED, ids=IDS)
@pytest.mark.parametrize("tokens", [1, 2, 29])
@pytest.mark.parametrize(("r", "ranks"), [(32, False), (131, True)])
def test_few_tokens_and_large_ranks(
    isa: str, dtype: torch.dtype, adapter_dtype: torch.dtype | None, tokens: int, r: int, ranks: bool
) -> None:
    """B is read along its ranks here, of 29 tokens in the backward alone; in runs of 128 outputs there."""
    check_mixture(
        make_mixture(
            tokens, 70, 1100, 4, 3, r, dtype, adapter_dtype, "holes", ranks=ranks, bias=True, base=ranks
        )
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("tokens", "experts"), [(16, 8), (512, 8), (512, 64), (1000, 256)])
def test_sizes_people_use(tokens: int, experts: int, dtype: torch.dtype) -> None:
    check_mixture(make_mixture(tokens, 512, 768, experts, 2, 16, dtype, bias=True, base=False))


@pytest.mark.parametrize(("dtype", "adapter_dtype"), MIXED, ids=IDS)
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features", "experts", "top_k", "r"),
    [(128, 1100, 1030, 16, 2, 16), (90, 70, 2100, 33, 3, 5), (64, 1024, 1024, 40, 1, 70)],
)
def test_few_slots_on_each_of_many_experts(
    isa: str,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None,
    tokens: int,
    in_features: int,
    out_features: int,
    experts: int,
    top_k: int,
    r: int,
) -> None:
    """The gradients of A and B go by ranges of experts here (plan::gram), whole rows at a time."""
    shape = tokens, in_features, out_features, experts, top_k, r, dtype, adapter_dtype
    p = make_mixture(*shape, ranks=top_k == 2)
    slots = p.expert_offsets.diff()
    assert slots.sum() <= 48 * experts
    assert 8 * slots.max() <= slots.sum()
    check_mixture(p)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), MIXED, ids=IDS)
@pytest.mark.parametrize(("r", "ranks"), [(13, False), (16, True), (16, False), (27, False), (32, True)])
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features", "experts"), [(90, 200, 1027, 12), (300, 523, 144, 7)]
)
def test_ranks_that_fill_vectors(
    isa: str,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None,
    r: int,
    ranks: bool,
    tokens: int,
    in_features: int,
    out_features: int,
    experts: int,
) -> None:
    """On Intel's processors with AVX-512 such ranks have tiles of their own (lora/panel.h)."""
    shape = tokens, in_features, out_features, experts, 2, r, dtype, adapter_dtype
    check_mixture(make_mixture(*shape, ranks=ranks))


@pytest.mark.parametrize("r", [8, 30])
def test_many_tokens_on_one_expert(edge_isa: str, r: int) -> None:
    """The gradients of A and B are long sums here, of larger ranks in strips of 24 columns on AVX2."""
    check_mixture(make_mixture(3000, 52, 32, 4, 1, r, kind="one"))


ROUTED = [
    (F32, 8, (SOFTMAX, True)),
    (F32, 65, (SOFTMAX, False)),
    (BF16, 8, (SIGMOID, True)),
    (BF16, 65, (SOFTMAX, True)),
    (F64, 5, (SIGMOID, False)),
    (F16, 3, (SOFTMAX, False)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r, ranks", [(33, False), (60, True), (80, False), (97, False), (128, True)])
def test_large_ranks_of_many_rows(isa: str, dtype: torch.dtype, r: int, ranks: bool) -> None:
    """Panels (csrc/lora/panel.h) and dot products of more than one run; a copied panel in the gram."""
    check_mixture(make_mixture(150, 1030, 1061, 3, 2, r, dtype, ranks=ranks))


@pytest.mark.parametrize(("tokens", "r"), [(77, 8), (400, 30)])
@pytest.mark.parametrize("in_features, ranks", [(130, False), (128, True)])
@pytest.mark.parametrize(("dtype", "experts", "flags"), ROUTED)
def test_router_part_of_the_backward(
    isa: str,
    dtype: torch.dtype,
    experts: int,
    flags: tuple[int, bool],
    in_features: int,
    ranks: bool,
    tokens: int,
    r: int,
) -> None:
    p = make_mixture(tokens, in_features, 60, experts, 2, r, dtype, base=False, ranks=ranks)
    weight = torch.randn(experts, in_features, dtype=reference.accumulation_dtype(dtype))
    logits, p.weights, p.indices, p.expert_offsets, p.order = reference.linear_routing(p.x, weight, 2, *flags)

    def backward(q: Mixture, implementation: Any, router: tuple[Any, ...], needs: tuple[bool, ...]) -> Any:
        segments = (q.weights, q.indices, q.expert_offsets, q.order, q.forward(implementation)[1])
        scale = (None, q.scaling, q.ranks)
        lora = (q.x, q.lora_A, q.lora_B, *segments, *scale)
        return implementation.segment_lora_backward(q.grad_y, *lora, *router, *flags, *needs)

    for need_x, need_router in ((True, True), (True, False), (False, True)):
        needs = (need_x, False, False, False, need_router)
        grads = backward(p, moa, (weight, logits), needs)
        exact = backward(p.double(), reference, (weight.double(), logits.double()), needs)
        assert [grad.numel() > 0 for grad in (grads[0], grads[4])] == [need_x, need_router]
        if need_x:
            assert_close(grads[0], exact[0], "gradient of x")
        if need_router:  # in the router's own dtype and to its accuracy, whatever x's
            assert grads[4].dtype == weight.dtype
            assert_close(grads[4], exact[4], "gradient of the router")


def test_a_corrupted_tile_is_noticed() -> None:
    """The comparison fails for one wrong tile, one swapped sign, one lost token: it can see what it looks
    for.
    """
    p = make_mixture(300, 256, 192, 8, 2, 16)
    y, h = p.forward()
    expected, _ = p.double().forward(reference)
    limit = TOLERANCE[F32]
    assert error(y, expected) < limit
    tile = y.clone()
    tile[96:112, 64:80] += 1e-3 * torch.randn(16, 16)
    assert error(tile, expected) > limit
    sign = y.clone()
    sign[17, 3].neg_()
    assert error(sign, expected) > limit
    grads = p.backward(h)
    exact = p.double().backward(p.double().forward(reference)[1], reference)
    for grad, want in zip(grads, exact, strict=True):
        assert error(grad, want) < limit
        grad.flatten()[grad.numel() // 2 : grad.numel() // 2 + 16] *= 1.01
        assert error(grad, want) > limit


# ----------------------------------------------------------------------------------------------- what is read


def test_unused_ranks_and_experts_are_not_read(edge_isa: str) -> None:
    """NaN beyond an expert's rank, in experts without tokens and under -1 slots stays where it is."""
    p = make_mixture(60, 40, 30, 6, 2, 8, kind="holes", ranks=True)
    p.ranks[0] = 0
    expected_y, expected_h = p.forward()
    expected = p.backward(expected_h)
    p.lora_A, p.lora_B = p.lora_A.clone(), p.lora_B.clone()
    for e, rank in enumerate(p.ranks.tolist()):
        if p.expert_offsets[e] == p.expert_offsets[e + 1]:
            rank = 0
        p.lora_A[e, rank:] = math.nan
        p.lora_B[e, :, rank:] = math.nan
    p.weights = torch.where(p.indices < 0, math.nan, p.weights)
    y, h = p.forward()
    assert torch.equal(y, expected_y)
    assert torch.equal(h, expected_h)
    for name, grad, want in zip("xABw", p.backward(h), expected, strict=True):
        assert torch.equal(grad, want), name


def test_nan_in_one_token_stays_in_that_token(edge_isa: str) -> None:
    p = make_mixture(70, 40, 30, 6, 2, 8)
    expected, _ = p.forward()
    p.x[11, 5] = math.nan
    y, _ = p.forward()
    assert y[11].isnan().all()
    others = torch.arange(70) != 11
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layouts(edge_isa: str, dtype: torch.dtype) -> None:
    """Any strides and alignment of any tensor argument give the same bits."""
    p = make_mixture(45, 72, 40, 5, 2, 8, dtype, expert_scaling=True, ranks=True, bias=True)
    expected_y, expected_h = p.forward()
    expected = p.backward(expected_h)
    names = [name for name in (*FORWARD, "indices", "grad_y") if isinstance(getattr(p, name), torch.Tensor)]
    for name in names:
        original = getattr(p, name)
        for layout, other in strided(original):
            setattr(p, name, other)
            y, h = p.forward()
            assert torch.equal(y, expected_y), (name, layout)
            for grad, want in zip(p.backward(h), expected, strict=True):
                assert torch.equal(grad, want), (name, layout)
        setattr(p, name, original)


def test_expanded_inputs_and_gradients(edge_isa: str) -> None:
    """Stride 0 in x, base, grad_y, weights, A and B."""
    p = make_mixture(45, 72, 40, 5, 2, 8)
    for name in ("x", "base", "grad_y", "weights", "lora_A", "lora_B"):
        tensor = getattr(p, name)
        setattr(p, name, tensor[:1].expand_as(tensor))
        check_mixture(p)
        setattr(p, name, tensor)
    p.grad_y = torch.randn(()).expand(45, 40)
    check_mixture(p)
    p.x = torch.randn(45, 1).expand(45, 72)
    check_mixture(p)


def test_inputs_are_left_alone() -> None:
    p = make_mixture(45, 72, 40, 5, 2, 8, expert_scaling=True, ranks=True, bias=True)
    before = {
        name: t.clone()
        for name in type(p).__dataclass_fields__
        if isinstance(t := getattr(p, name), torch.Tensor)
    }
    p.backward(p.forward()[1])
    for name, tensor in before.items():
        assert torch.equal(getattr(p, name), tensor), name


# ------------------------------------------------------------------------------------------------ determinism


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("tokens", "experts"), [(3, 8), (600, 8), (600, 65)])
def test_same_bits_every_time_and_for_any_threads(
    edge_isa: str, threads: None, tokens: int, experts: int, dtype: torch.dtype
) -> None:
    p = make_mixture(tokens, 160, 96, experts, 2, 16, dtype)
    weight = torch.randn(experts, 160)
    logits = torch.randn(tokens, experts)

    def run() -> list[torch.Tensor]:
        y, h = p.forward()
        routed = moa.linear_routing(p.x, weight, 2, SOFTMAX, False, None, None)
        lora = (p.x, p.lora_A, p.lora_B, p.weights, p.indices, p.expert_offsets, p.order, h, None, 0.7, None)
        needs = (True, False, False, False, True)
        router = moa.segment_lora_backward(p.grad_y, *lora, weight, logits, SOFTMAX, False, *needs)
        return [y, h, *p.backward(h), *routed, *router]

    torch.set_num_threads(1)
    expected = run()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for _ in range(20 if count == 2 else 3):
            for have, want in zip(run(), expected, strict=True):
                assert torch.equal(have, want)


def test_each_token_alone_gets_the_same_row(edge_isa: str) -> None:
    """A token's output does not depend on its neighbours, to rounding of another blocking."""
    p = make_mixture(40, 96, 80, 5, 2, 8)
    together = moa_ops.segment_lora(p.x, p.lora_A, p.lora_B, p.routing())
    for t in range(0, 40, 7):
        routing = moa_ops.Routing.from_indices(p.indices[t : t + 1], p.weights[t : t + 1], num_experts=5)
        alone = moa_ops.segment_lora(p.x[t : t + 1], p.lora_A, p.lora_B, routing)
        assert_close(alone, together[t : t + 1])


def poison(*sizes: int) -> None:
    """Leaves freed blocks full of NaN for the next tensors of these sizes (below malloc's mmap threshold)."""
    for size in sizes:
        blocks = [torch.full((size,), math.nan) for _ in range(4)]
        del blocks


def test_nothing_is_left_unwritten(edge_isa: str) -> None:
    """Outputs come from memory that was full of NaN, and of what a run with other segments left behind."""
    full = make_mixture(99, 128, 96, 8, 2, 16)
    sparse = make_mixture(99, 128, 96, 8, 2, 16, kind="holes", ranks=True)
    empty = make_mixture(99, 128, 96, 8, 2, 16, kind="none")
    exact = {id(p): p.double() for p in (full, sparse, empty)}
    sizes = (99 * 96, 99 * 2 * 16, 99 * 128, 8 * 16 * 128, 8 * 96 * 16, 99 * 2)
    for p in (full, sparse, empty, full):
        expected_y, expected_h = exact[id(p)].forward(reference)
        wants = exact[id(p)].backward(expected_h, reference)
        poison(*sizes)
        y, h = p.forward()
        assert_close(y, expected_y)
        assert_close(h, expected_h)
        poison(*sizes)
        for grad, want in zip(p.backward(h), wants, strict=True):
            assert_close(grad, want)


def test_deterministic_mode() -> None:
    """The mode fills new tensors with NaN and forbids what is not deterministic."""
    torch.use_deterministic_algorithms(True)
    try:
        for kind in ("random", "holes", "none"):
            check_mixture(make_mixture(100, 64, 48, 7, 2, 8, kind=kind, ranks=True))
    finally:
        torch.use_deterministic_algorithms(False)


# ----------------------------------------------------------------------------------------------- the function

INPUTS = ("x", "lora_A", "lora_B", "weights", "base")


@pytest.mark.parametrize("wanted", subsets(INPUTS), ids="-".join)
def test_every_subset_of_gradients(wanted: tuple[str, ...]) -> None:
    p = make_mixture(50, 40, 30, 5, 2, 8)
    exact = p.double()
    results = []
    for q, implementation in ((p, moa_ops), (exact, None)):
        for name in INPUTS:
            setattr(q, name, getattr(q, name).detach().requires_grad_(name in wanted))
        if implementation is moa_ops:
            y = moa_ops.segment_lora(q.x, q.lora_A, q.lora_B, q.routing(), scaling=q.scaling, base=q.base)
        else:
            y, _ = q.forward(reference)
        inputs = [getattr(q, name) for name in wanted]
        results.append(torch.autograd.grad(y, inputs, q.grad_y, retain_graph=True))
        again = torch.autograd.grad(y, inputs, q.grad_y)  # retain_graph: the second time is the same
        for first, second in zip(results[-1], again, strict=True):
            assert torch.equal(first, second)
    for name, grad, want in zip(wanted, *results, strict=True):
        assert_close(grad, want, name)


@pytest.mark.parametrize(
    "wanted", subsets(("x", "weight", "bias", "lora_A", "lora_B", "weights")), ids="-".join
)
def test_every_subset_of_gradients_of_moa_linear(wanted: tuple[str, ...]) -> None:
    p = make_mixture(50, 40, 30, 5, 2, 8)
    inputs = {"x": p.x, "weight": torch.randn(30, 40), "bias": torch.randn(30), "weights": p.weights}
    inputs |= {"lora_A": p.lora_A, "lora_B": p.lora_B}
    for name in wanted:
        inputs[name].requires_grad_()
    fixed = [inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    y = moa_ops.moa_linear(*fixed, p.routing(), scaling=0.7)
    grads = torch.autograd.grad(y, [inputs[name] for name in wanted], p.grad_y)

    exact = {name: t.detach().double().requires_grad_(name in wanted) for name, t in inputs.items()}
    base = torch.nn.functional.linear(exact["x"], exact["weight"], exact["bias"])
    lora = (exact["lora_A"], exact["lora_B"], exact["weights"], p.expert_offsets, p.order)
    expected, _ = reference.segment_lora(exact["x"], *lora, None, 0.7, None, base)
    assert_close(y, expected, "y")
    wants = torch.autograd.grad(expected, [exact[name] for name in wanted], p.grad_y.double())
    for name, grad, want in zip(wanted, grads, wants, strict=True):
        assert_close(grad, want, name)


@pytest.mark.parametrize("autocast", [False, True])
def test_scaling_that_requires_grad_is_a_constant_without_gradients(autocast: bool) -> None:
    """Where gradients are off nothing is lost by it; where they are on it is refused (test_bad_input.py)."""
    p = make_mixture(24, 40, 30, 5, 2, 8, expert_scaling=True)
    learned = p.expert_scaling.clone().requires_grad_()
    call = (p.x, p.lora_A, p.lora_B, p.routing())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = moa_ops.segment_lora(*call, scaling=p.expert_scaling)
        assert torch.equal(moa_ops.segment_lora(*call, scaling=learned), expected)


def test_leading_dimensions_and_scaling_tensor() -> None:
    p = make_mixture(24, 40, 30, 5, 2, 8, expert_scaling=True)
    flat = moa_ops.segment_lora(p.x, p.lora_A, p.lora_B, p.routing(), scaling=p.expert_scaling, base=p.base)
    shaped = moa_ops.segment_lora(
        p.x.view(2, 3, 4, 40),
        p.lora_A,
        p.lora_B,
        p.routing(),
        scaling=p.expert_scaling,
        base=p.base.view(2, 3, 4, 30),
    )
    assert torch.equal(shaped, flat.view(2, 3, 4, 30))
    p.scaling = 1.0
    assert torch.equal(flat, p.forward()[0])
    routing = moa_ops.Routing.from_indices([3], num_experts=5)
    vector = moa_ops.segment_lora(p.x[0], p.lora_A, p.lora_B, routing)
    assert vector.shape == (30,)
    assert_close(vector, p.lora_B[3].double() @ (p.lora_A[3].double() @ p.x[0].double()))


def test_base_is_added_and_not_changed() -> None:
    p = make_mixture(24, 40, 30, 5, 2, 8)
    before = p.base.clone()
    with_base = moa_ops.segment_lora(p.x, p.lora_A, p.lora_B, p.routing(), base=p.base)
    assert torch.equal(p.base, before)
    assert_close(with_base - p.base, moa_ops.segment_lora(p.x, p.lora_A, p.lora_B, p.routing()).double())
