"""Routing kernels: selection, sort and gradient, on every path of the plan.

Weights are compared with float64; ids and order exactly, as ``tests/test_routing.py`` does
for the CPU kernels.
"""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np
import pytest

from emulator.arrays import (
    BF16,
    F16,
    F32,
    F64,
    TOLERANCE,
    assert_close,
    error,
    exact,
    normal,
    rounded,
    unwritten,
)
from emulator.test_shrink import not_on_the_cpu

SOFTMAX, SIGMOID = 0, 1
FLAGS = [(SOFTMAX, False), (SOFTMAX, True), (SIGMOID, False), (SIGMOID, True)]


# ---- what should come out, in float64 ----


def scores(z: np.ndarray, score_func: int) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        if score_func == SIGMOID:
            return 1 / (1 + np.exp(-z))
        p = np.exp(z - z.max(1, keepdims=True, initial=-np.inf))
        return p / p.sum(1, keepdims=True)


def expected_topk(logits, k, score_func, norm, bias=None, mask=None) -> tuple[np.ndarray, np.ndarray]:
    """Weights and ids; NaN first, ties to the lower id."""
    z = exact(logits)
    tokens = np.arange(len(z))[:, None]
    key = z if bias is None else scores(z, score_func) + exact(bias)
    descending = np.where(np.isnan(key), -np.inf, -key)
    nan_first = np.lexsort((descending, ~np.isnan(key)), axis=1)
    ids = nan_first[:, :k].astype(np.int64)
    chosen = z[tokens, ids]
    with np.errstate(invalid="ignore"):
        if score_func == SIGMOID:
            weights = scores(chosen, SIGMOID)
            weights = weights / weights.sum(1, keepdims=True) if norm else weights
        elif norm:
            weights = scores(chosen, SOFTMAX)
            if bias is not None:
                weights[np.isnan(key[:, 0])] = np.nan
        else:
            weights = scores(z, SOFTMAX)[tokens, ids]
    if mask is not None:
        weights[~mask], ids[~mask] = 0, -1
    return weights, ids


def expected_sort(ids: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    flat = ids.ravel()
    bins = np.where((flat < 0) | (flat >= experts), experts, flat)
    order = np.argsort(bins, kind="stable")
    return np.searchsorted(bins[order], np.arange(experts + 1)).astype(np.int32), order.astype(np.int32)


def expected_backward(dw, logits, ids, score_func, norm) -> np.ndarray:
    z, dw = exact(logits), exact(dw)
    dz = np.zeros_like(z)
    p_all = scores(z, score_func)
    for t, row in enumerate(ids):
        if row.size == 0 or row[0] < 0:
            continue
        if score_func == SOFTMAX and norm:
            w = scores(z[t : t + 1, row], SOFTMAX)[0]
            dz[t, row] = w * (dw[t] - (w * dw[t]).sum())
        elif score_func == SOFTMAX:
            c = (p_all[t, row] * dw[t]).sum()
            dz[t] = -p_all[t] * c
            dz[t, row] += p_all[t, row] * dw[t]
        else:
            p = p_all[t, row]
            slope = p * scores(-z[t : t + 1, row], SIGMOID)[0]
            total = p.sum() if norm else 1.0
            c = (p / total * dw[t]).sum() if norm else 0.0
            dz[t, row] = slope * (dw[t] - c) / total
    return dz


# ---- what the kernels say ----


def topk(emulator, logits, k, score_func=SOFTMAX, norm=False, bias=None, mask=None):
    tokens, experts = logits.shape
    out = (
        unwritten(tokens, k, dtype=F64 if logits.dtype == F64 else F32),
        np.full((tokens, k), -7, np.int64),
        np.full(experts + 1, -7, np.int32),
        np.full(tokens * k, -7, np.int32),
    )
    emulator.topk(logits, k, score_func, norm, bias, mask, *out)
    return out


def check_topk(emulator, logits, k, score_func=SOFTMAX, norm=False, bias=None, mask=None) -> None:
    weights, ids, offsets, order = topk(emulator, logits, k, score_func, norm, bias, mask)
    want_weights, want_ids = expected_topk(logits, k, score_func, norm, bias, mask)
    np.testing.assert_array_equal(ids, want_ids)
    want_offsets, want_order = expected_sort(want_ids, logits.shape[1])
    np.testing.assert_array_equal(offsets, want_offsets)
    np.testing.assert_array_equal(order, want_order)
    np.testing.assert_array_equal(np.isnan(weights), np.isnan(want_weights))
    assert_close(np.nan_to_num(weights), np.nan_to_num(want_weights), "weights", TOLERANCE[weights.dtype])


# Every shape of lanes and registers; T = 257 with k = 8 also fills more than one pass of a block.
@pytest.mark.parametrize(
    ("tokens", "experts"),
    [
        *itertools.product([0, 1, 7], [1, 3, 7, 8, 32, 33, 64, 65, 128, 129, 513]),
        *itertools.product([257], [1, 3, 7, 8, 32, 33, 64, 65, 128]),
        *[pytest.param(257, experts, marks=pytest.mark.plain_alone) for experts in (129, 513)],
    ],
)
def test_experts_and_tokens(emulator: ModuleType, rng, experts: int, tokens: int) -> None:
    logits = normal(rng, tokens, experts)
    for k in sorted({1, min(2, experts), min(8, experts)}):
        check_topk(emulator, logits, k, SOFTMAX, k > 1)


@pytest.mark.parametrize("experts", [1, 3, 32, 65, 129, 513])
def test_every_expert_selected(emulator: ModuleType, rng, experts: int) -> None:
    for score_func, norm in FLAGS if experts < 200 else FLAGS[:1]:
        check_topk(emulator, normal(rng, 3 if experts < 200 else 1, experts), experts, score_func, norm)


def test_4096_experts(emulator: ModuleType, rng) -> None:
    check_topk(emulator, normal(rng, 5, 4096), 8)
    check_topk(emulator, normal(rng, 1, 4096), 300, SIGMOID, True)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=["f32", "f64", "bf16", "f16"])
