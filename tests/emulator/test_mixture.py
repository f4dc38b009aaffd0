"""Shrink and expand with a routing that is given, where nobody wants h, against float64."""

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
from emulator.test_expand import expected as expanded
from emulator.test_routing import SOFTMAX, expected_topk
from emulator.test_shrink import DTYPES, TYPE, accumulator, route, sort
from emulator.test_shrink import expected as shrunk


def check(
    emulator: ModuleType,
    rng: np.random.Generator,
    ids: np.ndarray,
    experts: int,
    rank: int,
    sizes: tuple[int, int],
    dtype: np.dtype,
    *,
    adapter: np.dtype | None = None,
    ranks: np.ndarray | None = None,
    pad: int = 0,
) -> None:
    """With base, bias and scales, and without."""
    (tokens, k), (width, out), acc = ids.shape, sizes, accumulator(dtype)
    adapter = dtype if adapter is None else adapter
    offsets, order = sort(ids, experts)
    x = normal(rng, tokens, width + pad, dtype=dtype)[:, :width]
    A = rounded(exact(normal(rng, experts, rank, width, dtype=dtype)) / 8, adapter)
    B = rounded(exact(normal(rng, experts, out, rank, dtype=dtype)), adapter)
    if ranks is not None:
        for e in range(experts):
            A[e, ranks[e] :] = B[e, :, ranks[e] :] = rounded(np.array(np.nan), adapter)
    weights, scale = normal(rng, tokens, k, dtype=acc), rng.standard_normal(experts)
    base, bias = normal(rng, tokens, out + pad, dtype=dtype)[:, :out], normal(rng, out, dtype=dtype)
    h = shrunk(x, A, ids, ranks)

    def run(scale, base, bias, h_there=None) -> np.ndarray:
        y = unwritten(tokens, out, dtype=dtype)
        emulator.mixture(x, A, B, offsets, order, weights, scale, 0.5, ranks, base, bias, y, h_there)
        return y

    factors = exact(weights) * (ids >= 0) * 0.5
    # Two kernels after each other, each within 1e-6 in float32: so are these together, not so the CPU's.
    limit = {F32: 1e-6 if isinstance(emulator, ModuleType) else 2e-6, F64: 1e-13, BF16: 5e-3, F16: 1e-3}[
        dtype
    ]
    what = f"T={tokens} k={k} E={experts} r={rank} {width}->{out} {dtype} {adapter}"
    panels = B.transpose(0, 2, 1)
    assert_close(run(None, None, None), expanded(h, panels, ids, factors, ranks), what, limit)
    want = expanded(h, panels, ids, factors * scale[ids], ranks) + exact(base) + exact(bias)
    y = run(scale, base, bias)
    assert_close(y, want, what, limit)
    assert y.tobytes() == run(scale, base, bias).tobytes()
    h_there = unwritten(tokens * k, rank, dtype=acc)  # as a backward wants it
    assert y.tobytes() == run(scale, base, bias, h_there).tobytes()
    assert_close(h_there, h, what, {F32: 1e-6, F64: 1e-13, BF16: 1e-6, F16: 1e-6}[dtype])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 9, 64, 65])
def test_tokens(emulator: ModuleType, rng, dtype: np.dtype, tokens: int) -> None:
    check(emulator, rng, route(rng, tokens, 2, 8, 0.2), 8, 16, (600, 72), dtype)
    if isinstance(emulator, ModuleType) and tokens > 0:
        assert emulator.shrink_plan(2 * tokens, 8, 16, 600, TYPE[dtype], False)[3] > 1  # planes


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_edges(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, route(rng, 7, 2, 3), 3, 5, (2049, 33), dtype, pad=3)
    check(emulator, rng, np.full((20, 2), -1), 4, 8, (600, 40), dtype)
    check(
        emulator,
        rng,
        route(rng, 30, 2, 5, 0.1),
        5,
        40,
        (577, 40),
        dtype,
        ranks=np.array([40, 0, 17, 1, 33], np.int32),
    )
    check(emulator, rng, route(rng, 9, 1, 1), 1, 1, (1, 1), dtype)
    check(emulator, rng, route(rng, 3, 7, 7), 7, 256, (520, 24), dtype)
    check(emulator, rng, rng.integers(-1, 2, (20, 3)), 2, 16, (600, 40), dtype)  # twice the same expert


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_float32_adapters_under_half(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, rng, route(rng, 33, 2, 4, 0.1), 4, 16, (640, 72), dtype, adapter=F32)
    check(emulator, rng, route(rng, 200, 2, 4, 0.1), 4, 6, (640, 71), dtype, adapter=F32)


