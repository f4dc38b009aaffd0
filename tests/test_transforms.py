"""What PyTorch does to a function: opcheck, compile, export, checkpoint, functional gradients, gradcheck."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import moa_ops
from helpers import Mixture, assert_close, error, make_layer, make_mixture, moa
from moa_ops import MoALinear, Routing, functional
from moa_ops.reference import SIGMOID, SOFTMAX

F32, F64 = torch.float32, torch.float64


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


def operator_calls(dtype: torch.dtype, tokens: int, optional: bool) -> list[tuple[str, tuple[Any, ...]]]:
    """(operator, arguments) of every operator, with and without its optional ones."""
    p = make_mixture(tokens, 24, 16, 5, 2, 4, dtype, None, "holes", optional, optional, optional, optional)
    acc = p.weights.dtype
    weight, router, bias = torch.randn(16, 24).to(dtype), torch.randn(5, 24).to(acc), torch.randn(5).to(acc)
    extra = (bias, torch.rand(tokens) < 0.7) if optional else (None, None)
    logits, weights, ids, offsets, order = moa.linear_routing(p.x, router, 2, SOFTMAX, True, *extra)
    _, h = p.forward()
    lora = (p.x, p.lora_A, p.lora_B, p.weights)
    scale = (p.expert_scaling, p.scaling, p.ranks)
    backward = (p.grad_y, *lora, p.indices, p.expert_offsets, p.order, h, *scale)
    routed = (p.grad_y, *lora[:3], weights, ids, offsets, order, h, *scale, router, logits, SOFTMAX, True)
    return [
        ("topk_routing", (logits.to(dtype), 2, SOFTMAX, False, *extra)),
        ("topk_routing_backward", (torch.randn_like(weights), logits.to(dtype), ids, SIGMOID, True)),
        ("sort_by_expert", (ids, 5)),
        ("linear_routing", (p.x, router, 2, SIGMOID, False, *extra)),
        (
            "segment_lora",
            (*lora, p.expert_offsets, p.order, *scale, p.base, p.bias, weight if optional else None),
        ),
        ("segment_lora_backward", (*backward, None, None, SOFTMAX, False, True, True, True, True, False)),
        ("segment_lora_backward", (*backward, None, None, SOFTMAX, False, False, True, False, True, False)),
        ("segment_lora_backward", (*routed, True, True, True, False, True)),
        ("segment_lora_backward", (*routed, True, True, True, False, True, weight)),
        (
            "segment_linear",
            (p.x, weight if optional else None, p.bias, p.base, *lora[1:], p.expert_offsets, p.order, *scale),
        ),
        ("routed_lora", (p.x, *lora[1:3], router, 2, SIGMOID, True, p.scaling, p.bias)),
        ("routed_lora", (p.x, *lora[1:3], router, 2, SOFTMAX, False, p.scaling, p.bias, weight)),
        ("routed_linear", (p.x, weight, p.bias, *lora[1:3], router, 2, SOFTMAX, True, p.scaling)),
    ]


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize(("dtype", "tokens"), [(F32, 9), (F64, 1), (torch.bfloat16, 9)])
def test_opcheck(dtype: torch.dtype, tokens: int, optional: bool) -> None:
    """All four of opcheck's tests: schema, autograd registration, fake, and dynamic shapes."""
    for name, arguments in operator_calls(dtype, tokens, optional):
        torch.library.opcheck(getattr(moa, name).default, arguments)


# -------------------------------------------------------------------------------------------------- gradcheck


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck_of_topk_routing(score_func: str, norm: bool) -> None:
    logits = torch.randn(7, 5, dtype=F64, requires_grad=True)
    mask = torch.arange(7) != 3
    flags = {"score_func": score_func, "norm_topk_prob": norm, "mask": mask}
    assert torch.autograd.gradcheck(lambda z: moa_ops.topk_routing(z, 3, **flags).weights, logits)