@pytest.mark.parametrize(("score_func", "norm"), FLAGS)
@pytest.mark.parametrize("experts", [7, 100, 300, 600])
def test_flags_and_dtypes(
    emulator: ModuleType, rng, dtype, score_func: int, norm: bool, experts: int
) -> None:
    wide = normal(rng, 33, experts + 5, dtype=dtype)  # rows apart
    acc = F64 if dtype == F64 else F32
    logits, bias = wide[:, :experts], rng.permutation(experts).astype(acc) * acc.type(0.125)
    mask = rng.random(33) < 0.7
    check_topk(emulator, logits, 3, score_func, norm)
    check_topk(emulator, logits, 3, score_func, norm, bias, mask)


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["f32", "f64", "bf16"])
@pytest.mark.parametrize("experts", [8, 40, 600])
def test_numbers_that_are_none(emulator: ModuleType, rng, dtype, experts: int) -> None:
    z = rng.standard_normal((12, experts))
    z[0, 3] = np.nan
    z[1, :] = np.nan
    z[2, 5] = np.inf
    z[3, 2] = -np.inf
    z[4, :] = -np.inf
    z[5, [1, 6]] = np.nan, np.inf
    z[6, :] = 0.0
    z[7, ::2], z[7, 1::2] = 0.0, -0.0
    z[8, :] = np.inf
    z[9, :] = -1e30
    z[10, 4:] = z[10, 3]
    logits = rounded(z, dtype)
    bias = np.zeros(experts, F64 if dtype == F64 else F32)
    for score_func, norm in FLAGS:
        for k in (1, 4, experts if experts < 50 else 5):
            check_topk(emulator, logits, k, score_func, norm)
            weights, ids, *_ = topk(emulator, logits, k, score_func, norm, bias)
            assert all(len(set(row)) == k and min(row) >= 0 and max(row) < experts for row in ids.tolist())
            assert np.isnan(weights[1]).all()


def test_ties_go_to_the_lower_id(emulator: ModuleType, rng) -> None:
    for experts in (8, 64, 200, 700):
        logits = rounded(rng.integers(0, 3, (40, experts)).astype(np.float64), F32)
        check_topk(emulator, logits, min(experts, 6), SOFTMAX, True)


def test_every_launch_plan_runs(emulator: ModuleType, rng) -> None:
    plans = {}
    for tokens, k, experts in [(64, 2, 8), (600, 8, 64), (700, 13, 300), (1000, 1, 8192)]:
        logits = normal(rng, tokens, experts)
        launches, _, blocks = emulator.route_plan(tokens, k, experts, False)
        plans.setdefault(launches, []).append(blocks)
        check_topk(emulator, logits, k, SOFTMAX, True, None, rng.random(tokens) < 0.9)
    assert set(plans) == {0, 1, 2}
    assert max(plans[1]) > 1


def test_one_launch_while_there_is_little(emulator: ModuleType) -> None:
    for tokens, k, experts in [(1, 2, 8), (64, 8, 128), (64, 8, 513), (2048, 2, 8), (512, 8, 64)]:
        assert emulator.route_plan(tokens, k, experts, False)[0] == 0
    assert emulator.route_plan(16384, 8, 128, False) == (1, 1024, 128)  # two launches


# ---- sort ----


# One block, and several from 8193 slots on. 360, 744: shared memory of one block just below what a launch has
# unasked, and what a block may have at all.
SORTS = [
    *itertools.product([0, 1, 31, 1000, 8192], [1, 3, 64, 360, 744, 4096, 8192]),
    *itertools.product([8193, 20011], [1, 3, 64]),
    *[
        pytest.param(*large, marks=pytest.mark.plain_alone)
        for large in ((8193, 513), (20011, 513), (8193, 8192))
    ],
]


