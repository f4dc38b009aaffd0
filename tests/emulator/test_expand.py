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
    assert_close,
    assert_no_conflicts,
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
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 24, 64, 128])
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


def test_tile_rows_do_not_conflict(emulator: ModuleType, rng) -> None:
    """Tokens in a row of one expert: nothing that a thread adds to the tile meets another's bank."""
    check(emulator, rng, np.zeros((128, 1), np.int64), 16, 64, BF16, experts=1)
    check(emulator, rng, np.zeros((128, 1), np.int64), 64, 64, F16, experts=1)
    check(emulator, rng, np.zeros((64, 1), np.int64), 16, 64, F32, experts=1)
    assert_no_conflicts(emulator)


def test_wild_routing_stays_inside(emulator: ModuleType, rng) -> None:
    """What offsets, order and ranks hold is clamped before it becomes an address."""
    order = rng.integers(-(2**31), 2**31, 40).astype(np.int32)
    if (
        "tsan" in emulator.__name__
    ):  # out of order, two positions may add to one token at a time: any sum, but inside
        order.sort()
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
