"""Router logits ``x W_rᵀ`` against float64: to float32's accuracy, whatever dtype x has."""

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
from emulator.test_shrink import DTYPES, TYPE, accumulator


def check(emulator: ModuleType, x: np.ndarray, weight: np.ndarray, what: str = "") -> None:
    logits = unwritten(len(x), len(weight), dtype=weight.dtype)
    emulator.router(x, weight, logits)
    assert_close(logits, exact(x) @ exact(weight).T, f"{what} {x.shape} {weight.shape} {x.dtype}")
    again = unwritten(len(x), len(weight), dtype=weight.dtype)
    emulator.router(x, weight, again)
    assert logits.tobytes() == again.tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("experts", [1, 3, 7, 8, 16, 17, 64, 65, 130])
def test_experts(emulator: ModuleType, rng, dtype: np.dtype, experts: int) -> None:
    for tokens, width in [(0, 16), (1, 64), (5, 136), (64, 33), (130, 129)]:
        check(
            emulator,
            normal(rng, tokens, width, dtype=dtype),
            normal(rng, experts, width, dtype=accumulator(dtype)),
        )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_many_experts_and_splits(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    check(emulator, normal(rng, 3, 24, dtype=dtype), normal(rng, 513, 24, dtype=accumulator(dtype)))
    check(emulator, normal(rng, 3, 24, dtype=dtype), normal(rng, 4096, 24, dtype=accumulator(dtype)))
    check(emulator, normal(rng, 3, 0, dtype=dtype), normal(rng, 5, 0, dtype=accumulator(dtype)))
    check(emulator, normal(rng, 70, 2049, dtype=dtype), normal(rng, 8, 2049, dtype=accumulator(dtype)))
    assert emulator.dense_plan(70, 0, 8, 2049, TYPE[dtype])[3] > 1


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_apart_and_misaligned(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    weight = normal(rng, 5, 96, dtype=accumulator(dtype))
    for pad, shift in [(8, 0), (3, 0), (8, 8), (7, 1)]:
        wide = normal(rng, 9, 96 + pad + shift, dtype=dtype)
        check(emulator, wide[:, shift : shift + 96], weight)
    check(emulator, np.broadcast_to(normal(rng, 1, 96, dtype=dtype), (9, 96)), weight)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-4, 0.02, 1.0, 300.0, 1e5, 1e20])
def test_weights_of_any_size(emulator: ModuleType, rng, dtype: np.dtype, size: float) -> None:
    """Three terms keep float32's accuracy at every scale, and rows of different scales beside each other."""
    x = normal(rng, 9, 200, dtype=dtype)
    weight = rounded(rng.standard_normal((6, 200)) * size, F32)
    check(emulator, x, weight, f"size {size}")
    weight[1] *= F32.type(1e-3)
    weight[2] *= F32.type(1e3)
    weight[3] = 0
    logits = unwritten(9, 6)
    emulator.router(x, weight, logits)
    for e in range(6):
        assert_close(logits[:, e], exact(x) @ exact(weight)[e], f"row {e}, size {size}")


def test_numbers_that_are_none_show(emulator: ModuleType, rng) -> None:
    for dtype in (F32, BF16, F16):
        x, weight = normal(rng, 5, 64, dtype=dtype), normal(rng, 4, 64)
        x[1, 7] = rounded(np.full(1, np.nan), dtype)[0]
        weight[2, 3] = np.nan
        logits = unwritten(5, 4)
        emulator.router(x, weight, logits)
        want = np.zeros((5, 4), bool)
        want[1], want[:, 2] = True, True
        np.testing.assert_array_equal(np.isnan(logits), want)


def test_no_bank_conflicts(emulator: ModuleType, rng) -> None:
    for dtype in (BF16, F16, F32):
        check(emulator, normal(rng, 70, 256, dtype=dtype), normal(rng, 8, 256))
        check(emulator, normal(rng, 70, 256, dtype=dtype), normal(rng, 64, 256))
    assert_no_conflicts(emulator)
