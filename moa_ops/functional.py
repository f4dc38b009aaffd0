"""The differentiable functions of the library: checks and autocast over ``torch.ops.moa_ops.*``.

They take a :class:`~moa_ops.routing.Routing` apart and call the operators: through :mod:`moa_ops.autograd`
where a gradient flows, directly where none does. Gradients are of first order: differentiating one raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moa_ops import autograd, ops
from moa_ops.reference import SIGMOID, SOFTMAX, accumulation_dtype
from moa_ops.routing import Routing

SCORE_FUNCS = {"softmax": SOFTMAX, "sigmoid": SIGMOID}

# ----------------------------------------------------------------------------------------------------- checks


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record an operation on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def as_rows(x: Tensor) -> Tensor:
    """``[..., n]`` as ``[T, n]``."""
    if x.dim() == 2:
        return x
    return x.flatten(0, -2) if x.dim() > 2 else x[None]


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device (the meta device has none, and PyTorch raises when asked)."""
    if x.is_cpu:  # spares the device object
        return torch.is_autocast_enabled("cpu")
    device_type = x.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where it is on for x's device; float64 is left as it is."""
    if not under_autocast(x):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in (x, *others)
    )


def _adapter(parameter: Tensor, x: Tensor) -> Tensor:
    """``parameter`` as the kernels take it: x's dtype or float32; a third dtype is cast under autocast."""
    if parameter.dtype in (x.dtype, torch.float32) or not under_autocast(x):
        return parameter
    return parameter.to(x.dtype)


def _check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in dict.fromkeys(allowed))
        raise TypeError(f"{name} must be {names}, got {tensor.dtype}; convert it with .to()")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """``None`` in ``shape`` allows any size."""
    if tensor.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be {meaning} = [{wanted}], got shape {list(tensor.shape)}")


def check_routing_options(num_experts: int, top_k: int, score_func: str) -> None:
    """Raises ``ValueError`` for a top_k outside [1, num_experts] and for an unknown score_func."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be between 1 and the number of experts, {num_experts}; got {top_k}")
    if score_func not in SCORE_FUNCS:
        raise ValueError(f"score_func must be one of {sorted(SCORE_FUNCS)}, got {score_func!r}")


def _check_mixture(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    routing: Routing,
    scaling: float | Tensor,
    ranks: Tensor | None,
    **others: Tensor | None,
) -> None:
    """x, lora_A, lora_B and routing fit together, and all tensors (``others`` too) are on x's device."""
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be floating, got {x.dtype}")
    if lora_A.dim() != 3 or min(lora_A.shape[:2]) < 1:
        raise ValueError(f"lora_A must be [E, r, in] with E, r >= 1, got shape {list(lora_A.shape)}")
    num_experts, r, in_features = lora_A.shape
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x must be [..., {in_features}] (in_features of lora_A), got shape {list(x.shape)}")
    _check_shape("lora_B", lora_B, (num_experts, None, r), "[E, out, r]")
    _check_dtype("lora_A", lora_A, (x.dtype, accumulation_dtype(x.dtype)))
    _check_dtype("lora_B", lora_B, (x.dtype, accumulation_dtype(x.dtype)))
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a moa_ops.Routing, got {type(routing).__name__}")
    if routing.num_experts != num_experts:
        raise ValueError(f"routing is for {routing.num_experts} experts, lora_A holds {num_experts}")
    tokens = x.shape[:-1].numel()
    if routing.num_tokens != tokens:
        raise ValueError(
            f"routing is for {routing.num_tokens} tokens, x of shape {list(x.shape)} has {tokens}; to give "
            "one decision to a whole sequence use routing.repeat(sequence_length)"
        )
    if isinstance(scaling, Tensor):
        _check_shape("scaling", scaling, (num_experts,), "a float or [E]")
        if needs_grad(scaling):
            raise ValueError("scaling has no gradient; detach it, or fold what is to be learned into lora_B")
    if ranks is not None:
        _check_shape("ranks", ranks, (num_experts,), "[E]")
        _check_dtype("ranks", ranks, (torch.int32, torch.int64))
    for name, tensor in {
        "lora_A": lora_A,
        "lora_B": lora_B,
        "routing": routing.weights,
        "scaling": scaling,
        "ranks": ranks,
        **others,
    }.items():
        if isinstance(tensor, Tensor) and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; move one of them")