@pytest.mark.parametrize(("slots", "experts"), SORTS)
def test_sort(emulator: ModuleType, rng, slots: int, experts: int) -> None:
    kinds = [rng.integers(-1, experts, slots)]
    if experts == 64 and slots <= 8193:
        kinds += [np.full(slots, 5), np.full(slots, -1), np.arange(slots) % experts]
    for ids in kinds:
        ids = ids.astype(np.int64)
        offsets, order = np.full(experts + 1, -7, np.int32), np.full(slots, -7, np.int32)
        emulator.sort_by_expert(ids, experts, offsets, order)
        want_offsets, want_order = expected_sort(ids, experts)
        np.testing.assert_array_equal(offsets, want_offsets)
        np.testing.assert_array_equal(order, want_order)


def test_sort_takes_wild_ids_for_none(emulator: ModuleType, rng) -> None:
    not_on_the_cpu(emulator)
    ids = rng.integers(0, 9, 9000)
    ids[::7] = rng.choice([-(2**62), -5, 9, 10, 2**31, 2**40 + 1, 2**62], len(ids[::7]))
    offsets, order = np.full(10, -7, np.int32), np.full(9000, -7, np.int32)
    emulator.sort_by_expert(ids, 9, offsets, order)
    want_offsets, want_order = expected_sort(ids, 9)
    np.testing.assert_array_equal(offsets, want_offsets)
    np.testing.assert_array_equal(order, want_order)


def test_sort_refuses_more_experts_than_fit(emulator: ModuleType) -> None:
    not_on_the_cpu(emulator)
    with pytest.raises(RuntimeError, match="invalid argument|take up to 8192"):
        emulator.sort_by_expert(np.zeros(4, np.int64), 8193, np.zeros(8194, np.int32), np.zeros(4, np.int32))


# ---- gradient ----


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=["f32", "f64", "bf16", "f16"])
@pytest.mark.parametrize(("score_func", "norm"), FLAGS)
def test_backward(emulator: ModuleType, rng, dtype, score_func: int, norm: bool) -> None:
    acc = F64 if dtype == F64 else F32
    for tokens, experts, k in [
        (0, 3, 2),
        (1, 1, 1),
        (7, 3, 3),
        (33, 65, 2),
        (9, 130, 40),
        (5, 513, 8),
        (2, 4096, 3),
    ]:
        logits = normal(rng, tokens, experts + 3, dtype=dtype)[:, :experts]
        mask = rng.random(tokens) < 0.8
        _, ids = expected_topk(logits, k, score_func, norm, None, mask)
        dw = normal(rng, tokens, k, dtype=acc)
        want = expected_backward(dw, logits, ids, score_func, norm)
        dz = unwritten(tokens, experts, dtype=dtype)
        emulator.topk_backward(dw, logits, ids, score_func, norm, None, dz)
        if k == 1 and norm:
            assert np.abs(exact(dz)).max(initial=0.0) < 1e-6
        else:
            assert_close(dz, want, f"dz at {tokens, experts, k}")
        if (score_func == SOFTMAX and not norm) or k == 1:
            continue
        if not isinstance(emulator, ModuleType):  # the operators have no sorted form
            continue
        _, order = expected_sort(ids, experts)
        at_slots = np.where(ids >= 0, np.take_along_axis(want, np.maximum(ids, 0), 1), 0).ravel()
        dz_sorted = unwritten(tokens * k, dtype=acc)
        emulator.topk_backward(dw, logits, ids, score_func, norm, order, dz_sorted)
        assert_close(dz_sorted, at_slots[order], f"sorted dz at {tokens, experts, k}")


def test_backward_keeps_accuracy_where_the_sigmoid_saturates(emulator: ModuleType) -> None:
    logits = np.array([[20.0, 12.0, -3.0, 18.0]], F32)
    ids, dw, dz = np.array([[0, 3]]), np.array([[0.5, -2.0]], F32), unwritten(1, 4)
    emulator.topk_backward(dw, logits, ids, SIGMOID, False, None, dz)
    assert error(dz, expected_backward(dw, logits, ids, SIGMOID, False)) < 1e-6


def test_backward_uses_no_wild_id_as_an_address(emulator: ModuleType, rng) -> None:
    not_on_the_cpu(emulator)
    logits, dw = normal(rng, 3, 5), normal(rng, 3, 2)
    ids = np.array([[1, 2**40], [-(2**50), 7], [5, -1]])
    for score_func, norm in FLAGS:
        dz = unwritten(3, 5)
        emulator.topk_backward(dw, logits, ids, score_func, norm, None, dz)
        assert np.isfinite(dz).all()
        assert (dz[1:] == 0).all()
        wild = unwritten(6)
        emulator.topk_backward(
            dw, logits, ids, score_func, norm, np.array([0, 9, -3, 2**30, 5, 1], np.int32), wild
        )
        assert np.isfinite(wild).all()
