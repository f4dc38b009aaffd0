"""Gradients of the operators: ``autograd.Function`` classes that save, call and return.

They are not registered with the operators, so that a call without gradients reaches the kernel directly:
:mod:`moa_ops.functional` enters a Function only where a gradient flows. Gradients are of first order.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from moa_ops.ops import (
    linear_routing,
    routed_lora,
    segment_lora,
    segment_lora_backward,
    topk_routing,
    topk_routing_backward,
)
from moa_ops.reference import SOFTMAX


class _NoSecondOrder(Function):
    """Passes gradients through and raises when they are differentiated; the tensors after them tie it to the
    graph.
    """

    @staticmethod
    def forward(num_grads: int, *grads_and_anchors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads_and_anchors[:num_grads])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "moa_ops has gradients of first order only: a backward was run with create_graph=True and its "
            "result differentiated again. Use moa_ops.reference for higher orders"
        )


def _first_order(
    backward: Callable[..., Sequence[Tensor | None]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """Makes ``backward(ctx, saved, *grad_outputs)`` a backward that keeps no graph, and refuses to need one.

    ``once_differentiable`` looks at the incoming gradients alone, so ``create_graph=True`` on a plain sum
    would silently give a constant; the saved tensors are part of the graph too. They are read once, as
    checkpointing wants.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():  # no graph of the gradients is asked for
            return tuple(backward(ctx, saved, *grad_outputs))
        with torch.no_grad():
            grads = tuple(backward(ctx, saved, *grad_outputs))
        if torch.compiler.is_compiling():
            return grads
        anchors = [tensor for tensor in (*grad_outputs, *saved) if tensor is not None]
        given = [grad for grad in grads if grad is not None]
        if not given or not any(tensor.requires_grad for tensor in anchors):
            return grads
        tied = iter(_NoSecondOrder.apply(len(given), *given, *anchors))
        return tuple(None if grad is None else next(tied) for grad in grads)

    return wrapper


class _Bound:
    """What ``Signature.bind`` returns, as far as ``Function.apply`` looks at it."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args, self.kwargs = args, {}

    def apply_defaults(self) -> None:
        """There are none."""


class _Positional(inspect.Signature):
    """The signature of a function of ``*inputs``: binding arguments to it is taking them."""

    def bind(self, /, *args: Any) -> _Bound:  # type: ignore[override]
        """The arguments as they are."""
        return _Bound(args)


def _bound_at_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Spares ``Function.apply`` working out the signature of ``forward(*inputs)`` at every call, and binding
    ten inputs to it one by one.
    """
    forward.__signature__ = _Positional(inspect.signature(forward).parameters.values())
    return forward


def _needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """``None`` for the empty tensors that stand for gradients nobody asked for."""
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


class TopkRouting(Function):
    """(logits, top_k, score_func, norm_topk_prob, selection_bias, mask) -> outputs of ``topk_routing``."""

    @staticmethod
    @_bound_at_once
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        """Calls the operator."""
        return topk_routing(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves what the backward needs."""
        logits, _, score_func, norm_topk_prob, _, _ = inputs
        _, indices, expert_offsets, order = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(indices, expert_offsets, order)
        ctx.save_for_backward(logits, indices)
        ctx.flags = score_func, norm_topk_prob

    @staticmethod
    @_first_order
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], grad_weights: Tensor | None, *_: None
    ) -> list[Tensor | None]:
        """Gradients of the inputs that need one."""
        if grad_weights is None:
            return [None] * 6
        return [topk_routing_backward(grad_weights, *saved, *ctx.flags), *[None] * 5]


class LinearRouting(Function):
    """(x, router_weight, top_k, score_func, norm_topk_prob, selection_bias, mask) -> those of
    ``linear_routing``.
    """

    @staticmethod
    @_bound_at_once
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        """Calls the operator."""
        return linear_routing(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves what the backward needs."""
        x, router_weight, _, score_func, norm_topk_prob, _, _ = inputs
        logits, _, indices, expert_offsets, order = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(indices, expert_offsets, order)
        ctx.save_for_backward(x, router_weight, logits, indices)
        ctx.flags = score_func, norm_topk_prob

    @staticmethod
    @_first_order
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], grad_logits: Tensor | None, grad_weights: Tensor | None, *_: None
    ) -> list[Tensor | None]:
        """Gradients of the inputs that need one."""
        x, router_weight, logits, indices = saved
        if grad_weights is not None:
            through_weights = topk_routing_backward(grad_weights, logits, indices, *ctx.flags)
            grad_logits = through_weights if grad_logits is None else grad_logits + through_weights
        if grad_logits is None:
            return [None] * 7
        need_x, need_router, *_ = ctx.needs_input_grad
        grad_x = (grad_logits @ router_weight).to(x.dtype) if need_x else None
        grad_router = grad_logits.t() @ x.to(logits.dtype) if need_router else None
        return [grad_x, grad_router, *[None] * 5]


