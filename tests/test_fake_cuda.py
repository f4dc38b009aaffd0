"""The CUDA path without a GPU: traced with fake CUDA tensors, for shapes, dtypes and devices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moa_ops
from moa_ops import autograd, functional, ops

CUDA = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def fake() -> Iterator[FakeTensorMode]:
    with torch.no_grad(), FakeTensorMode() as mode:
        yield mode


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def check(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert (tuple(tensor.shape), tensor.dtype, tensor.device) == (shape, dtype, CUDA)


class Context:
    """What autograd gives a Function, for all inputs needing a gradient."""

    def __init__(self, inputs: tuple) -> None:
        self.needs_input_grad = [isinstance(value, torch.Tensor) for value in inputs]

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None:
        self.constant = tensors

    def set_materialize_grads(self, value: bool) -> None:
        assert not value


def check_function(function: type[torch.autograd.Function], *inputs: object) -> tuple[torch.Tensor, ...]:
    """Forward, and a backward whose gradients are like the inputs.

    A CPU build of torch cannot record CUDA tensors for autograd, so the Function is called as autograd would.
    """
    outputs = function.forward(*inputs)
    context = Context(inputs)
    function.setup_context(context, inputs, outputs)
    constant = {id(tensor) for tensor in context.constant}
    grads = function.backward(
        context, *(None if id(output) in constant else torch.ones_like(output) for output in outputs)
    )
    assert len(grads) == len(inputs)
    for grad, given in zip(grads, inputs, strict=True):
        floating = isinstance(given, torch.Tensor) and given.dtype.is_floating_point
        if grad is not None:
            check(grad, tuple(given.shape), given.dtype)
        else:
            assert not floating or given.dim() == 1, "no gradient"
    return outputs


def on_cuda(layer: torch.nn.Module, device: str = "cuda") -> torch.nn.Module:
    """The layer with fake parameters there; ``.to`` cannot swap fake ones."""
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype, device=device),
                    parameter.requires_grad,
                )
    return layer


def adapters(dtype: torch.dtype, experts: int = 8, r: int = 4, i: int = 33, o: int = 17) -> tuple:
    return empty(experts, r, i, dtype=dtype), empty(experts, o, r, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm", [False, True])
def test_topk_routing(dtype: torch.dtype, score_func: str, norm: bool) -> None:
    logits = empty(3, 5, 8, dtype=dtype)
    mask = torch.ones(3, 5, dtype=torch.bool, device="cuda")
    routing = moa_ops.topk_routing(
        logits, 2, score_func=score_func, norm_topk_prob=norm, selection_bias=empty(8), mask=mask
    )
    check(routing.weights, (15, 2), accumulator(dtype))
    check(routing.indices, (15, 2), torch.int64)
    check(routing.expert_offsets, (9,), torch.int32)
    check(routing.order, (30,), torch.int32)
    check_function(
        autograd.TopkRouting, logits.flatten(0, 1), 2, functional.SCORE_FUNCS[score_func], norm, None, None
    )


def test_routing_by_id() -> None:
    routing = moa_ops.Routing.from_indices(torch.zeros(4, 2, dtype=torch.int32, device="cuda"), num_experts=8)
    check(routing.order, (8,), torch.int32)
    repeated = routing.repeat(3, torch.ones(4, 3, dtype=torch.bool, device="cuda"))
    check(repeated.indices, (12, 2), torch.int64)
    check(repeated.order, (24,), torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["plain", "scaling", "ranks", "base"])
def test_segment_lora(dtype: torch.dtype, given: str) -> None:
    x, (lora_A, lora_B) = empty(2, 3, 33, dtype=dtype), adapters(dtype)
    logits = empty(6, 8, dtype=accumulator(dtype))
    more = {
        "plain": {},
        "scaling": {"scaling": empty(8)},
        "ranks": {"ranks": torch.ones(8, dtype=torch.int64, device="cuda")},
        "base": {"base": empty(2, 3, 17, dtype=dtype)},
    }[given]
    y = moa_ops.segment_lora(x, lora_A, lora_B, moa_ops.topk_routing(logits, 2), **more)
    check(y, (2, 3, 17), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moa_linear(dtype: torch.dtype) -> None:
    x, (lora_A, lora_B) = empty(6, 33, dtype=dtype), adapters(dtype)
    weight, bias = empty(17, 33, dtype=dtype), empty(17, dtype=dtype)
    logits, routing = functional.linear_routing(x, empty(8, 33, dtype=accumulator(dtype)), 2)
    check(logits, (6, 8), accumulator(dtype))
    y = moa_ops.moa_linear(x, weight, bias, lora_A, lora_B, routing)
    check(y, (6, 17), dtype)
    router_weight = empty(8, 33, dtype=accumulator(dtype))
    check_function(autograd.LinearRouting, x, router_weight, 2, 0, True, None, None)
    gates = (routing.weights, routing.indices, routing.expert_offsets, routing.order)
    check_function(autograd.MoALinear, x, weight, bias, None, lora_A, lora_B, *gates, None, 2.0, None)
    for score_func, norm in ((0, False), (0, True), (1, False), (1, True)):
        flags = (2, score_func, norm, 2.0)
        check_function(autograd.RoutedMoALinear, x, weight, bias, lora_A, lora_B, router_weight, *flags)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_layer(dtype: torch.dtype, level: str, top_k: int) -> None:
    layer = on_cuda(
        moa_ops.MoALinear(
            33,
            17,
            num_experts=5,
            r=3,
            top_k=top_k,
            routing_level=level,
            norm_topk_prob=False,
            dtype=dtype,
        )
    )
    x = empty(2, 7, 33, dtype=dtype)
    mask = torch.ones(2, 7, dtype=torch.bool, device="cuda")
    # masked_fill, which pools masked sequences, is one of the operators that need a real device.
    ways = [
        layer(x),
        layer(x, routing=layer.route(x)[1]),
        *([layer(x, mask=mask)] if level == "token" else []),
    ]
    for y in ways:
        check(y, (2, 7, 17), dtype)
    if level == "token":
        check(layer(empty(0, 33, dtype=dtype)), (0, 17), dtype)


def test_two_devices_are_refused() -> None:
    layer = on_cuda(moa_ops.MoALinear(33, 17, num_experts=5, r=3), "cuda:1")
    with pytest.raises((ValueError, RuntimeError), match="cuda:0"):
        layer(empty(4, 33))
    with pytest.raises(ValueError, match="cuda:0.*cpu|cpu.*cuda:0"):
        moa_ops.topk_routing(empty(4, 8), 2, mask=torch.ones(4, dtype=torch.bool))


def test_kernels_are_said_to_be_there_only_where_all_are() -> None:
    registered = [
        torch._C._dispatch_has_kernel_for_dispatch_key(f"moa_ops::{name}", "CUDA") for name in ops.KERNELS
    ]
    assert ops.has_kernels("cuda") == all(registered)
    assert ops.has_kernels("cpu")
    assert not ops.has_kernels("xpu")
