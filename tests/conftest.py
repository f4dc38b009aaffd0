"""Fixtures shared by all tests: fixed seeds, and the instruction sets this machine has.

With ``MOA_TEST_DEVICE=cuda`` the tests that make tensors make them there, and run the CUDA kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moa_ops  # noqa: F401  (loads the operators)

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # The cores are shared out, also to what a test starts: threads beyond them spin at each other's barriers.
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

# Files whose tests are long, and share nothing: dealt out one by one, after the others.
ONE_BY_ONE = {"test_asan.py", "test_mutations.py"}

DEVICE = os.environ.get("MOA_TEST_DEVICE", "cpu")
BEST_ISA = torch.ops.moa_ops.cpu_isa()
ISAS = torch.ops.moa_ops.cpu_isas().split(",") if DEVICE == "cpu" else [BEST_ISA]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """A file at a time to a process, so that what it sets up is set up once, those with many tests first; the
    files above test by test at the end, where no process shall wait long for another.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if Path(file).name in ONE_BY_ONE else file

    return Scheduling(config, log)


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
