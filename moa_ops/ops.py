"""The operators ``torch.ops.moa_ops.*`` in Python: loaded, with fakes, and with a kernel on every device.

Schemas and CPU kernels come from the C++ library. Here each operator gains its fake (shapes and dtypes only,
for ``torch.compile``, ``torch.export`` and ``FakeTensorMode``), and :mod:`moa_ops.reference` as its kernel on
devices for which none was compiled; those that do the work of several are composed of the others there.
Gradients are attached in :mod:`moa_ops.autograd`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moa_ops import _lib, reference  # noqa: F401  (_lib loads the C++ library)
from moa_ops.reference import accumulation_dtype

KERNELS = (
    "topk_routing",
    "topk_routing_backward",
    "sort_by_expert",
    "linear_routing",
    "segment_lora",
    "segment_lora_backward",
)

topk_routing = torch.ops.moa_ops.topk_routing.default
topk_routing_backward = torch.ops.moa_ops.topk_routing_backward.default
sort_by_expert = torch.ops.moa_ops.sort_by_expert.default
linear_routing = torch.ops.moa_ops.linear_routing.default
segment_lora = torch.ops.moa_ops.segment_lora.default
segment_lora_backward = torch.ops.moa_ops.segment_lora_backward.default
routed_lora = torch.ops.moa_ops.routed_lora.default
segment_linear = torch.ops.moa_ops.segment_linear.default
routed_linear = torch.ops.moa_ops.routed_linear.default


def has_kernels(device_type: str) -> bool:
    """Whether compiled kernels run on ``device_type`` ("cpu", "cuda", ...); elsewhere plain PyTorch does
    their work.
    """
    key = device_type.upper()
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(f"moa_ops::{name}", key) for name in KERNELS)


# --------------------------------------------------------------------------- devices without compiled kernels


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as a kernel: it sees tensors as they are, without autograd or autocast around it."""

    @functools.wraps(function)
    def kernel(*args: Any) -> Any:
        with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    return kernel


# "default" serves every device that has no kernel of its own, so compiled ones always take precedence.
for _name in KERNELS:
    torch.library.impl(f"moa_ops::{_name}", "default", plain(getattr(reference, _name)))


def _compose_routed_lora(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    top_k: int,
    score_func: int,
    norm_topk_prob: bool,
    scaling: float,
    bias: Tensor | None,
    weight: Tensor | None = None,
) -> tuple[Tensor, ...]:
    logits, *routing = linear_routing(x, router_weight, top_k, score_func, norm_topk_prob, None, None)
    weights, _, expert_offsets, order = routing
    lora = (lora_A, lora_B, weights, expert_offsets, order, None, scaling, None)
    y, h = segment_lora(x, *lora, None, bias, weight)
    return y, logits, *routing, h


def _compose_segment_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, *lora: Any
) -> Tensor:
    if base is not None:
        base = base.reshape(-1, base.shape[-1])
    y, _ = segment_lora(x.reshape(-1, x.shape[-1]), *lora, base, bias, weight)
    return y.view(*x.shape[:-1], y.shape[1])


def _compose_routed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    top_k: int,
    score_func: int,
    norm_topk_prob: bool,
    scaling: float,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    flags = (top_k, score_func, norm_topk_prob)
    y, *_ = _compose_routed_lora(rows, lora_A, lora_B, router_weight, *flags, scaling, bias, weight)
    return y.view(*x.shape[:-1], y.shape[1])


torch.library.impl("moa_ops::routed_lora", "default", plain(_compose_routed_lora))
torch.library.impl("moa_ops::segment_linear", "default", plain(_compose_segment_linear))
torch.library.impl("moa_ops::routed_linear", "default", plain(_compose_routed_linear))

# Whether a tensor's device has kernels, and with them checks of whatever they read.
CUDA_KERNELS = has_kernels("cuda")


def has_checks(x: Tensor) -> bool:
    """Whether the operators check their arguments where x is: those that are plain PyTorch do not."""
    return x.is_cpu or (x.is_cuda and CUDA_KERNELS)


# ------------------------------------------------------------------------------------------------------ fakes


def _check_devices(first: Tensor, *others: Tensor | None) -> None:
    """A compiled kernel refuses tensors of several devices; what is traced must not let them pass."""
    for tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"tensors are on {first.device} and {tensor.device}; move them to one device")


