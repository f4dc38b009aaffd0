"""The emulator's own kernels compute what they should, and what it reports is so."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest

from emulator import build
from emulator.arrays import BF16, F16, assert_close, assert_no_conflicts, exact, normal, unwritten
from emulator.repeated import Repeated


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize(("m", "n", "k"), [(16, 8, 16), (1, 1, 8), (37, 19, 72), (33, 8, 128), (5, 3, 0)])
def test_product(emulator: ModuleType, rng: np.random.Generator, m: int, n: int, k: int, dtype) -> None:
    x, w = normal(rng, m, k, dtype=dtype), normal(rng, n, k, dtype=dtype)
    y = unwritten(m, n)
    emulator.demo(x, w, y)
    assert_close(y, exact(x) @ exact(w).T)
    assert_no_conflicts(emulator)


def test_count(emulator: ModuleType, rng: np.random.Generator) -> None:
    ids = rng.integers(-1, 64, 1000).astype(np.int32)
    counts = np.zeros(64, np.int32)
    emulator.count(ids, counts)
    assert np.array_equal(counts, np.bincount(ids[ids >= 0], minlength=64))


@pytest.mark.parametrize("k", [4, 7])
def test_row_sums(emulator: ModuleType, rng: np.random.Generator, k: int) -> None:
    x, y = normal(rng, 300, k), unwritten(300)
    emulator.row_sums(x, y)
    assert_close(y, exact(x).sum(1))


def test_what_nobody_has_written_is_not_read(emulator: ModuleType) -> None:
    if "tsan" not in emulator.__name__:
        pytest.skip("plain runs know no history of bytes")
    said = r"count_kernel.* at demo\.cu:\d+.* what nobody has written: byte 12 of a buffer of 256 in global"
    with pytest.raises(RuntimeError, match=said):
        emulator.count(np.array([3], np.int32), unwritten(64, dtype=np.int32))
    counts = unwritten(64, dtype=np.int32)
    counts[3] = 0
    emulator.count(np.array([3], np.int32), counts)
    assert counts[3] == 1


def test_what_depends_on_the_order_of_threads_shows() -> None:
    """Every test of a kernel compares, bit by bit, what two orders of its threads write."""
    module = ModuleType("kernels")
    module.order = 0
    module.seed = lambda n: setattr(module, "order", n)
    module.steady = lambda x, y: y.__iadd__(x)
    module.wild = lambda x, y: y.__iadd__(x + module.order % 2)
    emulated, y = Repeated(module, 4), np.zeros(3)
    emulated.steady(np.ones(3), y)
    assert (y == 1).all()  # what it reads, too, is as it was for the second time
    with pytest.raises(AssertionError, match="wild: .* order of threads"):
        emulated.wild(np.ones(3), y)


def test_programs_start_while_the_environment_changes() -> None:
    """pytest sets and unsets a variable around each test, while threads compile and run mutations."""
    with ThreadPoolExecutor(4) as pool:
        started = [pool.submit(build.run, [shutil.which("true")]) for _ in range(200)]
        while not started[-1].done():
            for _ in range(1000):
                os.environ["MOA_CHANGES"] = "set"
                del os.environ["MOA_CHANGES"]
    assert [repr(future.exception()) for future in started if future.exception()] == []
