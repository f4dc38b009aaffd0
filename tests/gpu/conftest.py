"""``device``: the card, or the CPU, where the same functions hold; ``cuda``: the card or a skip."""

from __future__ import annotations

import pytest
import torch

from moa_ops import ops


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    assert ops.has_kernels("cuda"), "this build has no CUDA kernels: python -m moa_ops.info says why"
    return torch.device("cuda")
