"""The mathematics in plain PyTorch: what tests compare with, and what runs where no kernel was compiled.

The functions have the signatures of the operators in ``torch.ops.moa_ops``. They run on any device, in any
floating dtype, and the forward ones are differentiable, so that autograd can check the backward formulas.
They are written to be read, not to be fast: a Python loop over experts, host reads, copies.

With ``h = x A_eᵀ``, ``u = dy B_e``, gate weight ``w`` and scale ``s``, for token t and its slots j:

    y[t]  = base[t] + bias + Σ_j s·w·B_e h                 dx[t] = Σ_j s·w·u A_e
    dA_e  = Σ_t s·w·uᵀ x      dB_e = Σ_t dyᵀ s·w·h         dw    = s·⟨h, u⟩
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

SOFTMAX, SIGMOID = 0, 1


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype routing is decided and products are summed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------------- routing


def topk_routing(
    logits: Tensor,
    top_k: int,
    score_func: int,
    norm_topk_prob: bool,
    selection_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose ``top_k`` of the E experts for every row of ``logits`` ``[T, E]``.

    Experts are ordered by logit, or by score + ``selection_bias`` ``[E]`` where a bias is given (score =
    softmax over all E, or sigmoid); equal ones by id, the lower first. +0 equals -0, and NaN is larger than
    everything, as in ``torch.topk``. So ids are always in range and distinct, whatever the logits hold; the
    weights follow PyTorch: a softmax over a row with NaN, with +inf or with nothing but -inf is NaN
    throughout.

    Normalised softmax weights are a softmax over the selected logits, so that they cannot become 0/0 by
    underflow. Normalised sigmoid weights are divided by their sum and do become 0/0 = NaN when all of them
    underflow.

    Returns weights ``[T, k]`` (float32, or float64 for float64 logits), indices ``[T, k]`` int64,
    expert_offsets ``[E + 1]`` int32 and order ``[T·k]`` int32. Rows where ``mask`` ``[T]`` is False get index
    -1 and weight 0.
    """
    z = logits.to(accumulation_dtype(logits.dtype))
    key = z
    if selection_bias is not None:
        key = (z.softmax(-1) if score_func == SOFTMAX else z.sigmoid()) + selection_bias.to(z.dtype)
    key = torch.where(key.isnan(), math.nan, key)  # a sort on CUDA tells the bits of two NaN apart
    indices = key.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]

    if score_func == SIGMOID:
        weights = z.gather(1, indices).sigmoid()
        if norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
    elif norm_topk_prob:
        weights = z.gather(1, indices).softmax(-1)
        if selection_bias is not None:  # scores that are all NaN are chosen by id, and may miss the culprit
            weights = torch.where(key[:, :1].isnan(), math.nan, weights)
    else:
        weights = z.softmax(-1).gather(1, indices)

    if mask is not None:
        weights = torch.where(mask[:, None], weights, 0.0)
        indices = torch.where(mask[:, None], indices, -1)
    indices = indices.contiguous()
    return (weights, indices, *sort_by_expert(indices, logits.shape[1]))


def topk_routing_backward(
    grad_weights: Tensor, logits: Tensor, indices: Tensor, score_func: int, norm_topk_prob: bool
) -> Tensor:
    """Gradient of the weights with respect to ``logits``: ``[T, E]``, in the dtype of ``logits``.

    With g the selected weights, dg their gradients, p the scores and c = Σ_S g·dg:

        softmax over the selected   g(dg - c)          softmax over all      -p·c everywhere, + g·dg on S
        normalised sigmoid   p(1 - p)(dg - c)/Σ_S p    sigmoid               g(1 - g)·dg

    Rows without experts (index -1) get zeros.
    """
    z = logits.to(accumulation_dtype(logits.dtype))
    routed = indices >= 0
    chosen = indices.clamp(min=0)
    dg = torch.where(routed, grad_weights.to(z.dtype), 0.0)
    dz = torch.zeros_like(z)
    z_chosen = z.gather(1, chosen)

    if score_func == SIGMOID:
        p = z_chosen.sigmoid()
        slope = p * (-z_chosen).sigmoid()  # p(1 - p), without its cancellation near 1
        if norm_topk_prob:
            total = p.sum(-1, keepdim=True)
            c = (p / total * dg).sum(-1, keepdim=True)
            dz_chosen = slope * (dg - c) / total
        else:
            dz_chosen = dg * slope
    elif norm_topk_prob:
        g = z_chosen.softmax(-1)
        dz_chosen = g * (dg - (g * dg).sum(-1, keepdim=True))
    else:
        p = z.softmax(-1)
        dz_chosen = p.gather(1, chosen) * dg
        dz = torch.where(routed[:, :1], -p * dz_chosen.sum(-1, keepdim=True), 0.0)

    dz = dz.scatter_add(1, chosen, torch.where(routed, dz_chosen, 0.0))
    return dz.to(logits.dtype)


def sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Stable sort of the slots t·k + j of ``indices`` ``[T, k]`` by expert; slots of -1 come last.

    Returns expert_offsets ``[E + 1]`` and order ``[T·k]``, both int32. Raises ``ValueError`` for ids outside
    [-1, E).
    """
    ids = indices.flatten()
    bad = (ids < -1) | (ids >= num_experts)
    if bad.any():
        raise ValueError(
            f"expert id {int(ids[bad][0])} is outside [-1, {num_experts}); use -1 for no adapter"
        )
    sorted_ids, order = torch.where(ids < 0, num_experts, ids).sort(stable=True)
    experts = torch.arange(num_experts + 1, device=ids.device, dtype=ids.dtype)
    return torch.searchsorted(sorted_ids, experts, out_int32=True), order.to(torch.int32)


def linear_routing(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    score_func: int,
    norm_topk_prob: bool,
    selection_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits ``x W_rᵀ`` ``[T, E]`` in the accumulation dtype, and what :func:`topk_routing` makes of them."""
    dtype = accumulation_dtype(x.dtype)
    logits = x.to(dtype) @ router_weight.to(dtype).t()
    return (logits, *topk_routing(logits, top_k, score_func, norm_topk_prob, selection_bias, mask))


# ---------------------------------------------------------------------------------------------------- mixture


def _segments(
    expert_offsets: Tensor, order: Tensor, ranks: Tensor | None, r: int
) -> Iterator[tuple[int, slice, int]]:
    """(expert, its rows of ``order``, its rank) for every expert that has tokens, after checking what is
    read.
    """
    offsets = expert_offsets.tolist()
    num_slots = order.numel()
    if offsets[0] != 0 or offsets[-1] > num_slots or offsets != sorted(offsets):
        raise ValueError(f"expert_offsets must rise from 0 to at most {num_slots}, got {offsets}")
    if num_slots and not (int(order.min()) >= 0 and int(order.max()) < num_slots):
        raise ValueError(f"order must hold slots in [0, {num_slots})")
    used = [r] * (len(offsets) - 1) if ranks is None else ranks.tolist()
    if used and not (min(used) >= 0 and max(used) <= r):
        raise ValueError(f"ranks must lie in [0, {r}], got {used}")
    for expert, (start, end) in enumerate(itertools.pairwise(offsets)):
        if end > start:
            yield expert, slice(start, end), used[expert]


def _scales(expert_scaling: Tensor | None, scaling: float, like: Tensor, num_experts: int) -> Tensor:
    if expert_scaling is None:
        return like.new_full((num_experts,), scaling)
    return scaling * expert_scaling.to(like.dtype)