@torch.library.register_fake("moa_ops::topk_routing")
def _topk_routing(
    logits: Tensor,
    top_k: int,
    score_func: int,
    norm_topk_prob: bool,
    selection_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_devices(logits, selection_bias, mask)
    tokens, num_experts = logits.shape
    return (
        logits.new_empty(tokens, top_k, dtype=accumulation_dtype(logits.dtype)),
        logits.new_empty(tokens, top_k, dtype=torch.int64),
        logits.new_empty(num_experts + 1, dtype=torch.int32),
        logits.new_empty(tokens * top_k, dtype=torch.int32),
    )


@torch.library.register_fake("moa_ops::topk_routing_backward")
def _topk_routing_backward(
    grad_weights: Tensor, logits: Tensor, indices: Tensor, score_func: int, norm_topk_prob: bool
) -> Tensor:
    _check_devices(logits, grad_weights, indices)
    return logits.new_empty(logits.shape)


@torch.library.register_fake("moa_ops::sort_by_expert")
def _sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return (
        indices.new_empty(num_experts + 1, dtype=torch.int32),
        indices.new_empty(indices.numel(), dtype=torch.int32),
    )


@torch.library.register_fake("moa_ops::linear_routing")
def _linear_routing(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    score_func: int,
    norm_topk_prob: bool,
    selection_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_devices(x, router_weight)
    logits = x.new_empty(x.shape[0], router_weight.shape[0], dtype=accumulation_dtype(x.dtype))
    return (logits, *_topk_routing(logits, top_k, score_func, norm_topk_prob, selection_bias, mask))


@torch.library.register_fake("moa_ops::segment_lora")
def _segment_lora(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    expert_offsets: Tensor,
    order: Tensor,
    expert_scaling: Tensor | None,
    scaling: float,
    ranks: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_devices(
        x, lora_A, lora_B, weights, expert_offsets, order, expert_scaling, ranks, base, bias, weight
    )
    return (
        x.new_empty(x.shape[0], lora_B.shape[1]),
        x.new_empty(order.shape[0], lora_A.shape[1], dtype=accumulation_dtype(x.dtype)),
    )


@torch.library.register_fake("moa_ops::routed_lora")
def _routed_lora(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    top_k: int,
    score_func: int,
    norm_topk_prob: bool,
    scaling: float,
    bias: Tensor | None,
    weight: Tensor | None = None,
) -> tuple[Tensor, ...]:
    logits, *routing = _linear_routing(x, router_weight, top_k, score_func, norm_topk_prob)
    weights, _, expert_offsets, order = routing
    lora = (lora_A, lora_B, weights, expert_offsets, order, None, scaling, None)
    y, h = _segment_lora(x, *lora, None, bias, weight)
    return y, logits, *routing, h


@torch.library.register_fake("moa_ops::segment_lora_backward")
def _segment_lora_backward(
    grad_y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    indices: Tensor,
    expert_offsets: Tensor,
    order: Tensor,
    h: Tensor,
    expert_scaling: Tensor | None,
    scaling: float,
    ranks: Tensor | None,
    router_weight: Tensor | None,
    logits: Tensor | None,
    score_func: int,
    norm_topk_prob: bool,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_weights: bool,
    need_router: bool,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_devices(x, grad_y, lora_A, lora_B, weights, indices, expert_offsets, order, h)
    _check_devices(x, expert_scaling, ranks, router_weight, logits, weight)

    def grad(needed: bool, like: Tensor | None) -> Tensor:
        return x.new_empty(0) if like is None or not needed else like.new_empty(like.shape)

    return (
        grad(need_x, x),
        grad(need_A, lora_A),
        grad(need_B, lora_B),
        grad(need_weights, weights),
        grad(need_router, router_weight),
    )


@torch.library.register_fake("moa_ops::segment_linear")
def _segment_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    expert_offsets: Tensor,
    order: Tensor,
    expert_scaling: Tensor | None,
    scaling: float,
    ranks: Tensor | None,
) -> Tensor:
    _check_devices(
        x, weight, bias, base, lora_A, lora_B, weights, expert_offsets, order, expert_scaling, ranks
    )
    return x.new_empty(*x.shape[:-1], lora_B.shape[1])


@torch.library.register_fake("moa_ops::routed_linear")
def _routed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    top_k: int,
    score_func: int,
    norm_topk_prob: bool,
    scaling: float,
) -> Tensor:
    _check_devices(x, weight, bias, lora_A, lora_B, router_weight)
    return x.new_empty(*x.shape[:-1], lora_B.shape[1])
