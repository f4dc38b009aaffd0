"""Fixtures shared by all tests: fixed seeds, and the instruction sets this machine has.

With ``MOA_TEST_DEVICE=cuda`` the tests that make tensors make them there, and run the CUDA kernels. With
``MOA_TEST_LIBRARY`` they run the kernels of that file, whose instruction sets may be emulated.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch

if library := os.environ.get("MOA_TEST_LIBRARY"):
    spec = importlib.util.spec_from_file_location("moa_ops._C", library)
    sys.modules["moa_ops._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["moa_ops._C"])

import moa_ops  # noqa: F401  (loads the operators)

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # The cores are shared out, also to what a test starts: threads beyond them spin at each other's barriers.
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

DEVICE = os.environ.get("MOA_TEST_DEVICE", "cpu")
BEST_ISA = torch.ops.moa_ops.cpu_isa()
ISAS = torch.ops.moa_ops.cpu_isas().split(",") if DEVICE == "cpu" else [BEST_ISA]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    """New tensors are made on MOA_TEST_DEVICE."""
    if DEVICE == "cpu":
        yield
    else:
        with torch.device(DEVICE):
            yield


def _use(isa: str) -> Iterator[str]:
    before = torch.ops.moa_ops.cpu_isa()
    torch.ops.moa_ops.set_cpu_isa(isa)
    yield isa
    torch.ops.moa_ops.set_cpu_isa(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine, one after the other."""
    yield from _use(request.param)


@pytest.fixture(params=list(dict.fromkeys(["scalar", BEST_ISA])))
def edge_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The plainest instruction set and the one used by default: enough for edges of shape."""
    yield from _use(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
