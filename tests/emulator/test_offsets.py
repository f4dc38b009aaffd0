"""Arrays of more than 2^31 elements: their pages are not there until a kernel touches them."""

from __future__ import annotations

import mmap
from types import ModuleType

import numpy as np
import pytest

from emulator.arrays import BF16, F32, assert_close, exact, normal, unwritten
from emulator.test_expand import expected as expanded
from emulator.test_gram import expected as gram
from emulator.test_routing import expected_backward, expected_topk
from emulator.test_shrink import expected as shrunk
from emulator.test_shrink import sort

FAR = (1 << 30) + 8  # elements between rows: that of the third is behind 2^31


@pytest.fixture(autouse=True)
def takes_arrays_where_they_lie(emulator: ModuleType) -> None:
    if not isinstance(emulator, ModuleType):
        pytest.skip("tests/gpu/test_card.py has such arrays on the card")
    if "tsan" in emulator.__name__:
        pytest.skip("a history of every byte is kept")


def untouched(*shape: int, dtype: np.dtype) -> np.ndarray:
    """Zeros that take no memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE: Python has no name for it
    pages = mmap.mmap(-1, int(np.prod(shape)) * dtype.itemsize, flags)
    return np.frombuffer(pages, dtype).reshape(shape)


def far(rows: np.ndarray) -> np.ndarray:
    """The same rows, far apart."""
    flat = untouched((len(rows) - 1) * FAR + rows.shape[1], dtype=rows.dtype)
    apart = np.lib.stride_tricks.as_strided(flat, rows.shape, (FAR * rows.itemsize, rows.itemsize))
    apart[...] = rows
    return apart


DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
IDS = np.array([[0, 1], [1, 0], [1, -1]])


@DTYPES
def test_rows_far_apart(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    offsets, order = sort(IDS, 2)
    x, A = normal(rng, 3, 40, dtype=dtype), normal(rng, 2, 8, 40, dtype=dtype)
    weights, h, u, dw = normal(rng, 3, 2), unwritten(6, 8), unwritten(6, 8), unwritten(6)
    emulator.shrink(far(x), A, offsets, order, None, h)
    assert_close(h, shrunk(x, A, IDS, None))
    by_rows = np.ascontiguousarray(A.transpose(0, 2, 1))
    emulator.backward_shrink(far(x), by_rows, offsets, order, None, 1.0, None, h, u, dw)
    assert u.tobytes() == h.tobytes()

    factors = exact(weights) * (IDS >= 0)
    y, dA = unwritten(3, 40, dtype=dtype), unwritten(2, 8, 40, dtype=dtype)
    given = (offsets, order, weights, None, 1.0, None)
    emulator.expand(h, by_rows, *given, far(x), None, y)
    assert_close(y, exact(x) + expanded(h, A, IDS, factors, None))
    emulator.mixture(far(x), A, by_rows, *given, far(x), None, y, None)
    assert_close(y, exact(x) + expanded(h, A, IDS, factors, None))
    emulator.gram(far(x), x, h, h, *given, None, dA, None, None)
    assert_close(dA, gram(factors.ravel()[order, None] * exact(h), x, IDS, 2, None), limit=1e-2)

    router, logits, d_router = normal(rng, 5, 40), unwritten(3, 5), unwritten(5, 40)
    emulator.router(far(x), router, logits)
    assert_close(logits, exact(x) @ exact(router).T)
    emulator.router_backward(far(x), router, logits, None, d_router)
    assert_close(d_router, exact(logits).T @ exact(x))


@DTYPES
def test_logits_far_apart(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    logits, dw, dz = normal(rng, 3, 40, dtype=dtype), normal(rng, 3, 2), unwritten(3, 40, dtype=dtype)
    weights, ids, *sorting = (
        unwritten(3, 2),
        np.zeros((3, 2), np.int64),
        np.zeros(41, np.int32),
        np.zeros(6, np.int32),
    )
    emulator.topk(far(logits), 2, 0, False, None, None, weights, ids, *sorting)
    want, chosen = expected_topk(logits, 2, 0, False)
    np.testing.assert_array_equal(ids, chosen)
    assert_close(weights, want)
    emulator.topk_backward(dw, far(logits), ids, 0, False, None, dz)
    assert_close(dz, expected_backward(dw, logits, ids, 0, False))


@DTYPES
def test_adapters_far_apart(emulator: ModuleType, rng, dtype: np.dtype) -> None:
    """4096 experts, of which the last is chosen: its rows start behind 2^31."""
    experts, rank, width, used = 4096, 128, 4112, 3
    ids, ranks = np.full((2, 1), experts - 1), np.full(experts, used, np.int32)
    offsets, order = sort(ids, experts)
    rows = normal(rng, 1, used, width, dtype=dtype)
    A, B = untouched(experts, rank, width, dtype=dtype), untouched(experts, width, rank, dtype=dtype)
    assert A[:-1].size > 1 << 31
    A[-1, :used], B[-1, :, :used] = rows[0], rows[0].T
    x, h, u, dw = normal(rng, 2, width, dtype=dtype), unwritten(2, rank), unwritten(2, rank), unwritten(2)
    emulator.shrink(x, A, offsets, order, ranks, h)
    one = np.zeros((2, 1), np.int64)
    assert_close(h[:, :used], shrunk(x, rows, one, None))
    emulator.backward_shrink(x, B, offsets, order, None, 1.0, ranks, h, u, dw)
    assert_close(u[:, :used], shrunk(x, rows, one, None))

    given = (offsets, order, np.ones((2, 1), F32), None, 1.0, ranks)
    want = expanded(h[:, :used], rows, one, np.ones(2), None)
    y, dx = unwritten(2, width, dtype=dtype), unwritten(2, width, dtype=dtype)
    emulator.expand(h, B, *given, None, None, y)
    assert_close(y, want)
    emulator.backward_expand(h, A, *given, None, None, dx)
    assert_close(dx, want)