def segment_lora(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor,
    expert_offsets: Tensor,
    order: Tensor,
    expert_scaling: Tensor | None = None,
    scaling: float = 1.0,
    ranks: Tensor | None = None,
    base: Tensor | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y[t] = W x[t] + base[t] + bias + Σ_j w[t, j]·s[e]·B_e (A_e x[t])`` and ``h``.

    x ``[T, in]``, lora_A ``[E, r, in]``, lora_B ``[E, out, r]``, weights ``[T, k]``, weight ``[out, in]``;
    s = scaling·expert_scaling. y ``[T, out]`` has x's dtype. h ``[T·k, r]`` holds A_e x in sorted order (row
    p belongs to slot ``order[p]``) in the accumulation dtype, zero where a slot has no expert and in columns
    beyond an expert's rank.
    """
    dtype = accumulation_dtype(x.dtype)
    num_experts, r, _ = lora_A.shape
    top_k = weights.shape[1]
    wide = x.to(dtype)
    y = wide.new_zeros(x.shape[0], lora_B.shape[1])
    if base is not None:
        y = y + base.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    if weight is not None:
        y = y + wide @ weight.to(dtype).t()
    scales = _scales(expert_scaling, scaling, wide, num_experts)
    h = wide.new_zeros(order.numel(), r)
    for expert, rows, rank in _segments(expert_offsets, order, ranks, r):
        slots = order[rows].long()
        tokens = slots // top_k
        gates = (weights.flatten()[slots].to(dtype) * scales[expert])[:, None]
        rows_h = wide[tokens] @ lora_A[expert, :rank].to(dtype).t()
        h[rows, :rank] = rows_h.detach()
        y = y.index_add(0, tokens, (gates * rows_h) @ lora_B[expert, :, :rank].to(dtype).t())
    return y.to(x.dtype), h


def segment_lora_backward(
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
    """Gradients of x, lora_A, lora_B, weights and router_weight; those not needed come back empty.

    With ``router_weight`` (and the ``logits`` it gave), the gradient of the weights flows on: grad_x gains
    dlogits·W_r, and grad_router is dlogitsᵀ x. With ``weight`` grad_x gains grad_y·W. Each gradient has the
    dtype of what it belongs to.
    """
    dtype = accumulation_dtype(x.dtype)
    num_experts, r, _ = lora_A.shape
    top_k = weights.shape[1]
    wide, dy = x.to(dtype), grad_y.to(dtype)
    scales = _scales(expert_scaling, scaling, wide, num_experts)
    dx = torch.zeros_like(wide, memory_format=torch.contiguous_format)
    dA = lora_A.new_zeros(lora_A.shape, dtype=dtype)
    dB = lora_B.new_zeros(lora_B.shape, dtype=dtype)
    dw = wide.new_zeros(weights.numel())
    for expert, rows, rank in _segments(expert_offsets, order, ranks, r):
        slots = order[rows].long()
        tokens = slots // top_k
        gates = (weights.flatten()[slots].to(dtype) * scales[expert])[:, None]
        u = dy[tokens] @ lora_B[expert, :, :rank].to(dtype)
        dw[slots] = scales[expert] * (u * h[rows, :rank].to(dtype)).sum(-1)
        dA[expert, :rank] = (gates * u).t() @ wide[tokens]
        dB[expert, :, :rank] = dy[tokens].t() @ (gates * h[rows, :rank].to(dtype))
        dx.index_add_(0, tokens, (gates * u) @ lora_A[expert, :rank].to(dtype))
    dw = dw.view(weights.shape)

    d_router = None
    if router_weight is not None and logits is not None:
        dz = topk_routing_backward(dw, logits, indices, score_func, norm_topk_prob).to(dtype)
        dx += dz @ router_weight.to(dtype)
        d_router = (dz.t() @ wide).to(router_weight.dtype)
    if weight is not None:
        dx += dy @ weight.to(dtype)

    def keep(needed: bool, grad: Tensor | None, dtype: torch.dtype) -> Tensor:
        return grad.to(dtype) if needed and grad is not None else x.new_empty(0)

    return (
        keep(need_x, dx, x.dtype),
        keep(need_A, dA, lora_A.dtype),
        keep(need_B, dB, lora_B.dtype),
        keep(need_weights, dw, weights.dtype),
        keep(need_router, d_router, x.dtype if router_weight is None else router_weight.dtype),
    )


# ------------------------------------------------------------------------------------------------ whole layer


def moa_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    top_k: int,
    *,
    score_func: str = "softmax",
    norm_topk_prob: bool = True,
    scaling: float | Tensor = 1.0,
    ranks: Tensor | None = None,
    selection_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The whole layer with its own router at token level, differentiable in every tensor; x ``[..., in]``.

    ``y[t] = W x[t] + b + Σ_j w[t, j]·s·B_e (A_e x[t])`` with the w and e of ``softmax(W_r x[t])`` or
    ``sigmoid``. Everything is computed in the accumulation dtype, so that a low-precision caller is rounded
    once, at the end.
    """
    dtype = accumulation_dtype(x.dtype)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    _, weights, _, expert_offsets, order = linear_routing(
        rows,
        router_weight,
        top_k,
        SIGMOID if score_func == "sigmoid" else SOFTMAX,
        norm_topk_prob,
        selection_bias,
        None if mask is None else mask.flatten(),
    )
    expert_scaling, factor = (scaling, 1.0) if isinstance(scaling, Tensor) else (None, scaling)
    lora = (lora_A, lora_B, weights, expert_offsets, order, expert_scaling, factor, ranks)
    y, _ = segment_lora(rows, *lora, bias=bias, weight=weight)
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])