# -------------------------------------------------------------------------------------------------- functions


def topk_routing(
    logits: Tensor,
    top_k: int,
    *,
    score_func: str = "softmax",
    norm_topk_prob: bool = False,
    selection_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Routing:
    """Route every token to its ``top_k`` best experts; differentiable from the weights to ``logits``.

    logits: ``[..., E]``, any floating dtype; leading dimensions are flattened to T tokens. Decided in float32
        (float64 for float64).
    score_func, norm_topk_prob: "softmax" over all E or "sigmoid"; with norm_topk_prob the weights sum to 1.
    selection_bias: ``[E]``, added to the scores to choose experts, never to their weights; no gradient.
    mask: ``[...]`` bool; where False (padding), indices are -1 and weights 0.

    Equal logits go to the lower id, NaN counts as largest; see :func:`moa_ops.reference.topk_routing` for the
    rules. Raises ``ValueError`` for top_k outside [1, E] and wrong shapes, ``TypeError`` for wrong dtypes.
    """
    if logits.dim() < 1:
        raise ValueError("logits must be [..., E], got a scalar")
    if not logits.dtype.is_floating_point:
        raise TypeError(f"logits must be floating, got {logits.dtype}")
    num_experts = logits.shape[-1]
    check_routing_options(num_experts, top_k, score_func)
    if selection_bias is not None:
        _check_shape("selection_bias", selection_bias, (num_experts,), "[E]")
        selection_bias = selection_bias.detach().to(accumulation_dtype(logits.dtype))
    if mask is not None:
        _check_shape("mask", mask, tuple(logits.shape[:-1]), "[...] as the leading dimensions of logits")
        _check_dtype("mask", mask, (torch.bool,))
        mask = mask.reshape(-1)
    rows = as_rows(logits)
    route = autograd.TopkRouting.apply if needs_grad(rows) else ops.topk_routing
    return Routing(
        *route(rows, top_k, SCORE_FUNCS[score_func], norm_topk_prob, selection_bias, mask), num_experts
    )


def linear_routing(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    *,
    score_func: str = "softmax",
    norm_topk_prob: bool = False,
    selection_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Routing]:
    """Logits of a linear router and the routing they give, in one pass over x; both differentiable.

    x: ``[..., in]``. router_weight: ``[E, in]`` in float32 (float64 for float64 x): routing is never decided
    in less, also under autocast. The rest as in :func:`topk_routing`. Returns logits ``[T, E]`` and the
    :class:`Routing`.
    """
    check_routing_options(router_weight.shape[0], top_k, score_func)
    _check_shape("router_weight", router_weight, (None, x.shape[-1]), "[E, in]")
    router_weight = router_weight.to(accumulation_dtype(x.dtype))
    if mask is not None:
        _check_shape("mask", mask, tuple(x.shape[:-1]), "[...] as the leading dimensions of x")
        _check_dtype("mask", mask, (torch.bool,))
        mask = mask.reshape(-1)
    rows = as_rows(x)
    route = autograd.LinearRouting.apply if needs_grad(rows, router_weight) else ops.linear_routing
    flags = (top_k, SCORE_FUNCS[score_func], norm_topk_prob, selection_bias, mask)
    logits, *fields = route(rows, router_weight, *flags)
    return logits, Routing(*fields, router_weight.shape[0])


def segment_lora(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    routing: Routing,
    *,
    scaling: float | Tensor = 1.0,
    ranks: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """``y[t] = base[t] + Σ_j w[t, j]·s[e]·B_e (A_e x[t])`` with e = routing.indices[t, j].

    x: ``[..., in]``, T tokens in all.
    lora_A: ``[E, r, in]``; lora_B: ``[E, out, r]``; both in x's dtype, or in float32 under a narrower x.
    routing: a :class:`Routing` of the same T tokens and E experts.
    scaling: a float or ``[E]``; a constant: one that requires a gradient is refused unless gradients are off.
    ranks: ``[E]`` int32 or int64: only the first ranks[e] rows of lora_A[e] and columns of lora_B[e] are
        used; the others are not read and their gradient is zero.
    base: ``[..., out]`` in x's dtype, added and never changed in place.

    Returns y ``[..., out]`` in x's dtype, summed in float32 (float64 for float64). Differentiable in x,
    lora_A, lora_B, routing.weights and base. Under autocast, x and base are cast to its dtype. Raises
    ``ValueError`` and ``TypeError`` for arguments that do not fit together.
    """
    return mixture(x, None, None, base, lora_A, lora_B, routing, scaling, ranks)


def moa_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    routing: Routing,
    *,
    scaling: float | Tensor = 1.0,
    ranks: Tensor | None = None,
) -> Tensor:
    """``y[t] = W x[t] + b + Σ_j w[t, j]·s[e]·B_e (A_e x[t])``: ``F.linear`` and :func:`segment_lora` in one.

    weight: ``[out, in]``, bias: ``[out]`` or None, in x's dtype. Differentiable in them too, where they
    require it. The rest as in :func:`segment_lora`.
    """
    return mixture(x, weight, bias, None, lora_A, lora_B, routing, scaling, ranks)


def mixture(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    routing: Routing,
    scaling: float | Tensor,
    ranks: Tensor | None,
) -> Tensor:
    """What :func:`segment_lora` and :func:`moa_linear` compute. Without gradients it is one operator, and
    nothing is asked that it asks itself: a step of decoding is some 20 µs of kernels, and checks in Python
    would cost as much again.
    """
    expert_scaling, factor = (scaling, 1.0) if isinstance(scaling, Tensor) else (None, scaling)
    if not torch.is_grad_enabled() and type(x) is Tensor and ops.has_checks(x) and not under_autocast(x):
        try:
            segments = (routing.expert_offsets, routing.order, expert_scaling, factor, ranks)
            return ops.segment_linear(x, weight, bias, base, lora_A, lora_B, routing.weights, *segments)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            pass  # something to convert, or to complain about in better words

    x, weight, bias, base = _autocast(x, weight, bias, base)
    lora_A, lora_B = _adapter(lora_A, x), _adapter(lora_B, x)
    _check_mixture(x, lora_A, lora_B, routing, scaling, ranks, weight=weight, bias=bias, base=base)
    out_features, in_features = lora_B.shape[1], lora_A.shape[2]
    leading = x.shape[:-1]
    for name, tensor, shape, meaning in (
        ("weight", weight, (out_features, in_features), "[out, in]"),
        ("bias", bias, (out_features,), "[out]"),
        ("base", base, (*leading, out_features), "[..., out] with the leading dimensions of x"),
    ):
        if tensor is not None:
            _check_shape(name, tensor, shape, meaning)
            _check_dtype(name, tensor, (x.dtype,))

    if expert_scaling is not None:
        expert_scaling = expert_scaling.to(accumulation_dtype(x.dtype))
    weights = routing.weights.to(accumulation_dtype(x.dtype))
    segments = (routing.expert_offsets, routing.order, expert_scaling, factor, ranks)
    if not needs_grad(x, weight, bias, base, lora_A, lora_B, weights):
        return ops.segment_linear(x, weight, bias, base, lora_A, lora_B, weights, *segments)
    rows = as_rows(x)
    if base is not None:
        base = as_rows(base)
    lora = (lora_A, lora_B, weights, routing.indices, *segments)
    y, _ = autograd.MoALinear.apply(rows, weight, bias, base, *lora)
    return y if x.dim() == 2 else y.view(*leading, out_features)


def routed_moa_linear(
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
    """The whole layer with its own router, in one node of autograd; what ``MoALinear`` runs per token.

    Takes what the layer has checked: all tensors on one device, x and weight of one dtype, ``score_func`` as
    a number. The operators check again what they read memory with.
    """
    if router_weight.dtype is not torch.float32 or x.dtype is torch.float64:
        router_weight = router_weight.to(accumulation_dtype(x.dtype))
    layer = (weight, bias, lora_A, lora_B, router_weight, top_k, score_func, norm_topk_prob, scaling)
    if not needs_grad(x, lora_A, lora_B, router_weight, weight, bias):
        return ops.routed_linear(x, *layer)
    rows = as_rows(x)
    y = autograd.RoutedMoALinear.apply(rows, *layer)[0]
    return y if rows is x else y.view(*x.shape[:-1], lora_B.shape[1])
