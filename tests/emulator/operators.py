"""The backend switch: the emulated module's functions, answered by ``torch.ops.moa_ops`` on a device.

``MOA_EMULATOR=cuda:0`` runs the kernels' tests on a card instead. A function that no operator corresponds to
skips its test.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import moa_ops  # noqa: F401  (loads the operators)
from emulator.arrays import BF16

moa = torch.ops.moa_ops


class Operators:
    """The bound kernels by name, on arrays; results are written into the arrays given for them."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def seed(self, seed: int) -> None:
        """Threads come as the device has them."""

    def take_conflicts(self) -> dict[str, Any]:
        """Bank conflicts are not counted here."""
        return {}

    def __getattr__(self, name: str) -> Any:
        pytest.skip(f"{name} is not an operator")

    def tensor(self, array: np.ndarray | None) -> torch.Tensor | None:
        if array is None:
            return None
        if array.dtype == BF16:
            bits = torch.from_numpy(np.ascontiguousarray(array).view(np.int16))
            return bits.view(torch.bfloat16).to(self.device)
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    @staticmethod
    def store(tensors: tuple[torch.Tensor, ...], arrays: tuple[np.ndarray, ...]) -> None:
        for tensor, array in zip(tensors, arrays, strict=True):
            values = tensor.cpu()
            bits = values.view(torch.int16).numpy().view(np.uint16) if array.dtype == BF16 else values.numpy()
            array[...] = bits.reshape(array.shape)

    def topk(self, logits, top_k, score_func, norm, bias, mask, *out: np.ndarray) -> None:
        given = (self.tensor(bias), self.tensor(mask))
        self.store(moa.topk_routing(self.tensor(logits), top_k, score_func, norm, *given), out)

    def sort_by_expert(self, ids: np.ndarray, experts: int, *out: np.ndarray) -> None:
        self.store(moa.sort_by_expert(self.tensor(ids), experts), out)

    def topk_backward(self, dw, logits, ids, score_func, norm, order, dz: np.ndarray) -> None:
        if order is not None:
            pytest.skip("the sorted gradient is no operator of its own")
        tensors = (self.tensor(array) for array in (dw, logits, ids))
        self.store((moa.topk_routing_backward(*tensors, score_func, norm),), (dz,))