@pytest.mark.parametrize("options", [{}, {"kind": "holes", "ranks": True, "expert_scaling": True}])
def test_gradcheck_of_segment_lora(options: dict[str, Any]) -> None:
    p = make_mixture(6, 5, 7, 4, 2, 3, F64, **options)
    inputs = [t.requires_grad_() for t in (p.x, p.lora_A, p.lora_B, p.weights, p.base)]
    scaling = p.scaling if p.expert_scaling is None else p.expert_scaling

    def run(x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor, base: Tensor) -> Tensor:
        routing = Routing(weights, p.indices, p.expert_offsets, p.order, 4)
        return moa_ops.segment_lora(x, lora_A, lora_B, routing, scaling=scaling, ranks=p.ranks, base=base)

    assert torch.autograd.gradcheck(run, inputs)


def test_gradcheck_of_moa_linear() -> None:
    p = make_mixture(6, 5, 7, 4, 2, 3, F64)
    weight, bias = torch.randn(7, 5, dtype=F64), torch.randn(7, dtype=F64)
    inputs = [t.requires_grad_() for t in (p.x, weight, bias, p.lora_A, p.lora_B)]
    assert torch.autograd.gradcheck(lambda *tensors: moa_ops.moa_linear(*tensors, p.routing()), inputs)


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck_of_the_layer(score_func: str, norm: bool) -> None:
    layer = MoALinear(5, 7, num_experts=4, r=3, score_func=score_func, norm_topk_prob=norm).double()
    names = ("lora_A", "lora_B", "router.weight", "weight", "bias")
    x, *parameters = (torch.randn(6, 5), *(torch.randn(layer.get_parameter(name).shape) for name in names))
    inputs = [tensor.double().requires_grad_() for tensor in (x, *parameters)]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, inputs)


def test_logits_of_linear_routing_are_differentiable() -> None:
    inputs = [torch.randn(*shape, dtype=F64, requires_grad=True) for shape in ((6, 5), (4, 5))]

    def run(x: Tensor, router_weight: Tensor) -> tuple[Tensor, Tensor]:
        logits, routing = functional.linear_routing(x, router_weight, 2)
        return logits, routing.weights

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradcheck(lambda *tensors: run(*tensors)[0], inputs)
    assert torch.autograd.gradcheck(lambda *tensors: run(*tensors)[1], inputs)


def test_second_derivatives_are_refused() -> None:
    """Also where the incoming gradient is a constant and only saved tensors would need the graph."""
    layer = MoALinear(8, 6)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 8, requires_grad=True)
    z = torch.randn(5, 8, requires_grad=True)
    routing = Routing.from_indices([0] * 5, num_experts=8)
    for y, wrt in (
        (layer(x), x),
        (layer(x, routing=routing), x),
        (moa_ops.topk_routing(z, 2).weights, z),
        (layer.route(x)[1].weights, x),
    ):
        (grad,) = torch.autograd.grad(y.sum(), wrt, create_graph=True)
        with pytest.raises(RuntimeError, match="first order only"):
            grad.square().sum().backward()
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)  # not differentiated: no error
    assert grad.isfinite().all()


# ----------------------------------------------------------------------------------------- compile and export