@pytest.mark.parametrize(
    "dtype", [pytest.param(BF16, id="bf16"), pytest.param(F16, id="f16", marks=pytest.mark.plain_alone)]
)
def test_every_experts_products(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    """Many tokens, few rows of A in all: expand takes what it needs of all of them, h is nowhere."""
    check(emulator, rng, route(rng, 2050, 2, 8, 0.1), 8, 16, (72, 40), dtype)
    check(emulator, rng, route(rng, 2049, 3, 20, 0.1), 20, 10, (72, 33), dtype, pad=3)
    ranks = np.array([7, 0, 3], np.int32)
    check(emulator, rng, rng.integers(-1, 3, (2048, 2)), 3, 7, (520, 40), dtype, ranks=ranks, adapter=F32)
    check(emulator, rng, route(rng, 2048, 2, 16), 16, 16, (40, 24), dtype)  # tokens by pairs


@pytest.mark.parametrize(
    ("experts", "rank", "k", "norm"), [(6, 5, 2, True), (16, 16, 2, False), (10, 16, 3, True)]
)
def test_a_layers_own_router_and_nothing_sorted(
    emulator: ModuleType, rng, experts: int, rank: int, k: int, norm: bool
) -> None:
    tokens, (width, out) = 2050, (72, 40)
    x, router = normal(rng, tokens, width, dtype=BF16), normal(rng, experts, width)
    A = rounded(exact(normal(rng, experts, rank, width, dtype=BF16)) / 8, BF16)
    B, bias = normal(rng, experts, out, rank, dtype=BF16), normal(rng, out, dtype=BF16)
    there = [unwritten(tokens, experts), unwritten(tokens, k), np.zeros((tokens, k), np.int64)]
    y = unwritten(tokens, out, dtype=BF16)
    assert emulator.routed_expand(x, A, B, router, k, SOFTMAX, norm, 0.5, bias, *there, y)
    logits, weights, ids = there
    assert_close(logits, exact(x) @ exact(router).T, "logits")
    wanted, chosen = expected_topk(exact(logits), k, SOFTMAX, norm, None)
    assert (ids == chosen).all()
    assert_close(weights, wanted, "weights")
    h = shrunk(x, A, ids, None)
    want = expanded(h, B.transpose(0, 2, 1), ids, exact(weights) * 0.5, None) + exact(bias)
    assert_close(y, want, f"E={experts} r={rank} k={k}", 5e-3)


@pytest.mark.plain_alone
def test_many_slots_of_few_tokens(emulator: ModuleType, rng) -> None:
    check(emulator, rng, route(rng, 60, 40, 64), 64, 8, (600, 40), BF16)  # places by each block still
    check(emulator, rng, route(rng, 60, 200, 200), 200, 8, (72, 40), BF16)  # too many for a tile
    check(emulator, rng, route(rng, 70, 40, 64), 64, 8, (72, 40), BF16)  # places by a launch of their own
    check(emulator, rng, route(rng, 2100, 2, 20), 20, 16, (40, 24), BF16)  # tokens by pairs


def test_no_bank_conflicts(emulator: ModuleType, rng) -> None:
    check(emulator, rng, np.zeros((64, 1), np.int64), 1, 16, (600, 128), F32)
    check(emulator, rng, route(rng, 2049, 1, 1), 1, 16, (64, 128), BF16)
    assert_no_conflicts(emulator)
