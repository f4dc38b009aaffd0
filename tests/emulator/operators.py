"""The backend switch: the emulated module's functions, answered by ``torch.ops.moa_ops`` on a device.

``MOA_EMULATOR=cuda:0`` runs the kernels' tests on a card instead. What no operator takes or returns skips the
test from there on: the router's gradient dz is made inside of a backward, for example. Where an operator
makes an operand itself (h of x, u of dy), it is given a matrix of ones and zeros that makes the test's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import moa_ops  # noqa: F401  (loads the operators)
from emulator import build
from emulator.arrays import BF16, exact, rounded

moa = torch.ops.moa_ops


class Operators:
    """The bound kernels by name, on arrays; results are written into the arrays given for them."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.__name__ = device

    def seed(self, seed: int) -> None:
        """Threads come as the device has them."""

    def take_conflicts(self) -> dict[str, Any]:
        """Bank conflicts are not counted here."""
        return {}

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_plan") and build.why_not() is None:
            return getattr(build.load("plain"), name)
        pytest.skip(f"{name} is not an operator")

    def tensor(self, array: np.ndarray | None) -> torch.Tensor | None:
        """The array on the device; a matrix keeps the distance of its rows and its alignment."""
        if array is None:
            return None
        shape, strides, start = array.shape, None, 0
        if array.ndim == 2 and array.size > 0 and not array.flags.c_contiguous:
            start = array.ctypes.data % 16 // array.itemsize
            strides = tuple(stride // array.itemsize for stride in array.strides)
            flat = np.zeros(
                start + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)), array.dtype
            )
            np.lib.stride_tricks.as_strided(flat[start:], shape, array.strides)[...] = array
            array = flat
        array = np.ascontiguousarray(array)
        if array.dtype == BF16:
            tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(self.device)
        else:
            tensor = torch.from_numpy(array).to(self.device)
        return tensor if strides is None else tensor.as_strided(shape, strides, start)

    @staticmethod
    def store(tensors: tuple[torch.Tensor, ...], arrays: tuple[np.ndarray | None, ...]) -> None:
        for tensor, array in zip(tensors, arrays, strict=True):
            if array is None:
                continue
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

    # ---- the mixture ----

    def shrink(self, x, lora_A, offsets, order, ranks, h) -> None:
        experts, rank, _ = lora_A.shape
        ones = np.ones((len(x), order.size // max(len(x), 1) or 1), h.dtype)
        segments = (ones, offsets, order, None, 1.0, ranks)
        self.store(self.forward(x, lora_A, np.zeros((experts, 1, rank), lora_A.dtype), *segments), (None, h))

    def forward(
        self, x, lora_A, lora_B, weights, offsets, order, scale, scaling, ranks, base=None, bias=None
    ):
        tensors = map(self.tensor, (x, lora_A, lora_B, weights, offsets, order, scale))
        more = map(self.tensor, (ranks, base, bias))
        return moa.segment_lora(*tensors, scaling, *more)

    def backward(self, need: int, dy, x, lora_A, lora_B, weights, offsets, order, h, scale, scaling, ranks):
        """Gradient ``need`` of x, lora_A, lora_B, weights."""
        ids = np.zeros(weights.shape, np.int64)  # the router's backward alone reads them
        arrays = (dy, x, lora_A, lora_B, weights, ids, offsets, order, h, scale)
        router = (None, None, 0, False)
        needs = [i == need for i in range(5)]
        tensors = map(self.tensor, arrays)
        return moa.segment_lora_backward(*tensors, scaling, self.tensor(ranks), *router, *needs)[need]

    def backward_shrink(self, dy, lora_B, offsets, order, scale, scaling, ranks, h, u, dw) -> None:
        """u stays inside of the backward: dw = s·⟨h, u⟩ is all there is of it."""
        if dw is None:
            pytest.skip("u alone is no gradient")
        experts, _, rank = lora_B.shape
        weights = np.ones((len(dy), order.size // max(len(dy), 1) or 1), h.dtype)
        x, lora_A = np.zeros((len(dy), 8), dy.dtype), np.zeros((experts, rank, 8), lora_B.dtype)
        given = (weights, offsets, order, h, scale, scaling, ranks)
        self.store((self.backward(3, dy, x, lora_A, lora_B, *given),), (dw,))

    @staticmethod
    def blocks(values, offsets, order, tokens: int, dtype) -> tuple[np.ndarray, np.ndarray]:
        """Rows ``[tokens, E·r]``, expert e's values at column e·r, and ``[E, r, E·r]`` that picks them."""
        experts, rank = len(offsets) - 1, values.shape[1]
        if (np.diff(offsets, append=order.size) < 0).any() or (np.sort(order) != np.arange(order.size)).any():
            pytest.skip("a routing that is none has no h")
        ids = np.repeat(np.arange(experts), np.diff(offsets))
        token = order[: offsets[-1]] // max(order.size // max(tokens, 1), 1)
        if len(set(zip(token.tolist(), ids.tolist(), strict=True))) < len(ids):
            pytest.skip("a token that names an expert twice has one h for both")
        rows = np.zeros((tokens, experts, rank))
        rows[token, ids] = exact(values)[: len(ids)]
        picks = np.eye(experts * rank).reshape(experts, rank, -1)
        return rounded(rows.reshape(tokens, experts * rank), dtype), picks

    def expand(self, h, lora_B, offsets, order, weights, scale, scaling, ranks, base, bias, y) -> None:
        x, picks = self.blocks(h, offsets, order, len(y), y.dtype)
        segments = (weights, offsets, order, scale, scaling, ranks)
        given = self.forward(x, rounded(picks, lora_B.dtype), lora_B, *segments, base, bias)
        self.store(given, (y, None))

    def mixture(
        self, x, lora_A, lora_B, offsets, order, weights, scale, scaling, ranks, base, bias, y, h
    ) -> None:
        if h is not None:
            given = (x, lora_A, lora_B, weights, offsets, order, scale, scaling, ranks, base, bias)
            self.store(self.forward(*given), (y, h))
            return
        given = (x, None, bias, base, lora_A, lora_B, weights, offsets, order, scale)
        y_there = moa.segment_linear(*map(self.tensor, given), scaling, self.tensor(ranks))
        self.store((y_there,), (y,))

    def backward_expand(
        self, u, lora_A, offsets, order, weights, scale, scaling, ranks, dz, router, dx
    ) -> None:
        if dz is not None:
            pytest.skip("dz is made inside of the backward")
        dy, picks = self.blocks(u, offsets, order, len(dx), dx.dtype)
        lora_B = rounded(picks.transpose(0, 2, 1), lora_A.dtype)
        given = (weights, offsets, order, np.zeros_like(u), scale, scaling, ranks)
        self.store((self.backward(0, dy, np.zeros_like(dx), lora_A, lora_B, *given),), (dx,))

    def gram(self, x, dy, u, h, offsets, order, weights, scale, scaling, ranks, dz, dA, dB, d_router) -> None:
        if dz is not None:
            pytest.skip("dz is made inside of the backward")
        if dA is not None:
            rows, picks = self.blocks(u, offsets, order, len(x), x.dtype)
            lora_B = rounded(picks.transpose(0, 2, 1), dA.dtype)
            given = (weights, offsets, order, np.zeros_like(u), scale, scaling, ranks)
            self.store((self.backward(1, rows, x, np.zeros_like(dA), lora_B, *given),), (dA,))
        if dB is not None:
            lora_A = np.zeros((len(dB), h.shape[1], x.shape[1]), dB.dtype)
            given = (weights, offsets, order, h, scale, scaling, ranks)
            self.store((self.backward(2, dy, x, lora_A, np.zeros_like(dB), *given),), (dB,))

    def router(self, x, weight, logits) -> None:
        routed = moa.linear_routing(self.tensor(x), self.tensor(weight), 1, 0, False, None, None)
        self.store(routed[:1], (logits,))

    def routed(self, x, lora_A, lora_B, router, k, score_func, norm, scaling, bias, *out: np.ndarray) -> None:
        tensors = map(self.tensor, (x, lora_A, lora_B, router))
        self.store(moa.routed_lora(*tensors, k, score_func, norm, scaling, self.tensor(bias)), out)

    def decode(self, x, lora_A, lora_B, router, k, score_func, norm, bias, scale, scaling, ranks, y) -> None:
        """The base is a linear of one more feature for every token, a multiple of 8 in all."""
        if any(given is not None for given in (bias, scale, ranks)):
            pytest.skip("the layer's operator has no selection bias, scales or ranks")
        tokens = len(x)
        more = -(-tokens // 8) * 8
        base = np.zeros((y.shape[1], x.shape[1] + more), y.dtype)
        base[:, x.shape[1] : x.shape[1] + tokens] = y.T
        wide = np.zeros((tokens, x.shape[1] + more), x.dtype)
        wide[:, : x.shape[1]] = x
        wide[np.arange(tokens), x.shape[1] + np.arange(tokens)] = rounded(np.ones(1), x.dtype)[0]

        def widened(array: np.ndarray) -> np.ndarray:
            return np.concatenate([array, np.zeros((*array.shape[:-1], more), array.dtype)], -1)

        tensors = map(self.tensor, (wide, base, None, widened(lora_A), lora_B, widened(router)))
        self.store((moa.routed_linear(*tensors, k, score_func, norm, scaling),), (y,))

    def decode_linear(
        self, x, weight, bias, lora_A, lora_B, router, k, score_func, norm, scaling, *rest
    ) -> None:
        *given, y = rest
        if any(array is not None for array in given):
            pytest.skip("the layer's operator has no selection bias, scales or ranks")
        tensors = map(self.tensor, (x, weight, bias, lora_A, lora_B, router))
        self.store((moa.routed_linear(*tensors, k, score_func, norm, scaling),), (y,))

    def mixture_linear(
        self, x, weight, bias, lora_A, lora_B, offsets, order, weights, scale, scaling, ranks, y
    ) -> None:
        given = (x, weight, bias, None, lora_A, lora_B, weights, offsets, order, scale)
        self.store((moa.segment_linear(*map(self.tensor, given), scaling, self.tensor(ranks)),), (y,))

    def routed_expand(
        self, x, lora_A, lora_B, router, k, score_func, norm, scaling, bias, logits, weights, ids, y
    ) -> bool:
        """Beside a base of zeros; the routing by an operator of its own."""
        base = np.zeros((y.shape[1], x.shape[1]), x.dtype)
        tensors = map(self.tensor, (x, base, bias, lora_A, lora_B, router))
        self.store((moa.routed_linear(*tensors, k, score_func, norm, scaling),), (y,))
        given = map(self.tensor, (x, router))
        routed = moa.linear_routing(*given, k, score_func, norm, None, None)
        self.store(routed[:3], (logits, weights, ids))
        return True

    def skinny(self, x, weight, start, y) -> None:
        """A layer's base beside one adapter of zeros, which everybody has."""
        tokens, bias, base = len(x), None, None
        if start is not None and start.ndim == 1:
            bias = start
        else:
            base = start
        lora_A, lora_B = np.zeros((1, 1, x.shape[1]), x.dtype), np.zeros((1, len(weight), 1), x.dtype)
        offsets, order = np.array([0, tokens], np.int32), np.arange(tokens, dtype=np.int32)
        segments = (lora_A, lora_B, np.ones((tokens, 1), np.float32), offsets, order, None)
        tensors = map(self.tensor, (x, weight, bias, base, *segments))
        self.store((moa.segment_linear(*tensors, 1.0, None),), (y,))
