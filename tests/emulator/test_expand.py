"""Expand and combine against float64.

``y[t] = base[t] + bias + Σ w·s·B_e h[p]`` and ``dx[t] = Σ s·w·A_eᵀ u[p] + dz·W_e``.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from emulator.arrays import (
    BF16,
    F16,
    F32,
    TOLERANCE,
    assert_close,
    assert_no_conflicts,
    error,
    exact,
    normal,
    rounded,
    unwritten,
)
from emulator.test_shrink import DTYPES, accumulator, route, sort


def expected(
    values: np.ndarray,
    panels: np.ndarray,
    ids: np.ndarray,
    factors: np.ndarray,
    ranks: np.ndarray | None,
) -> np.ndarray:
    """``Σ factor · panel[e] values[p]``; panels ``[experts, rank, width]``, values in sorted order."""
    experts, rank, width = panels.shape
    tokens, k = ids.shape
    offsets, order = sort(ids, experts)
    result = np.zeros((tokens, width))
    for e in range(experts):
        used = rank if ranks is None else ranks[e]
        at = slice(offsets[e], offsets[e + 1])
        slots = order[at]
        rows = factors.ravel()[slots, None] * exact(values)[at, :used] @ exact(panels)[e, :used]
        np.add.at(result, slots // k, rows)
    return result


def check(
    emulator: ModuleType,
    rng: np.random.Generator,
    ids: np.ndarray,
    rank: int,
    width: int,
    dtype: np.dtype,
    *,
    experts: int,
    adapter: np.dtype | None = None,
    ranks: np.ndarray | None = None,
    pad: int = 0,
) -> None:
    """Forward and backward; the base is none, ``y`` itself, or has rows ``width + pad`` apart."""
    tokens, k = ids.shape
    acc, adapter = accumulator(dtype), dtype if adapter is None else adapter
    offsets, order = sort(ids, experts)
    what = f"T={tokens} k={k} E={experts} r={rank} width={width} {dtype} {adapter}"
    panels = rounded(exact(rounded(rng.standard_normal((experts, rank, width)), dtype)), adapter)
    values, weights = normal(rng, ids.size, rank, dtype=acc), normal(rng, tokens, k, dtype=acc)
    if ranks is not None:  # neither read nor counted
        for e in range(experts):
            panels[e, ranks[e] :] = rounded(np.array(np.nan), adapter)
    scale = rng.standard_normal(experts)
    factors = exact(weights) * np.where(ids >= 0, 0.5 * scale[ids], 0)
    want = expected(values, panels, ids, factors, ranks)
    by_rows = np.ascontiguousarray(panels.transpose(0, 2, 1))
    base = normal(rng, tokens, width + pad, dtype=dtype)[:, :width]
    bias = normal(rng, width, dtype=dtype)

    def forward(base, bias, y):
        emulator.expand(values, by_rows, offsets, order, weights, scale, 0.5, ranks, base, bias, y)
        return y

    y = forward(base, bias, unwritten(tokens, width, dtype=dtype))
    assert_close(y, exact(base) + exact(bias) + want, f"y at {what}")
    in_place = base.copy(order="C")
    assert forward(in_place, bias, in_place).tobytes() == y.tobytes()
    assert forward(base, bias, unwritten(tokens, width, dtype=dtype)).tobytes() == y.tobytes()
    assert_close(forward(None, None, unwritten(tokens, width, dtype=dtype)), want, f"no base at {what}")

    dz, router = normal(rng, ids.size, dtype=acc), normal(rng, experts, width, dtype=acc)
    sorted_ids = ids.ravel()[order]
    shares = np.where((sorted_ids >= 0)[:, None], exact(dz)[:, None] * exact(router)[sorted_ids], 0)
    both = want.copy()
    np.add.at(both, order // k, shares)

    def backward(dz, router):
        dx = unwritten(tokens, width, dtype=dtype)
        emulator.backward_expand(values, panels, offsets, order, weights, scale, 0.5, ranks, dz, router, dx)
        return dx

    assert_close(backward(None, None), want, f"dx at {what}")
    dx = backward(dz, router)
    assert_close(dx, both, f"dx with the router at {what}")
    assert dx.tobytes() == backward(dz, router).tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 24, 64, 128, 256])
def test_ranks(emulator: ModuleType, rng, dtype: np.dtype, rank: int) -> None:
    check(emulator, rng, route(rng, 40, 2, 3, 0.1), rank, 72, dtype, experts=3)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 33, 64, 129])
def test_widths(emulator: ModuleType, rng, dtype: np.dtype, width: int) -> None:
    check(emulator, rng, route(rng, 37, 2, 3), 16, width, dtype, experts=3)
    check(emulator, rng, route(rng, 5, 1, 2), 5, width, dtype, experts=2, pad=3)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("experts", [1, 3, 7, 64, 130])
@pytest.mark.parametrize("tokens", [0, 1, 7, 65, 130])
def test_experts_and_tokens(emulator: ModuleType, rng, dtype: np.dtype, experts: int, tokens: int) -> None:
    for k in sorted({1, min(2, experts), min(experts, 7)}):
        check(emulator, rng, route(rng, tokens, k, experts, 0.2), 4, 72, dtype, experts=experts)


@pytest.mark.plain_alone
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_4096_experts(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, route(rng, 40, 3, 4096, 0.1), 3, 9, dtype, experts=4096)
    check(emulator, rng, route(rng, 2100, 1, 4096), 3, 9, dtype, experts=4096)  # by pairs


def test_no_columns(emulator: ModuleType, rng) -> None:
    for dtype in (F32, BF16):
        check(emulator, rng, route(rng, 9, 2, 3), 8, 0, dtype, experts=3)


def test_every_expert_selected(emulator: ModuleType, rng) -> None:
    check(emulator, rng, route(rng, 9, 65, 65), 8, 40, BF16, experts=65)
    check(emulator, rng, route(rng, 70, 7, 7), 8, 40, F32, experts=7)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_uneven_segments(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, np.full((200, 1), 3), 16, 64, dtype, experts=8)  # all to one
    check(emulator, rng, np.full((70, 2), -1), 16, 64, dtype, experts=4)  # none at all
    ids = np.array([5, 1, 5, 0]).repeat([63, 64, 1, 2])[:, None]
    check(emulator, rng, ids, 8, 64, dtype, experts=7)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_token_that_names_an_expert_twice(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, rng.integers(-1, 2, (90, 3)), 16, 40, dtype, experts=2)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_mixed_ranks_leave_rows_unread(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    ids = route(rng, 50, 2, 5, 0.1)
    for rank, ranks in [(16, [16, 3, 0, 8, 1]), (40, [33, 40, 8, 0, 17])]:
        check(emulator, rng, ids, rank, 66, dtype, experts=5, ranks=np.array(ranks, np.int32))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_float32_adapters_under_half(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    for rank, width in [(16, 128), (5, 77), (64, 64)]:
        check(emulator, rng, route(rng, 33, 2, 4, 0.1), rank, width, dtype, experts=4, adapter=F32)


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "rank", "width", "mixed"),
    [(140, 40, 7, 20, 136, False), (70, 3, 3, 256, 40, False), (130, 50, 5, 40, 33, True)],
)
def test_chunks_of_experts(
    emulator: ModuleType, rng, tokens: int, experts: int, k: int, rank: int, width: int, mixed: bool
) -> None:
    """More coefficients than shared memory holds, over several blocks of columns."""
    if isinstance(emulator, ModuleType):
        plan = emulator.expand_plan(tokens, k, experts, rank, width, True)
        assert plan["fits"] and plan["fragments"] < -(-rank // 16) * 16 * min(experts, 8 * k), plan
    ranks = rng.integers(0, rank + 1, experts).astype(np.int32) if mixed else None
    ids = route(rng, tokens, k, experts, 0.1)
    check(emulator, rng, ids, rank, width, BF16, experts=experts, ranks=ranks)


def test_strip_after_strip(emulator: ModuleType, rng) -> None:
    """So wide that a block goes on with other columns."""
    tokens, rank, width = 3, 24, 67_620
    if isinstance(emulator, ModuleType):
        assert emulator.expand_plan(tokens, 2, 2, rank, width, False)["units"] == 2
    ids = route(rng, tokens, 2, 2)
    offsets, order = sort(ids, 2)
    values, weights = normal(rng, ids.size, rank), normal(rng, tokens, 2)
    panels = normal(rng, 2, width, rank, dtype=BF16)
    y = normal(rng, tokens, width, dtype=BF16)
    want = exact(y) + expected(values, panels.transpose(0, 2, 1), ids, exact(weights), None)
    emulator.expand(values, panels, offsets, order, weights, None, 1.0, None, y, None, y)
    assert_close(y, want)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_rank_beyond_shared_memory(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, route(rng, 20, 2, 2), 400, 40, dtype, experts=2)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_with_its_tokens(
    emulator: ModuleType, rng, dtype: np.dtype, bad: float
) -> None:
    ids = route(rng, 40, 2, 5, 0.1)
    offsets, order = sort(ids, 5)
    values, weights = normal(rng, ids.size, 16), normal(rng, 40, 2)
    panels = normal(rng, 5, 16, 40, dtype=dtype)
    panels[3, 4, 17] = rounded(np.array([bad]), dtype)[0]
    by_rows = np.ascontiguousarray(panels.transpose(0, 2, 1))
    y, dx = unwritten(40, 40, dtype=dtype), unwritten(40, 40, dtype=dtype)
    given = (offsets, order, weights, None, 1.0, None)
    emulator.expand(values, by_rows, *given, None, None, y)
    emulator.backward_expand(values, panels, *given, None, None, dx)
    hit = np.zeros((40, 40), bool)
    hit[(ids == 3).any(1), 17] = True
    assert hit.any()
    panels[3, 4, 17] = 0
    want = expected(values, panels, ids, exact(weights) * (ids >= 0), None)
    for result in (y, dx):
        assert (np.isfinite(exact(result)) == ~hit).all()
        assert error(np.where(hit, 0, exact(result)), np.where(hit, 0, want)) < TOLERANCE[dtype]


def test_plan(emulator: ModuleType) -> None:
    if not isinstance(emulator, ModuleType):
        pytest.skip("the plan is no operator")
    plan = emulator.expand_plan
    few = plan(8192, 2, 8, 16, 4096, False)
    assert (few["tiles"], few["parts"], few["units"]) == (64, 8, 4)
    assert few["fragments"] == 128 and 2 * few["shared"] < 110 * 1024
    assert plan(1024, 2, 64, 16, 4096, False)["inside"] and not plan(1025, 2, 64, 16, 4096, False)["inside"]
    for tokens in (1, 127, 128, 129, 8192, 10**6):
        for width in (1, 127, 128, 129, 4096, 28672):
            for rank in (1, 16, 64, 256):
                p = plan(tokens, 2, 64, rank, width, True)
                assert p["tiles"] == -(-tokens // 128)
                assert (p["parts"] - 1) * p["units"] * 128 < width <= p["parts"] * p["units"] * 128
                assert p["fits"] and p["fragments"] >= -(-rank // 16) * 16
    assert plan(100, 2, 4096, 240, 64, False)["fits"]
    assert not plan(100, 2, 2, 512, 64, False)["fits"]  # multiply-adds


def test_tiles_do_not_conflict(emulator: ModuleType, rng) -> None:
    """Nothing that a thread reads or writes in shared memory meets another's bank.

    So many slots that the tiles need not look for them: what comes in any order is scattered anyhow.
    """
    for tokens, k, experts, rank, dtype in [
        (2049, 1, 1, 16, BF16),
        (1100, 2, 8, 16, BF16),
        (1100, 2, 4, 48, F16),
    ]:
        offsets, order = sort(route(rng, tokens, k, experts), experts)
        values, weights = normal(rng, tokens * k, rank), normal(rng, tokens, k)
        panels, y = normal(rng, experts, 128, rank, dtype=dtype), np.zeros((tokens, 128), dtype)
        given = (offsets, order, weights, None, 1.0, None)
        emulator.expand(values, panels, *given, y, None, y)
        emulator.backward_expand(values, panels.reshape(experts, rank, 128), *given, None, None, y)
    check(emulator, rng, np.zeros((64, 1), np.int64), 16, 64, F32, experts=1)
    assert_no_conflicts(emulator)


def test_wild_routing_stays_inside(emulator: ModuleType, rng) -> None:
    """What offsets, order and ranks hold is clamped before it becomes an address."""
    order = np.concatenate([rng.integers(0, 40, 20), rng.integers(-(2**31), 2**31, 20)]).astype(np.int32)
    if "tsan" in emulator.__name__:  # any sum, but inside: two positions may add to, or be, one at a time
        order = np.unique(order)
        order = np.concatenate([order, np.full(40 - order.size, 2**31 - 1, np.int32)])
    ranks = np.array([-5, 2**30, 8], np.int32)
    for dtype in (BF16, F32):
        values, weights = normal(rng, 40, 8), normal(rng, 20, 2)
        panels = normal(rng, 3, 8, 64, dtype=dtype)
        by_rows = np.ascontiguousarray(panels.transpose(0, 2, 1))
        for offsets in ([0, 10, 20, 40], [0, 90, -7, 2**30], [5, 5, 5, -1], [2**31 - 1] * 4):
            offsets, y = np.array(offsets, np.int32), unwritten(20, 64, dtype=dtype)
            emulator.expand(values, by_rows, offsets, order, weights, None, 1.0, ranks, None, None, y)
            emulator.backward_expand(
                values,
                panels,
                offsets,
                order,
                weights,
                None,
                1.0,
                ranks,
                normal(rng, 40),
                normal(rng, 3, 64),
                y,
            )


@pytest.mark.parametrize(
    "dtype", [pytest.param(BF16, id="bf16"), pytest.param(F16, id="f16", marks=pytest.mark.plain_alone)]
)
@pytest.mark.parametrize("rank", [4, 132])
def test_wild_order_leaves_places_to_chance(emulator: ModuleType, rng, rank: int, dtype: np.dtype) -> None:
    """Slots that no position names are looked up in memory that holds anything, such as 2313 twins.

    Rank 4 takes the tile of many tokens, rank 132 that of few.
    """
    if not isinstance(emulator, ModuleType):
        pytest.skip("the memory is the allocator's")
    if "tsan" in emulator.__name__:
        pytest.skip("two slots that chance gives one expert write one fragment: any sum, but inside")
    emulator.poison(9)
    tokens, experts, width = 1100, 2400, 8
    order = np.full(2 * tokens, 2**31 - 1, np.int32)
    order[::3] = rng.permutation(2 * tokens)[: len(order[::3])]
    offsets = np.minimum(np.arange(experts + 1), 2 * tokens).astype(np.int32)
    y, values = unwritten(tokens, width, dtype=dtype), normal(rng, 2 * tokens, rank)
    panels, dz = normal(rng, experts, width, rank, dtype=dtype), normal(rng, 2 * tokens)
    assert emulator.expand_wide_plan(tokens, 2, experts, rank, width, False)["fits"] == (rank == 4)
    assert not emulator.expand_plan(tokens, 2, experts, rank, width, False)["inside"]
    given = (offsets, order, normal(rng, tokens, 2), None, 1.0, None)
    emulator.expand(values, panels, *given, None, None, y)
    router = normal(rng, experts, width)
    emulator.backward_expand(values, panels.reshape(experts, rank, width), *given, dz, router, y)
