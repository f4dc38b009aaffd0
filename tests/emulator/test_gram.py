"""Gram against float64.

``dA_e = Σ (s·w·u[p])ᵀ x[t]``, ``dB_e = Σ dy[t]ᵀ (s·w·h[p])`` and ``d_router_e = Σ dz[p] x[t]``.
The router's own backward, ``dx += dz W`` and ``dW = dzᵀ x``, runs on the same kernels.
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
from emulator.test_shrink import DTYPES, accumulator, not_on_the_cpu, route, sort


def expected(
    coefs: np.ndarray, rows: np.ndarray, ids: np.ndarray, experts: int, ranks: np.ndarray | None
) -> np.ndarray:
    """``[experts, rank, width]`` from coefficients in sorted order and rows by token."""
    offsets, order = sort(ids, experts)
    rank = coefs.shape[1]
    result = np.zeros((experts, rank, rows.shape[1]))
    for e in range(experts):
        used = rank if ranks is None else ranks[e]
        at = slice(offsets[e], offsets[e + 1])
        result[e, :used] = coefs[at, :used].T @ exact(rows)[order[at] // ids.shape[1]]
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
    out: int | None = None,
    adapter: np.dtype | None = None,
    ranks: np.ndarray | None = None,
    pad: int = 0,
) -> None:
    """All three gradients together, and each alone, bitwise the same."""
    tokens, k = ids.shape
    acc, adapter = accumulator(dtype), dtype if adapter is None else adapter
    out = width if out is None else out
    offsets, order = sort(ids, experts)
    what = f"T={tokens} k={k} E={experts} r={rank} {width}x{out} {dtype} {adapter}"
    x = normal(rng, tokens, width + pad, dtype=dtype)[:, :width]
    dy = normal(rng, tokens, out + pad, dtype=dtype)[:, :out]
    u, h = normal(rng, ids.size, rank, dtype=acc), normal(rng, ids.size, rank, dtype=acc)
    weights, dz = normal(rng, tokens, k, dtype=acc), normal(rng, ids.size, dtype=acc)
    scale = rng.standard_normal(experts)
    factors = (exact(weights) * np.where(ids >= 0, 0.5 * scale[ids], 0)).ravel()[order, None]

    def run(need_a: bool, need_b: bool, need_router: bool):
        dA = unwritten(experts, rank, width, dtype=adapter) if need_a else None
        dB = unwritten(experts, out, rank, dtype=adapter) if need_b else None
        d_router = unwritten(experts, width, dtype=acc) if need_router else None
        emulator.gram(
            x,
            dy,
            u,
            h,
            offsets,
            order,
            weights,
            scale,
            0.5,
            ranks,
            dz if need_router else None,
            dA,
            dB,
            d_router,
        )
        return dA, dB, d_router

    has_router = isinstance(emulator, ModuleType)  # operators make dz themselves
    dA, dB, d_router = run(True, True, has_router)
    limit = 1e-2 if dtype == BF16 else 2e-3 if dtype == F16 else None
    assert_close(dA, expected(factors * exact(u), x, ids, experts, ranks), f"dA at {what}", limit)
    want = expected(factors * exact(h), dy, ids, experts, ranks).transpose(0, 2, 1)
    assert_close(dB, want, f"dB at {what}", limit)
    for e in range(experts):
        used = rank if ranks is None else ranks[e]
        assert (dA[e, used:] == 0).all() and (dB[e, :, used:] == 0).all()
        if offsets[e] == offsets[e + 1]:
            assert (dA[e] == 0).all() and (dB[e] == 0).all()
            assert not has_router or (d_router[e] == 0).all()
    assert run(True, False, False)[0].tobytes() == dA.tobytes()
    assert run(False, True, False)[1].tobytes() == dB.tobytes()
    if has_router:
        want = expected(exact(dz)[:, None], x, ids, experts, None)[:, 0]
        assert_close(d_router, want, f"d_router at {what}")
        assert run(False, False, True)[2].tobytes() == d_router.tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 24, 64, 128, 256])
def test_ranks(emulator: ModuleType, rng, dtype: np.dtype, rank: int) -> None:
    check(emulator, rng, route(rng, 40, 2, 3, 0.1), rank, 72, dtype, experts=3, out=40)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 33, 64, 129])
def test_widths(emulator: ModuleType, rng, dtype: np.dtype, width: int) -> None:
    check(emulator, rng, route(rng, 37, 2, 3), 16, width, dtype, experts=3)
    check(emulator, rng, route(rng, 5, 1, 2), 5, width, dtype, experts=2, out=9, pad=3)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("experts", [1, 3, 7, 64])
@pytest.mark.parametrize("tokens", [0, 1, 7, 65])
def test_experts_and_tokens(emulator: ModuleType, rng, dtype: np.dtype, experts: int, tokens: int) -> None:
    for k in sorted({1, min(2, experts), min(experts, 7)}):
        check(emulator, rng, route(rng, tokens, k, experts, 0.2), 4, 40, dtype, experts=experts)


@pytest.mark.plain_alone
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_4096_experts(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, route(rng, 40, 3, 4096, 0.1), 3, 5, dtype, experts=4096)


def test_no_columns(emulator: ModuleType, rng) -> None:
    for dtype in (F32, BF16):
        check(emulator, rng, route(rng, 9, 2, 3), 8, 0, dtype, experts=3, out=8)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_uneven_segments(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, np.full((200, 1), 3), 16, 40, dtype, experts=8)  # all to one
    check(emulator, rng, np.full((70, 2), -1), 16, 40, dtype, experts=4)  # none at all
    check(emulator, rng, route(rng, 9, 65, 65), 8, 16, dtype, experts=65)  # all to all
    check(emulator, rng, rng.integers(-1, 2, (30, 3)), 8, 40, dtype, experts=2)  # twice to the same


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_experts_in_pieces(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    """Segments that end before, at and behind a chunk's end, over two and three chunks, several in one."""
    chunk, group, stage = emulator.gram_plan(3000, 6)
    assert (chunk, group * stage) == (1024, 128)  # three chunks, of several groups each
    for rows in ([0, 3000], [1023, 1, 1977], [1024, 1024, 952], [1025, 30, 2, 1943], [5, 2100, 0, 600, 200]):
        ids = np.arange(len(rows)).repeat(rows)[:, None]
        check(emulator, rng, rng.permuted(ids, axis=0), 4, 9, dtype, experts=6)


