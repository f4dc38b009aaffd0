"""Decode grouped by expert, in two launches whose blocks wait for each other, against float64."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from emulator.arrays import (
    BF16,
    F16,
    F32,
    F64,
    assert_close,
    assert_no_conflicts,
    exact,
    normal,
    rounded,
    unwritten,
)
from emulator.test_decode import check as check_decode
from emulator.test_routing import FLAGS, SOFTMAX, expected_sort, expected_topk
from emulator.test_shrink import DTYPES
from emulator.test_shrink import expected as shrunk

LIMIT = {F32: 1e-6, F64: 1e-13, BF16: 5e-3, F16: 1e-3}


def check(
    emulator: ModuleType,
    rng: np.random.Generator,
    tokens: int,
    k: int,
    experts: int,
    rank: int,
    sizes: tuple[int, int],
    dtype: np.dtype,
    *,
    score_func: int = SOFTMAX,
    norm: bool = True,
    bias: bool = True,
    adapter: np.dtype | None = None,
    pad: int = 0,
) -> None:
    """Everything that a backward needs, and y = bias + mixture."""
    (width, out), acc, adapter = sizes, F64 if dtype == F64 else F32, adapter or dtype
    x = normal(rng, tokens, width + pad, dtype=dtype)[:, :width]
    A = rounded(exact(normal(rng, experts, rank, width, dtype=dtype)) / 8, adapter)
    B, row = normal(rng, experts, out, rank, dtype=adapter), normal(rng, out, dtype=dtype) if bias else None
    router = normal(rng, experts, width, dtype=acc)
    what = f"T={tokens} k={k} E={experts} r={rank} {width}->{out} {dtype}"

    def run() -> list[np.ndarray]:
        given_out = [
            unwritten(tokens, out, dtype=dtype),
            unwritten(tokens, experts, dtype=acc),
            unwritten(tokens, k, dtype=acc),
            np.full((tokens, k), -7, np.int64),
            np.full(experts + 1, -7, np.int32),
            np.full(tokens * k, -7, np.int32),
            unwritten(tokens * k, rank, dtype=acc),
        ]
        emulator.routed(x, A, B, router, k, score_func, norm, 0.5, row, *given_out)
        return given_out

    y, logits, weights, ids, offsets, order, h = results = run()
    want_logits = exact(x) @ exact(router).T
    assert_close(logits, want_logits, what, 1e-6 if acc == F32 else 1e-13)
    want_weights, want_ids = expected_topk(want_logits, k, score_func, norm)
    if (
        isinstance(emulator, ModuleType) or k < experts
    ):  # with all of them chosen, some logits lie close together
        np.testing.assert_array_equal(ids[:, : min(k, 8)], want_ids[:, : min(k, 8)])
    assert_close(weights, want_weights, what, 1e-6 if acc == F32 else 1e-13)
    want_offsets, want_order = expected_sort(ids, experts)
    np.testing.assert_array_equal(offsets, want_offsets)
    np.testing.assert_array_equal(order, want_order)
    want_h = shrunk(x, A, ids, None)
    assert_close(h, want_h, what, 1e-6 if acc == F32 else 1e-13)
    want = np.zeros((tokens, out)) + (0 if row is None else exact(row))
    for position, slot in enumerate(order):
        t, j = divmod(int(slot), k)
        want[t] += 0.5 * want_weights[t, j] * (exact(B)[ids[t, j]] @ want_h[position])
    assert_close(y, want, what, LIMIT[dtype])
    for one, again in zip(results, run(), strict=True):
        assert one.tobytes() == again.tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 33, 64])
def test_tokens(emulator: ModuleType, rng, dtype: np.dtype, tokens: int) -> None:
    check(emulator, rng, tokens, 2, 8, 16, (128, 136), dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_edges(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, 3, 1, 1, 1, (1, 1), dtype)
    check(emulator, rng, 5, 2, 3, 5, (33, 129), dtype, pad=3, bias=False)
    check(emulator, rng, 2, 3, 7, 24, (1025, 70), dtype)  # planes
    check(emulator, rng, 2, 2, 3, 256, (72, 40), dtype)
    check(emulator, rng, 2, 2, 8, 16, (600, 0), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("score_func", "norm"), FLAGS)
def test_flags(emulator: ModuleType, rng, dtype: np.dtype, score_func: int, norm: bool) -> None:
    check(emulator, rng, 9, 3, 40, 8, (64, 64), dtype, score_func=score_func, norm=norm)


@pytest.mark.plain_alone
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["f32", "f64", "bf16"])
def test_many_experts(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, 3, 2, 4096, 2, (16, 24), dtype)
    check(emulator, rng, 4, 65, 70, 3, (24, 40), dtype)
    if dtype == BF16:
        check(
            emulator, rng, 64, 200, 200, 4, (16, 24), dtype
        )  # slots that the tensor cores' tile cannot hold


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_float32_adapters_under_half(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, 9, 2, 4, 16, (128, 130), dtype, adapter=F32)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nothing_given_out(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    """Where reading all of A is too much: y holds the base; selection bias, scales, ranks."""
    check_decode(emulator, rng, 3, 2, 513, 8, 40, 72, dtype)
    check_decode(emulator, rng, 9, 66, 70, 3, 33, 41, dtype, bias=True, scaled=True)
    ranks = [int(r) for r in rng.integers(0, 9, 513)]
    check_decode(emulator, rng, 5, 3, 513, 8, 72, 40, dtype, ranks=ranks, scaled=True)
    check_decode(emulator, rng, 2, 2, 600, 20, 0, 40, dtype)


@pytest.mark.parametrize("residents", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_however_many_blocks_there_is_room_for(emulator: ModuleType, rng, residents: int, seed: int) -> None:
    if not isinstance(emulator, ModuleType):
        pytest.skip("a card has the room that it has")
    emulator.residents(residents)
    emulator.seed(seed)
    check(emulator, rng, 5, 2, 6, 20, (600, 72), BF16)
    check(emulator, rng, 3, 2, 6, 4, (600, 72), F32)


def test_no_bank_conflicts(emulator: ModuleType, rng) -> None:
    check(emulator, rng, 9, 2, 8, 16, (256, 136), F32)
    check(emulator, rng, 9, 1, 1, 16, (256, 136), BF16)  # slots of several experts lie anywhere
    assert_no_conflicts(emulator)
