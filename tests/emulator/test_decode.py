"""Decode, two launches for router, top-k, shrink and expand, against float64."""

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
    error,
    exact,
    normal,
    rounded,
)
from emulator.test_routing import FLAGS, SOFTMAX, expected_topk
from emulator.test_shrink import DTYPES, TYPE


def check(
    emulator: ModuleType,
    rng: np.random.Generator,
    tokens: int,
    k: int,
    experts: int,
    rank: int,
    width: int,
    out: int,
    dtype: np.dtype,
    *,
    score_func: int = SOFTMAX,
    norm: bool = True,
    bias: bool = False,
    scaled: bool = False,
    ranks: list[int] | None = None,
    adapter: np.dtype | None = None,
    pad: int = 0,
) -> None:
    acc, adapter = F64 if dtype == F64 else F32, adapter or dtype
    x = normal(rng, tokens, width + pad, dtype=dtype)[:, :width]
    A = rounded(exact(normal(rng, experts, rank, width, dtype=dtype)) / 8, adapter)
    B = normal(rng, experts, out, rank, dtype=adapter)
    router, base = normal(rng, experts, width, dtype=acc), normal(rng, tokens, out, dtype=dtype)
    selection_bias = normal(rng, experts, dtype=acc) if bias else None
    scale = rng.standard_normal(experts) if scaled else None
    used = np.full(experts, rank) if ranks is None else np.array(ranks)
    for e in range(experts):
        A[e, used[e] :] = B[e, :, used[e] :] = rounded(np.array(np.nan), adapter)

    logits = exact(x) @ exact(router).T
    weights, ids = expected_topk(logits, k, score_func, norm, selection_bias)
    want = exact(base)
    for t in range(tokens):
        for w, e in zip(weights[t], ids[t], strict=True):
            s = 0.5 * (1.0 if scale is None else scale[e])
            h = exact(A)[e, : used[e]] @ exact(x)[t]
            want[t] += w * s * (exact(B)[e, :, : used[e]] @ h)

    y = base.copy()
    limited = None if ranks is None else np.array(ranks, np.int32)
    emulator.decode(x, A, B, router, k, score_func, norm, selection_bias, scale, 0.5, limited, y)
    what = f"T={tokens} k={k} E={experts} r={rank} {width}->{out} {dtype}"
    assert_close(y, want, what, {F32: 1e-6, F64: 1e-13, BF16: 5e-3, F16: 1e-3}[dtype])
    again = base.copy()
    emulator.decode(x, A, B, router, k, score_func, norm, selection_bias, scale, 0.5, limited, again)
    assert y.tobytes() == again.tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 64])
def test_tokens(emulator: ModuleType, rng, dtype: np.dtype, tokens: int) -> None:
    check(emulator, rng, tokens, 2, 8, 16, 128, 136, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("experts", [1, 3, 7, 64, 65, 512])
def test_experts(emulator: ModuleType, rng, dtype: np.dtype, experts: int) -> None:
    for k in sorted({1, min(2, experts), min(experts, 40)}):
        check(emulator, rng, 3, k, experts, 4, 48, 40, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 8, 24, 128, 256])
def test_ranks(emulator: ModuleType, rng, dtype: np.dtype, rank: int) -> None:
    check(emulator, rng, 5, 3, 4, rank, 72, 40, dtype)
    check(emulator, rng, 5, 2, 3, rank, 72, 40, dtype, ranks=[rank, 0, max(1, rank - 2)])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_odd_sizes_and_splits(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, 4, 2, 3, 5, 33, 129, dtype)
    check(emulator, rng, 4, 2, 3, 8, 257, 1, dtype, pad=3)
    check(emulator, rng, 2, 2, 8, 16, 2049, 300, dtype)
    check(emulator, rng, 2, 2, 8, 16, 2048, 256, dtype)
    check(emulator, rng, 2, 2, 8, 16, 0, 40, dtype)
    check(emulator, rng, 2, 2, 8, 16, 40, 0, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_many_columns_of_many_tokens(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    """Wide tiles, which hold A and the router."""
    if isinstance(emulator, ModuleType):
        kind = emulator.dense_plan(40, 512, 33, 130, TYPE[dtype])[0]
        assert kind == ("narrow" if dtype == F64 else "wide" if dtype == F32 else "apart")
    check(emulator, rng, 40, 2, 33, 16, 130, 8, dtype)
    check(emulator, rng, 17, 2, 64, 16, 72, 8, dtype)


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["f32", "f64", "bf16"])
@pytest.mark.parametrize(("score_func", "norm"), FLAGS)
def test_flags(emulator: ModuleType, rng, dtype: np.dtype, score_func: int, norm: bool) -> None:
    flags = {"score_func": score_func, "norm": norm}
    check(emulator, rng, 9, 3, 40, 8, 64, 64, dtype, **flags)
    check(emulator, rng, 9, 3, 40, 8, 64, 64, dtype, **flags, bias=True, scaled=True)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_float32_adapters_under_half(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, 9, 2, 4, 16, 128, 130, dtype, adapter=F32)
    check(emulator, rng, 9, 2, 4, 7, 65, 130, dtype, adapter=F32)


def test_selection_is_that_of_topk(emulator: ModuleType, rng) -> None:
    """Ties, NaN and infinities: the weights and ids that the routing kernel gives for these logits."""
    experts, k = 40, 3
    z = rng.integers(-2, 3, (12, experts)).astype(np.float32)
    z[1, 3], z[2, :], z[3, 5], z[4, 2], z[5, :] = np.nan, np.nan, np.inf, -np.inf, -np.inf
    z[6, :], z[7, ::2] = 0.0, -0.0
    # x is 1 and the router holds the logits; expert e's B is the unit vector e, so y holds the weights.
    A, B = np.ones((experts, 1, 1), F32), np.zeros((experts, experts, 1), F32)
    B[np.arange(experts), np.arange(experts), 0] = 1
    for score_func, norm in FLAGS:
        for row in z:
            weights, ids = np.zeros((1, k), F32), np.zeros((1, k), np.int64)
            offsets, order = np.zeros(experts + 1, np.int32), np.zeros(k, np.int32)
            emulator.topk(row[None], k, score_func, norm, None, None, weights, ids, offsets, order)
            want = np.zeros(experts)
            want[ids[0]] = weights[0]
            y = np.zeros((1, experts), F32)
            emulator.decode(
                np.ones((1, 1), F32), A, B, row[:, None].copy(), k, score_func, norm, None, None, 1.0, None, y
            )
            if np.isnan(weights).any():  # and NaN times B's zeros is NaN
                assert np.isnan(y).all()
            else:
                assert error(y[0], want) < 1e-6


def test_what_does_not_fit_is_refused(emulator: ModuleType, rng) -> None:
    if not isinstance(emulator, ModuleType):
        pytest.skip("the operator takes another path")
    with pytest.raises(RuntimeError, match="invalid argument"):
        check(emulator, rng, 65, 1, 2, 4, 16, 16, F32)


def test_no_bank_conflicts(emulator: ModuleType, rng) -> None:
    for dtype in (BF16, F16, F32):
        check(emulator, rng, 9, 2, 8, 16, 256, 136, dtype)
        check(
            emulator, rng, 40, 2, 32, 16, 64, 24, dtype
        )  # up to a warp of logits: the chosen ones lie anywhere
    assert_no_conflicts(emulator)
