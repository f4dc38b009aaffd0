"""The fixture that kernel tests take: a built module, in every way that runs inside this process."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from emulator import build
from emulator.repeated import Repeated

# variant:seed, or cpu:0 and cuda:0 for the operators there (operators.py). AddressSanitizer has to be in the
# process from its start: test_asan.py runs these tests again.
WAYS = os.environ.get("MOA_EMULATOR", "plain:7 tsan:0").split()
EVERY = int(os.environ.get("MOA_EMULATOR_EVERY", "1"))  # 2: half of the tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whoever names the ways (a sanitizer's run, a mutation's) wants the tests of kernels, and those only.

    Some run without the race detector and AddressSanitizer, which see it with fewer blocks, or in bfloat16.
    """
    here, only_kernels = Path(__file__).parent, "MOA_EMULATOR" in os.environ

    def left_out(item: pytest.Item) -> bool:
        if item.get_closest_marker("plain_alone") and ("[tsan" in item.name or "[asan" in item.name):
            return True
        if zlib.crc32(item.name.encode()) % EVERY != 0:
            return True
        return only_kernels and item.path.parent == here and "emulator" not in item.fixturenames

    others = [item for item in items if left_out(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture(params=WAYS)
def emulator(request: pytest.FixtureRequest) -> ModuleType:
    """The module with every bound kernel; threads in index order (seed 0) and interleaved at random."""
    variant, seed = request.param.split(":")
    if variant in ("cpu", "cuda"):
        from emulator.operators import Operators

        return Operators(variant)
    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    module = build.load(variant)
    module.seed(int(seed))
    module.residents(0)
    module.poison(0xFF)
    module.take_conflicts()
    module.take_launches()
    # A routing that is none may give any sums, so long as they stay inside; huge arrays cannot be kept twice.
    once = request.node.name.startswith("test_wild") or request.path.stem == "test_offsets"
    return module if once or variant != "plain" else Repeated(module, int(seed))


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every run."""
    return np.random.default_rng(0)
