"""Expand and combine of many tokens against float64; equations in test_expand.py."""

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
from emulator.test_expand import check, expected
from emulator.test_shrink import route, sort

HALF = pytest.mark.parametrize(
    "dtype", [pytest.param(BF16, id="bf16"), pytest.param(F16, id="f16", marks=pytest.mark.plain_alone)]
)
TOKENS = 1030  # four tiles, and some rows


@HALF
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 24, 33, 64, 80, 130])
def test_ranks(emulator: ModuleType, rng, dtype: np.dtype, rank: int) -> None:
    check(emulator, rng, route(rng, TOKENS, 2, 3, 0.1), rank, 24, dtype, experts=3)


@HALF
@pytest.mark.parametrize("width", [1, 7, 33, 64, 72, 129])
def test_widths(emulator: ModuleType, rng, dtype: np.dtype, width: int) -> None:
    check(emulator, rng, route(rng, TOKENS, 2, 3), 16, width, dtype, experts=3, pad=width % 5)


@pytest.mark.parametrize("experts", [2, 8, 9, 40, 130])
def test_experts(emulator: ModuleType, rng, experts: int) -> None:
    for k in sorted({2, min(experts, 5)}):
        check(emulator, rng, route(rng, 1 + 2048 // k, k, experts, 0.2), 4, 24, BF16, experts=experts)


def test_uneven_segments(emulator: ModuleType, rng) -> None:
    check(emulator, rng, np.full((2049, 1), 3), 16, 8, BF16, experts=8)  # all to one
    check(emulator, rng, np.full((TOKENS, 2), -1), 16, 8, BF16, experts=4)  # none at all
    few = np.full((TOKENS, 2), -1)
    few[::300, 0] = 5  # groups and tiles without any
    check(emulator, rng, few, 16, 8, BF16, experts=7)


@HALF
def test_token_that_names_an_expert_twice(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, rng.integers(-1, 2, (700, 3)), 16, 24, dtype, experts=2)
    check(emulator, rng, rng.integers(-1, 20, (2050, 2)), 16, 8, dtype, experts=20)


@HALF
def test_mixed_ranks_leave_rows_unread(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    ids = route(rng, TOKENS, 2, 5, 0.1)
    for rank, ranks in [(16, [16, 3, 0, 8, 1]), (40, [33, 40, 8, 0, 17])]:
        check(emulator, rng, ids, rank, 24, dtype, experts=5, ranks=np.array(ranks, np.int32))


@HALF
def test_float32_adapters_under_half(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    for rank, width in [(16, 64), (5, 13)]:
        check(emulator, rng, route(rng, TOKENS, 2, 4, 0.1), rank, width, dtype, experts=4, adapter=F32)


@pytest.mark.parametrize("rank, dense", [(24, True), (108, False)])
def test_column_after_column(emulator: ModuleType, rng, rank: int, dense: bool) -> None:
    """So wide that a block goes on with other columns."""
    tokens, width = TOKENS, 3500
    if isinstance(emulator, ModuleType):
        plan = emulator.expand_wide_plan(tokens, 2, 2, rank, width, False)
        assert (plan["dense"], plan["units"]) == (dense, 2)
    ids = route(rng, tokens, 2, 2)
    offsets, order = sort(ids, 2)
    values, weights = normal(rng, ids.size, rank), normal(rng, tokens, 2)
    panels = normal(rng, 2, width, rank, dtype=BF16)
    y = normal(rng, tokens, width, dtype=BF16)
    want = exact(y) + expected(values, panels.transpose(0, 2, 1), ids, exact(weights), None)
    emulator.expand(values, panels, offsets, order, weights, None, 1.0, None, y, None, y)
    assert_close(y, want)


@HALF
@pytest.mark.parametrize("experts", [3, 8, 9, 12, 13])
@pytest.mark.parametrize("router", [True, False])
def test_steps_held_and_not(emulator: ModuleType, rng, dtype, experts: int, router: bool) -> None:
    """Up to 12 steps, eight of which are held, are not listed; a router has two for each eight experts."""
    steps = experts + 2 * -(-experts // 8) * router
    if isinstance(emulator, ModuleType):
        assert emulator.expand_wide_plan(TOKENS, 2, experts, 16, 136, router)["dense"] == (steps <= 12)
    ids = route(rng, TOKENS, 2, experts, 0.1)
    offsets, order = sort(ids, experts)
    values, weights = normal(rng, ids.size, 16), normal(rng, TOKENS, 2)
    panels = normal(rng, experts, 16, 136, dtype=dtype)
    dz, weight = (normal(rng, ids.size), normal(rng, experts, 136)) if router else (None, None)
    dx = unwritten(TOKENS, 136, dtype=dtype)
    emulator.backward_expand(values, panels, offsets, order, weights, None, 0.5, None, dz, weight, dx)
    want = expected(values, panels, ids, 0.5 * exact(weights) * (ids >= 0), None)
    if router:
        chosen = np.where(ids.ravel() >= 0)[0]
        at = np.argsort(order)[chosen]
        np.add.at(want, chosen // 2, exact(dz)[at, None] * exact(weight)[ids.ravel()[chosen]])
    assert_close(dx, want)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("experts", [20, 100])
def test_tokens_by_pairs_of_experts(emulator: ModuleType, rng, experts: int, k: int) -> None:
    """Tiles take tokens in another order, which no token's result shows, to the bit."""
    tokens, part, rank, width = 2200, 1500, 16, 40
    if isinstance(emulator, ModuleType):
        assert emulator.expand_wide_plan(tokens, k, experts, rank, width, False)["cluster"]
        plan = emulator.expand_wide_plan(part, k, experts, rank, width, False)
        assert (plan["fits"], plan["cluster"]) == (k == 2, False)
    ids = route(rng, tokens, k, experts, 0.1)
    values, weights = normal(rng, ids.size, rank), normal(rng, tokens, k)
    panels = normal(rng, experts, rank, width, dtype=BF16)
    by_rows = np.ascontiguousarray(panels.transpose(0, 2, 1))
    dz, router, base = (
        normal(rng, ids.size),
        normal(rng, experts, width),
        normal(rng, tokens, width, dtype=BF16),
    )

    def run(count: int) -> tuple[np.ndarray, np.ndarray]:
        offsets, order = sort(ids[:count], experts)
        at = np.argsort(sort(ids, experts)[1])[order]  # where a slot's values are
        y, dx = unwritten(count, width, dtype=BF16), unwritten(count, width, dtype=BF16)
        given = (offsets, order, weights[:count], None, 0.5, None)
        emulator.expand(values[at], by_rows, *given, base[:count], None, y)
        emulator.backward_expand(values[at], panels, *given, dz[at], router, dx)
        return y, dx

    y, dx = run(tokens)
    want = expected(values, panels, ids, 0.5 * exact(weights) * (ids >= 0), None)
    assert_close(y, exact(base) + want)
    shares = np.zeros_like(want)
    order = sort(ids, experts)[1]
    chosen = np.where(ids.ravel() >= 0)[0]
    at = np.argsort(order)[chosen]
    np.add.at(shares, chosen // k, exact(dz)[at, None] * exact(router)[ids.ravel()[chosen]])
    assert_close(dx, want + shares)
    if k == 2:
        few = run(part)
        assert y[:part].tobytes() == few[0].tobytes()
        assert dx[:part].tobytes() == few[1].tobytes()


@HALF
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("experts", [10, 40])
def test_what_is_not_finite_stays_with_its_tokens(
    emulator: ModuleType, rng, dtype: np.dtype, bad: float, experts: int
) -> None:
    ids = route(rng, TOKENS, 2, experts, 0.1)
    offsets, order = sort(ids, experts)
    values, weights = normal(rng, ids.size, 16), normal(rng, TOKENS, 2)
    panels = normal(rng, experts, 16, 72, dtype=dtype)
    panels[3, 4, 17] = rounded(np.array([bad]), dtype)[0]
    by_rows = np.ascontiguousarray(panels.transpose(0, 2, 1))
    y, dx = unwritten(TOKENS, 72, dtype=dtype), unwritten(TOKENS, 72, dtype=dtype)
    given = (offsets, order, weights, None, 1.0, None)
    emulator.expand(values, by_rows, *given, None, None, y)
    emulator.backward_expand(values, panels, *given, None, None, dx)
    hit = np.zeros((TOKENS, 72), bool)
    hit[(ids == 3).any(1), 17] = True
    assert hit.any()
    panels[3, 4, 17] = 0
    want = expected(values, panels, ids, exact(weights) * (ids >= 0), None)
    for result in (y, dx):
        assert (np.isfinite(exact(result)) == ~hit).all()
        assert error(np.where(hit, 0, exact(result)), np.where(hit, 0, want)) < TOLERANCE[dtype]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("experts", [8, 12])
def test_what_is_not_finite_of_the_router(emulator: ModuleType, rng, bad: float, experts: int) -> None:
    ids = route(rng, TOKENS, 2, experts, 0.1)
    offsets, order = sort(ids, experts)
    values, weights = normal(rng, ids.size, 16), normal(rng, TOKENS, 2)
    panels, dz = normal(rng, experts, 16, 40, dtype=F16), normal(rng, ids.size)
    router = normal(rng, experts, 40)
    router[7, 17] = bad
    dx = unwritten(TOKENS, 40, dtype=F16)
    emulator.backward_expand(values, panels, offsets, order, weights, None, 1.0, None, dz, router, dx)
    hit = np.zeros((TOKENS, 40), bool)
    hit[(ids == 7).any(1), 17] = True
    assert (np.isfinite(exact(dx)) == ~hit).all()


def test_plan(emulator: ModuleType) -> None:
    if not isinstance(emulator, ModuleType):
        pytest.skip("the plan is no operator")
    plan = emulator.expand_wide_plan
    few, many = plan(8192, 2, 8, 16, 4096, False), plan(8192, 2, 64, 16, 4096, True)
    assert few["dense"] and (few["tiles"], few["parts"], few["units"]) == (32, 16, 4)
    assert few["fragments"] == few["steps"] == 8 and few["shared"] == 64 * 1024
    back = plan(8192, 2, 8, 16, 4096, True)  # two steps of the router beyond those held, 1 KB a warp each
    assert back["dense"] and back["steps"] == 10 and (back["units"], back["shared"]) == (4, (80 + 16) * 1024)
    assert many["cluster"] and not many["dense"] and many["fragments"] == 80 and many["steps"] == 80
    assert plan(8192, 2, 12, 16, 4096, False)["dense"] and not plan(8192, 2, 13, 16, 4096, False)["dense"]
    assert not plan(8192, 2, 12, 16, 4096, True)["dense"]  # and four of the router
    assert not plan(8192, 3, 40, 16, 4096, False)["dense"]
    assert not plan(8192, 2, 12, 16, 4096, False)["cluster"] and plan(8192, 2, 13, 16, 4096, False)["cluster"]
    assert not plan(2047, 2, 64, 16, 4096, False)["cluster"]  # few tokens
    assert not plan(8192, 3, 64, 16, 4096, False)["cluster"]  # more than a pair
    assert plan(1025, 2, 64, 16, 4096, False)["fits"] and not plan(1024, 2, 64, 16, 4096, False)["fits"]
    assert not plan(64, 64, 64, 16, 4096, False)["fits"]  # decode
    for tokens in (2049, 8192, 10**6):
        for width in (1, 63, 64, 65, 4096, 28672):
            for rank in (1, 16, 64, 128):
                p = plan(tokens, 2, 64, rank, width, True)
                assert p["fits"] and p["tiles"] == -(-tokens // 256)
                assert (p["parts"] - 1) * p["units"] * 64 < width <= p["parts"] * p["units"] * 64
                assert p["shared"] <= 99 * 1024


def test_tiles_do_not_conflict(emulator: ModuleType, rng) -> None:
    """Nothing that a thread reads or writes in shared memory meets another's bank."""
    for k, experts, rank, dtype in [(2, 8, 16, BF16), (2, 4, 48, F16), (2, 14, 16, BF16)]:
        offsets, order = sort(route(rng, TOKENS, k, experts), experts)
        values, weights = normal(rng, TOKENS * k, rank), normal(rng, TOKENS, k)
        panels, y = normal(rng, experts, 128, rank, dtype=dtype), np.zeros((TOKENS, 128), dtype)
        given = (offsets, order, weights, None, 1.0, None)
        emulator.expand(values, panels, *given, y, None, y)
        emulator.backward_expand(values, panels.reshape(experts, rank, 128), *given, None, None, y)
    assert_no_conflicts(emulator)
