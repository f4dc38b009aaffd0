"""NumPy arrays as kernels take them: bfloat16 travels as uint16; errors are measured against float64."""

from __future__ import annotations

from types import ModuleType

import numpy as np

BF16 = np.dtype(np.uint16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
F64 = np.dtype(np.float64)

# Error ÷ norm against float64 on the same, already rounded, inputs.
TOLERANCE = {F32: 1e-6, F64: 1e-13, F16: 2e-3, BF16: 1e-2}


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """``values`` in ``dtype``, to nearest even; BF16 gives its bits as uint16."""
    if dtype != BF16:
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    bits = bits + 0x7FFF + (bits >> 16 & 1)
    return np.where(np.isnan(values), 0x7FFF, bits >> 16).astype(np.uint16)


def exact(array: np.ndarray) -> np.ndarray:
    """The values of any array, uint16 read as bfloat16, in float64."""
    if array.dtype != BF16:
        return array.astype(np.float64)
    return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def normal(rng: np.random.Generator, *shape: int, dtype: np.dtype = F32) -> np.ndarray:
    """Standard normal values."""
    return rounded(rng.standard_normal(shape), dtype)


def unwritten(*shape: int, dtype: np.dtype = F32) -> np.ndarray:
    """An output array that shows what was not written: NaN, or -1."""
    array = np.empty(shape, dtype)
    array.view(np.uint8).fill(0xFF)
    return array


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """‖actual - expected‖ ÷ ‖expected‖, the norm itself where the expected is all zero; NaN is infinite."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    actual, expected = exact(actual), exact(expected)
    norm = float(np.linalg.norm(expected))
    result = float(np.linalg.norm(actual - expected)) / (norm if norm > 0 else 1.0)
    return result if result == result else float("inf")


def assert_close(
    actual: np.ndarray, expected: np.ndarray, what: str = "", limit: float | None = None
) -> None:
    """The error is within the tolerance of the actual array's dtype."""
    limit = TOLERANCE[actual.dtype] if limit is None else limit
    assert error(actual, expected) < limit, (
        f"{what}: error {error(actual, expected):.2e}, allowed {limit:.0e}"
    )


def assert_no_conflicts(emulator: ModuleType) -> None:
    """Since the fixture, or the last call, no access to shared memory met a bank conflict."""
    extra = {where: counts for where, counts in emulator.take_conflicts().items() if counts[1] > 0}
    assert not extra, f"bank conflicts, {{where: (requests, extra cycles)}}: {extra}"
