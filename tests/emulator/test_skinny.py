"""The base of few tokens, alone and as decode's second launch, against float64."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from emulator.arrays import BF16, F16, F32, F64, assert_close, assert_no_conflicts, exact, normal, rounded
from emulator.test_routing import FLAGS, SOFTMAX, expected_topk

HALF = {"bf16": BF16, "f16": F16}
TOLERANCE = {BF16: 5e-3, F16: 1e-3}


def check_base(
    emulator: ModuleType,
    rng: np.random.Generator,
    tokens: int,
    width: int,
    out: int,
    dtype: np.dtype,
    *,
    start: str = "none",
    pad: int = 0,
) -> None:
    """Tokens and outputs do not touch each other: what is not finite stays in its row or column."""
    x = normal(rng, tokens, width + pad, dtype=dtype)[:, :width]
    weight = normal(rng, out, width + pad, dtype=dtype)[:, :width]
    if tokens > 1 and out > 1:
        x[rng.integers(tokens), rng.integers(width)] = rounded(np.array([np.nan]), dtype)[0]
        weight[rng.integers(out), rng.integers(width)] = rounded(np.array([np.inf]), dtype)[0]
    y = normal(rng, tokens, out, dtype=dtype)
    starts = {
        "none": None,
        "bias": normal(rng, out, dtype=dtype),
        "rows": normal(rng, tokens, out, dtype=dtype),
    }
    given = y if start == "itself" else starts[start]
    want = exact(x) @ exact(weight).T + (0 if given is None else exact(given))
    emulator.skinny(x, weight, given, y)
    finite, what = np.isfinite(want), f"T={tokens} {width}->{out} {dtype} {start}"
    assert (np.isfinite(exact(y)) == finite).all(), what
    if finite.any():
        assert_close(np.where(finite, exact(y), 0), np.where(finite, want, 0), what, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 15, 16])
def test_tokens(emulator: ModuleType, rng, dtype: np.dtype, tokens: int) -> None:
    check_base(emulator, rng, tokens, 136, 72, dtype)
    check_base(emulator, rng, tokens, 1160, 33, dtype, start="itself")


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_sizes(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    """Every end of a warp's part of the depth, and of a block's rows."""
    for width in (8, 24, 32, 40, 64, 72, 512, 520, 576, 1024, 1032, 1544, 2048):
        for out in (1, 31, 32, 33):
            check_base(emulator, rng, 3, width, out, dtype)
            check_base(emulator, rng, 11, width, out, dtype, pad=8)


@pytest.mark.parametrize("start", ["none", "bias", "rows", "itself"])
def test_start(emulator: ModuleType, rng, start: str) -> None:
    for tokens in (4, 13):
        check_base(emulator, rng, tokens, 256, 100, BF16, start=start)


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
) -> None:
    """An expert that nobody chose holds what is not finite, and so do rows that are not in use."""
    x = normal(rng, tokens, width, dtype=dtype)
    weight, given = normal(rng, out, width, dtype=dtype), normal(rng, out, dtype=dtype) if bias else None
    A = rounded(exact(normal(rng, experts, rank, width, dtype=dtype)) / 8, dtype)
    B, router = normal(rng, experts, out, rank, dtype=dtype), normal(rng, experts, width, dtype=F32)
    selection_bias = normal(rng, experts, dtype=F32) if bias and scaled else None
    scale = rng.standard_normal(experts) if scaled else None
    used = np.full(experts, rank) if ranks is None else np.array(ranks)
    weights, ids = expected_topk(exact(x) @ exact(router).T, k, score_func, norm, selection_bias)
    chosen = np.isin(np.arange(experts), ids)
    for e in range(experts):
        first = used[e] if chosen[e] else 0
        A[e, first:] = B[e, :, first:] = rounded(np.array(np.nan), dtype)

    want = exact(x) @ exact(weight).T + (0 if given is None else exact(given))
    for t in range(tokens):
        for w, e in zip(weights[t], ids[t], strict=True):
            s = 0.5 * (1.0 if scale is None else scale[e])
            h = exact(A)[e, : used[e]] @ exact(x)[t]
            want[t] += w * s * (exact(B)[e, :, : used[e]] @ h)
    limited = None if ranks is None else np.array(ranks, np.int32)
    results = []
    for _ in range(2):
        y = np.zeros((tokens, out), dtype)
        flags = (k, score_func, norm, 0.5, selection_bias, scale, limited)
        emulator.decode_linear(x, weight, given, A, B, router, *flags, y)
        results.append(y)
    assert results[0].tobytes() == results[1].tobytes()
    what = f"T={tokens} k={k} E={experts} r={rank} {width}->{out} {dtype}"
    assert_close(results[0], want, what, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 9, 16])
def test_mixture_of_tokens(emulator: ModuleType, rng, dtype: np.dtype, tokens: int) -> None:
    check(emulator, rng, tokens, 2, 8, 16, 136, 72, dtype)
    check(emulator, rng, tokens, 1, 3, 5, 1032, 33, dtype, bias=True)


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_mixture_of_experts_and_ranks(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    for tokens, k, experts, rank in [
        (1, 1, 1, 1),
        (1, 40, 64, 8),
        (3, 3, 65, 8),
        (2, 2, 128, 3),
        (1, 64, 128, 8),
    ]:
        check(emulator, rng, tokens, k, experts, rank, 72, 40, dtype)
    check(emulator, rng, 3, 2, 3, 100, 72, 40, dtype, ranks=[100, 0, 97])
    check(emulator, rng, 9, 3, 8, 8, 256, 40, dtype, ranks=[8, 0, 7, 1, 8, 8, 3, 2])


@pytest.mark.parametrize(("score_func", "norm"), FLAGS)
def test_mixture_of_flags(emulator: ModuleType, rng, score_func: int, norm: bool) -> None:
    flags = {"score_func": score_func, "norm": norm}
    check(emulator, rng, 9, 3, 20, 8, 64, 64, BF16, **flags)
    check(emulator, rng, 5, 3, 40, 8, 64, 64, BF16, **flags, bias=True, scaled=True)


def check_given(
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
    bias: bool = False,
    scaled: bool = False,
    ranks: list[int] | None = None,
) -> None:
    """A routing from outside: tokens that name an expert twice, or none."""
    x, weight = normal(rng, tokens, width, dtype=dtype), normal(rng, out, width, dtype=dtype)
    given = normal(rng, out, dtype=dtype) if bias else None
    A = rounded(exact(normal(rng, experts, rank, width, dtype=dtype)) / 8, dtype)
    B, weights = normal(rng, experts, out, rank, dtype=dtype), normal(rng, tokens, k, dtype=F32)
    ids = rng.integers(-1, experts, (tokens, k))
    ids[0] = ids[0, 0]
    scale = rng.standard_normal(experts) if scaled else None
    used = np.full(experts, rank) if ranks is None else np.array(ranks)
    for e in range(experts):
        first = used[e] if (ids == e).any() else 0
        A[e, first:] = B[e, :, first:] = rounded(np.array(np.nan), dtype)
    want = exact(x) @ exact(weight).T + (0 if given is None else exact(given))
    for t, j in np.ndindex(tokens, k):
        if (e := ids[t, j]) >= 0:
            h = exact(A)[e, : used[e]] @ exact(x)[t]
            s = 0.5 * (1.0 if scale is None else scale[e])
            want[t] += weights[t, j] * s * (exact(B)[e, :, : used[e]] @ h)
    bins = np.where(ids < 0, experts, ids).ravel()
    order = bins.argsort(kind="stable").astype(np.int32)
    offsets = np.searchsorted(bins[order], np.arange(experts + 1)).astype(np.int32)
    limited = None if ranks is None else np.array(ranks, np.int32)
    results = []
    for _ in range(2):
        y = np.zeros((tokens, out), dtype)
        emulator.mixture_linear(x, weight, given, A, B, offsets, order, weights, scale, 0.5, limited, y)
        results.append(y)
    assert results[0].tobytes() == results[1].tobytes()
    what = f"T={tokens} k={k} E={experts} r={rank} {width}->{out} {dtype}"
    assert_close(results[0], want, what, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16])
def test_routing_given(emulator: ModuleType, rng, dtype: np.dtype, tokens: int) -> None:
    check_given(emulator, rng, tokens, 1, 1, 16, 136, 72, dtype)
    check_given(emulator, rng, tokens, 2, 8, 16, 2048, 40, dtype, bias=True)
    check_given(emulator, rng, tokens, 3, 300, 12, 72, 33, dtype, scaled=True)
    check_given(emulator, rng, tokens, 2, 3, 20, 264, 33, dtype, ranks=[20, 0, 13])


def test_what_does_not_fit_is_refused(emulator: ModuleType, rng) -> None:
    if not isinstance(emulator, ModuleType):
        pytest.skip("the operator takes another path")

    def base(tokens: int, width: int, dtype: np.dtype, pad: int = 0) -> None:
        x, weight = (normal(rng, n, width + pad, dtype=dtype)[:, pad:] for n in (tokens, 8))
        emulator.skinny(x, weight, None, np.zeros((tokens, 8), dtype))

    for given in [(17, 64, BF16), (0, 64, BF16), (2, 12, BF16), (2, 64, F32), (2, 64, F64), (2, 64, BF16, 1)]:
        with pytest.raises(RuntimeError, match="invalid argument"):
            base(*given)
    # sums of planes that would hold the base up; experts that a warp cannot select at once
    for tokens, experts, rank in [(16, 8, 32), (1, 129, 8)]:
        with pytest.raises(RuntimeError, match="invalid argument"):
            check(emulator, rng, tokens, 2, experts, rank, 64, 8, BF16)
    with pytest.raises(RuntimeError, match="invalid argument"):
        check_given(emulator, rng, 16, 2, 8, 40, 64, 8, BF16)


def test_no_bank_conflicts(emulator: ModuleType, rng) -> None:
    for dtype in HALF.values():
        for tokens in (5, 16):
            check_base(emulator, rng, tokens, 1024, 64, dtype)
            check(emulator, rng, tokens, 2, 8, 16, 256, 72, dtype)
            check_given(emulator, rng, tokens, 2, 8, 16, 256, 72, dtype)
    assert_no_conflicts(emulator)