def loss_and_gradients(function: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    y = function(x)
    y.backward(torch.randn_like(y))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


LAYERS: dict[str, dict[str, Any]] = {
    "token": {},
    "sequence": {"routing_level": "sequence"},
    "bfloat16": {"dtype": torch.bfloat16},
    "softmax over all, no bias": {"norm_topk_prob": False, "bias": False},
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_compile(fresh_compiler: None, kind: str, backend: str) -> None:
    layer = MoALinear(32, 24, num_experts=4, r=4, **LAYERS[kind])
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 9, 32, dtype=layer.weight.dtype)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    eager = loss_and_gradients(layer, layer, x)
    for have, want in zip(loss_and_gradients(compiled, layer, x), eager, strict=True):
        assert error(have, want) < (1e-6 if x.dtype == F32 else 1e-2)
    with torch.no_grad():
        assert error(compiled(x), layer(x)) < 1e-6


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
def test_a_compiled_step_has_the_layers_bits(fresh_compiler: None, dtype: torch.dtype) -> None:
    """The base's product is the same kernel, ours where it is faster; a fresh layer still is ``F.linear``."""
    layer = MoALinear(64, 48, num_experts=4, r=4, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor", dynamic=True)
    for tokens in (3, 16, 100):
        x = torch.randn(tokens, 64).to(dtype).requires_grad_()
        assert torch.equal(compiled(x), nn.functional.linear(x, layer.weight, layer.bias))
    nn.init.normal_(layer.lora_B)
    for tokens in (3, 16, 100):
        x = torch.randn(tokens, 64).to(dtype)
        eager = loss_and_gradients(layer, layer, x)
        for have, want in zip(loss_and_gradients(compiled, layer, x), eager, strict=True):
            assert torch.equal(have, want)


@pytest.mark.parametrize("given", [False, True])
def test_what_is_traced_changes_nothing_in_place(fresh_compiler: None, given: bool) -> None:
    """Where a Function's forward did so, torch 2.11 compiled gradients of zero."""
    traced: list[fx.GraphModule] = []
    layer, x = make_layer(), torch.randn(5, 48, requires_grad=True)
    options = {"routing": Routing.from_indices([0, 3, 1, 1, 2], num_experts=8)} if given else {}
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: traced.append(graph) or graph)
    compiled(x, **options).sum().backward()
    nodes = [n for g in traced for m in g.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes]
    assert any("moa_ops" in str(node.target) for node in nodes)
    assert [n for n in nodes if n.op == "call_method" and n.target.endswith("_")] == []


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_functions(fresh_compiler: None, backend: str) -> None:
    """Routing made, repeated and passed on inside the graph; and given from outside."""
    p = make_mixture(12, 16, 24, 4, 2, 4)
    weight = torch.randn(24, 16)

    def run(x: Tensor, logits: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        routing = moa_ops.topk_routing(logits, 2, norm_topk_prob=True).repeat(4)
        y = moa_ops.moa_linear(x, weight, None, lora_A, lora_B, routing, scaling=0.5)
        by_id = Routing.from_indices(routing.indices[:, 0], num_experts=4)
        return moa_ops.segment_lora(x, lora_A, lora_B, by_id, base=y)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    results = []
    for function in (run, compiled):
        torch.manual_seed(1)
        inputs = [t.detach().requires_grad_() for t in (p.x, torch.randn(3, 4), p.lora_A, p.lora_B)]
        y = function(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, torch.randn_like(y))])
    for have, want in zip(*results, strict=True):
        assert error(have, want) < 1e-6

    given = torch.compile(
        lambda x, routing: moa_ops.segment_lora(x, p.lora_A, p.lora_B, routing),
        fullgraph=True,
        backend=backend,
    )
    assert_close(given(p.x, p.routing()), moa_ops.segment_lora(p.x, p.lora_A, p.lora_B, p.routing()))


def test_compile_does_not_recompile_for_every_length(fresh_compiler: None) -> None:
    layer = MoALinear(16, 24, num_experts=4, r=4)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        compiled(torch.randn(5, 16))
        compiled_once = counter.frame_count
        for tokens in (9, 33, 70):
            x = torch.randn(tokens, 16)
            assert error(compiled(x), layer(x)) < 1e-6
    assert counter.frame_count == compiled_once


def test_compile_under_autocast(fresh_compiler: None) -> None:
    layer = MoALinear(32, 24, num_experts=4, r=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(10, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = loss_and_gradients(layer, layer, x)
        for have, want in zip(loss_and_gradients(compiled, layer, x), eager, strict=True):
            assert have.dtype == want.dtype
            assert error(have, want) < 1e-2


def test_export() -> None:
    layer = MoALinear(16, 24, num_experts=4, r=4).eval()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(6, 16)
    tokens = torch.export.Dim("tokens", min=2)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: tokens},), strict=False)
        for length in (2, 6, 19):
            x = torch.randn(length, 16)
            assert torch.equal(program.module()(x), layer(x))
    assert "moa_ops.routed_linear.default" in {str(node.target) for node in program.graph.nodes}