def in_levels(terms: np.ndarray, chunk: int, group: int, stage: int) -> np.ndarray:
    """Sum over rows as the kernel orders it for one expert: stages of a group, groups of a piece, pieces."""
    levels = (stage, group, -(-chunk // (stage * group)))
    pieces = []
    for first in range(0, len(terms), chunk):
        piece = terms[first : first + chunk]
        padded = np.zeros((np.prod(levels), terms.shape[1]), terms.dtype)
        padded[: len(piece)] = piece
        sums = padded.reshape(*levels[::-1], -1)
        while sums.ndim > 1:
            sums = np.cumsum(sums, axis=-2)[..., -1, :]  # one after another, each sum rounded
        pieces.append(sums)
    return np.cumsum(pieces, axis=0)[-1]


def test_order_of_a_sum(emulator: ModuleType, rng) -> None:
    """The model is the kernel, bit by bit; where no emulated run reaches, the model tells the error."""
    for slots in (1, 100, 3000):
        u, x, dA = normal(rng, slots, 1), normal(rng, slots, 40), unwritten(1, 1, 40)
        offsets, order = sort(np.zeros((slots, 1), np.int64), 1)
        emulator.gram(
            x, x, u, u, offsets, order, np.ones((slots, 1), F32), None, 1.0, None, None, dA, None, None
        )
        assert_close(dA[0, 0], exact(u).T[0] @ exact(x))
        if isinstance(emulator, ModuleType):  # a device fuses the multiplication and the addition
            np.testing.assert_array_equal(dA[0, 0], in_levels(u * x, *emulator.gram_plan(slots, 1)))
    slots = 1 << 21
    terms = normal(rng, slots, 8) * normal(rng, slots, 1)
    exact_sum, (chunk, group, stage) = exact(terms).sum(0), emulator.gram_plan(slots, 1)
    assert error(in_levels(terms, chunk, group, stage), exact_sum) < TOLERANCE[F32]
    assert error(in_levels(terms, chunk, chunk // stage, stage), exact_sum) > TOLERANCE[F32]  # no groups


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_mixed_ranks_are_zero_beyond(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    ids = route(rng, 50, 2, 5, 0.1)
    for rank, ranks in [(16, [16, 3, 0, 8, 1]), (40, [33, 40, 8, 0, 17])]:
        check(emulator, rng, ids, rank, 66, dtype, experts=5, ranks=np.array(ranks, np.int32))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_float32_adapters_under_half(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    for rank, width in [(16, 128), (5, 77)]:
        check(emulator, rng, route(rng, 33, 2, 4, 0.1), rank, width, dtype, experts=4, adapter=F32)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "width", "pad"),
    [
        (0, 4, 8, 0),
        (1, 1, 1, 0),
        (7, 3, 33, 3),
        (65, 64, 40, 0),
        (130, 33, 200, 8),
        (1100, 5, 9, 0),
        pytest.param(3, 4096, 24, 0, marks=pytest.mark.plain_alone),
    ],
)
@pytest.mark.parametrize("size", [1e-20, 1e-6, 1.0])
def test_router(
    emulator: ModuleType, rng, dtype: np.dtype, tokens: int, experts: int, width: int, pad: int, size: float
) -> None:
    """Gradients of any size: in 16-bit types dW keeps float32's accuracy all the same."""
    acc = accumulator(dtype)
    x = normal(rng, tokens, width + pad, dtype=dtype)[:, :width]
    weight = normal(rng, experts, width, dtype=acc)
    dz = rounded(rng.standard_normal((tokens, experts)) * size, acc)
    before = rounded(rng.standard_normal((tokens, width)) * (0 if size < 1 else 1), dtype)
    dx, d_weight = before.copy(), unwritten(experts, width, dtype=acc)
    emulator.router_backward(x, weight, dz, dx, d_weight)
    want = exact(before) + exact(dz) @ exact(weight)
    if dtype != F16 or size == 1:  # smaller sums are not numbers of float16
        assert_close(dx, want, "dx", {BF16: 4e-3, F16: 5e-4}.get(dtype))
    assert_close(d_weight, exact(dz).T @ exact(x), "dW")
    alone, again = before.copy(), unwritten(experts, width, dtype=acc)
    emulator.router_backward(x, weight, dz, alone, None)
    emulator.router_backward(x, weight, dz, None, again)
    assert alone.tobytes() == dx.tobytes() and again.tobytes() == d_weight.tobytes()
    if tokens > 7:
        assert_no_conflicts(emulator)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_router_of_experts_of_different_size(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    """Each expert's dW, each token's and each column's dx, to the accuracy that they have alone."""
    sizes = np.array([1, 1e-9, 1e9, 0, 1e-25])
    x, dz = normal(rng, 200, 24, dtype=dtype), rounded(rng.standard_normal((200, 5)) * sizes, F32)
    d_weight = unwritten(5, 24)
    emulator.router_backward(x, normal(rng, 5, 24), dz, None, d_weight)
    for e in range(5):
        assert_close(d_weight[e], exact(dz)[:, e] @ exact(x), f"dW of expert {e}")
    tokens, columns = 2.0 ** rng.integers(-20, 3, 200), 2.0 ** rng.integers(-3, 3, 24)
    dz = rounded(rng.standard_normal((200, 5)) * tokens[:, None], F32)
    weight = rounded(rng.standard_normal((5, 24)) * columns * 2.0**8, F32)
    dx = np.zeros((200, 24), dtype)
    emulator.router_backward(x, weight, dz, dx, None)
    relative = np.linalg.norm(exact(dx) - exact(dz) @ exact(weight), axis=1) / np.linalg.norm(
        exact(dz) @ exact(weight), axis=1
    )
    assert relative.max() < (4e-3 if dtype == BF16 else 5e-4)


def test_no_bank_conflicts(emulator: ModuleType, rng) -> None:
    for dtype, rank in [(BF16, 16), (BF16, 64), (F16, 16), (F32, 16)]:
        check(emulator, rng, route(rng, 130, 2, 3), rank, 128, dtype, experts=3)
    assert_no_conflicts(emulator)


def test_wild_routing_stays_inside(emulator: ModuleType, rng) -> None:
    """What offsets, order and ranks hold is clamped before it becomes an address."""
    not_on_the_cpu(emulator)
    order = rng.integers(-(2**31), 2**31, 2400).astype(np.int32)
    ranks = np.array([-5, 2**30, 8], np.int32)
    for dtype in (BF16, F32):
        x, weights = normal(rng, 1200, 16, dtype=dtype), normal(rng, 1200, 2)
        u, dz = normal(rng, 2400, 8), normal(rng, 2400)
        for offsets in ([0, 10, 20, 2400], [0, 2000, -7, 2**30], [5, 5, 5, -1], [2**31 - 1] * 4):
            offsets = np.array(offsets, np.int32)
            if "tsan" in emulator.__name__:  # segments that overlap may write one plane at the same time
                offsets.sort()
            dA, dB = unwritten(3, 8, 16, dtype=dtype), unwritten(3, 16, 8, dtype=dtype)
            emulator.gram(x, x, u, u, offsets, order, weights, None, 1.0, ranks, dz, dA, dB, unwritten(3, 16))