def _base_grads(grad_y: Tensor, x: Tensor, need_weight: bool, need_bias: bool) -> list[Tensor | None]:
    """Gradients of the base's weight and bias where needed."""
    return [grad_y.t() @ x if need_weight else None, grad_y.sum(0) if need_bias else None]


class MoALinear(Function):
    """The layer for a routing computed elsewhere.

    (x, weight, bias, base, lora_A, lora_B, weights, indices, expert_offsets, order, expert_scaling, scaling,
    ranks) -> y and h; weight, bias and base may be None, h is for the backward alone.
    """

    @staticmethod
    @_bound_at_once
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        """Calls the operator."""
        x, weight, bias, base, lora_A, lora_B, weights, _indices, *segments_and_scales = inputs
        return segment_lora(x, lora_A, lora_B, weights, *segments_and_scales, base, bias, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Saves what the backward needs."""
        x, weight, _, _, *segments, expert_scaling, scaling, ranks = inputs
        _, h = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(h)
        ctx.save_for_backward(x, weight, *segments, h, expert_scaling, ranks)
        ctx.scaling = scaling

    @staticmethod
    @_first_order
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_y: Tensor | None, _: None) -> list[Tensor | None]:
        """Gradients of the inputs that need one."""
        if grad_y is None:
            return [None] * 13
        x, weight, *segments_and_h, expert_scaling, ranks = saved
        need_x, need_weight, need_bias, need_base, need_A, need_B, need_weights = ctx.needs_input_grad[:7]
        needs = (need_x, need_A, need_B, need_weights, False)
        grads = [None] * 5
        if any(needs):
            router = (None, None, SOFTMAX, False)
            grads = segment_lora_backward(
                grad_y, x, *segments_and_h, expert_scaling, ctx.scaling, ranks, *router, *needs, weight
            )
        grad_x, *grad_lora, _ = _needed(grads, needs)
        grads_of_base = _base_grads(grad_y, x, need_weight, need_bias)
        return [grad_x, *grads_of_base, grad_y if need_base else None, *grad_lora, *[None] * 6]


class RoutedMoALinear(Function):
    """The whole layer with its own router in one node.

    (x, weight, bias, lora_A, lora_B, router_weight, top_k, score_func, norm_topk_prob, scaling)
    -> y, and what the backward needs.
    """

    @staticmethod
    @_bound_at_once
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        """Calls the operator."""
        x, weight, bias, *lora_and_router = inputs
        return routed_lora(x, *lora_and_router, bias, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves what the backward needs."""
        x, weight, _, lora_A, lora_B, router_weight, _, score_func, norm_topk_prob, scaling = inputs
        _, logits, *routing_and_h = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, router_weight, logits, lora_A, lora_B, *routing_and_h)
        ctx.flags = score_func, norm_topk_prob
        ctx.scaling = scaling

    @staticmethod
    @_first_order
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_y: Tensor | None, *_: None) -> list[Tensor | None]:
        """Gradients of the inputs that need one."""
        if grad_y is None:
            return [None] * 10
        x, weight, router_weight, logits, *segments_and_h = saved
        need_x, need_weight, need_bias, need_A, need_B, need_router = ctx.needs_input_grad[:6]
        needs = (need_x, need_A, need_B, False, need_router)
        grads = [None] * 5
        if any(needs):
            if not (need_x or need_router):  # without its weight, the router's part is skipped
                router_weight = logits = None
            router = (router_weight, logits, *ctx.flags)
            grads = segment_lora_backward(
                grad_y, x, *segments_and_h, None, ctx.scaling, None, *router, *needs, weight
            )
        grad_x, grad_A, grad_B, _, grad_router = _needed(grads, needs)
        grads_of_base = _base_grads(grad_y, x, need_weight, need_bias)
        return [grad_x, *grads_of_base, grad_A, grad_B, grad_router, *[None] * 4]