def test_export_with_a_routing_as_input() -> None:
    layer = MoALinear(16, 24, num_experts=4, r=4).eval()
    nn.init.normal_(layer.lora_B)
    x, routing = torch.randn(6, 16), Routing.from_indices([0, 1, 2, 3, -1, 0], num_experts=4)
    with torch.no_grad():
        program = torch.export.export(layer, (x, routing))
        assert torch.equal(program.module()(x, routing), layer(x, routing))


def test_fakes_of_another_device() -> None:
    """Shapes and dtypes of a CUDA run can be traced on a machine without one."""
    layer = MoALinear(16, 24, dtype=torch.bfloat16, device="meta").requires_grad_(False)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
    ):  # autograd itself needs a CUDA build to look at a CUDA device
        layer = layer.to_empty(device="cuda")
        x = torch.empty(2, 5, 16, dtype=torch.bfloat16, device="cuda")
        logits, routing = layer.route(x)
        for y in (layer(x), layer(x, routing=routing)):
            assert y.device.type == "cuda"
            assert y.dtype == torch.bfloat16
            assert y.shape == (2, 5, 24)
        lora = (x.flatten(0, 1), layer.lora_A, layer.lora_B, routing.weights, routing.indices)
        segments = (routing.expert_offsets, routing.order, logits.new_empty(20, 16), None, 1.0, None)
        router, needs = (layer.router.weight, logits, SOFTMAX, True), (True, True, False, False, True)
        grads = moa.segment_lora_backward(y.flatten(0, 1), *lora, *segments, *router, *needs)
        assert [grad.shape for grad in grads] == [(10, 16), (8, 16, 16), (0,), (0,), (8, 16)]
        assert {grad.device.type for grad in grads} == {"cuda"}


# ---------------------------------------------------------------------------------- checkpoint and torch.func


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_checkpoint(level: str) -> None:
    layer = MoALinear(32, 24, num_experts=4, r=4, routing_level=level)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 9, 32)
    expected = loss_and_gradients(layer, layer, x)
    again = loss_and_gradients(lambda x: checkpoint(layer, x, use_reentrant=False), layer, x)
    for have, want in zip(again, expected, strict=True):
        assert torch.equal(have, want)


def test_checkpoint_with_a_shared_routing() -> None:
    p = make_mixture()

    def run(x: Tensor, routing: Routing) -> Tensor:
        return moa_ops.segment_lora(x, p.lora_A, p.lora_B, routing)

    grads = []
    for function in (run, lambda *args: checkpoint(run, *args, use_reentrant=False)):
        q: Mixture = copy.deepcopy(p)
        q.weights.requires_grad_()
        q.x.requires_grad_()
        grads.append(torch.autograd.grad(function(q.x, q.routing()), (q.x, q.weights), p.grad_y))
    for have, want in zip(*grads, strict=True):
        assert torch.equal(have, want)


def test_func_grad_and_vjp() -> None:
    layer = MoALinear(16, 24, num_experts=4, r=4)
    nn.init.normal_(layer.lora_B)
    x, target = torch.randn(9, 16), torch.randn(9, 24)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(layer, parameters, (x,)) - target).square().sum()

    grads, grad_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    leaf_x = x.clone().requires_grad_()
    wanted = torch.autograd.grad(loss(leaves, leaf_x), [*leaves.values(), leaf_x])
    for have, want in zip([*grads.values(), grad_x], wanted, strict=True):
        assert torch.equal(have, want)

    routing = moa_ops.topk_routing(torch.randn(9, 4), 2)

    def of_weights(weights: Tensor) -> tuple[Tensor, Routing]:
        given = dataclasses.replace(routing, weights=weights)
        return (moa_ops.segment_lora(x, layer.lora_A, layer.lora_B, given) - target).square().sum(), given

    grad, given = torch.func.grad(of_weights, has_aux=True)(routing.weights)
    assert grad.shape == routing.weights.shape
    assert torch.equal(given.order, routing.order)
    z = torch.randn(9, 4)
    _, vjp = torch.func.vjp(lambda z: moa_ops.topk_routing(z, 2).weights, z)
    (dz,) = vjp(torch.ones(9, 2))
    assert dz.shape == z.shape


def test_inference_mode() -> None:
    layer = MoALinear(16, 24)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 16)
    expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
