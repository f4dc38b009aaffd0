"""Fixtures shared by all tests: fixed seeds, and the instruction sets this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import moa_ops  # noqa: F401  (loads the operators)

ISAS = torch.ops.moa_ops.cpu_isas().split(",")
BEST_ISA = torch.ops.moa_ops.cpu_isa()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


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
