"""MoALinear: its equation, its base bit for bit, its gradients, routing levels and masks."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import DTYPES, TOLERANCE, assert_close, assert_same, error, expected_output, make_layer, subsets
from moa_ops import MoALinear, Routing, reference, topk_routing

FLAGS = list(itertools.product(["softmax", "sigmoid"], [False, True]))


# ----------------------------------------------------------------------------------------------- the equation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(256, 192), (33, 65), (2048, 96)])
@pytest.mark.parametrize("tokens", [0, 1, 16, 130])
def test_a_fresh_layer_is_its_base_bit_for_bit(
    tokens: int, shape: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    layer = MoALinear(*shape, bias=bias, dtype=dtype)
    x = torch.randn(tokens, shape[0]).to(dtype)
    expected = F.linear(x, layer.weight, layer.bias)
    assert_same(layer(x), expected)
    with torch.no_grad():
        assert_same(layer(x), expected)
    routing = Routing.from_indices([0] * tokens, num_experts=8)
    assert_same(layer(x, routing=routing), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("score_func", "norm"), FLAGS)
def test_forward(isa: str, dtype: torch.dtype, score_func: str, norm: bool) -> None:
    layer = make_layer(dtype=dtype, score_func=score_func, norm_topk_prob=norm)
    for shape in ((1, 48), (3, 48), (2, 30, 48), (2, 3, 4, 48), (0, 48), (2, 0, 48)):
        x = torch.randn(shape).to(dtype)
        y = layer(x)
        assert y.shape == (*shape[:-1], 40)
        assert y.dtype == dtype
        assert_close(y, expected_output(layer, x))
        with torch.no_grad():
            assert_same(layer(x), y)
    vector = torch.randn(48).to(dtype)
    assert torch.equal(layer(vector), layer(vector[None])[0])


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 1, "top_k": 1},
        {"num_experts": 3, "top_k": 3, "r": 1, "bias": False},
        {"num_experts": 64, "r": 3, "use_rslora": True},
        {"num_experts": 65, "top_k": 1, "r": 64},
        {"num_experts": 513, "top_k": 4, "r": 4, "lora_alpha": 1},
    ],
)
def test_options(options: dict[str, object]) -> None:
    layer = make_layer(33, 65, **options)
    x = torch.randn(70, 33, requires_grad=True)
    assert_close(layer(x), expected_output(layer, x))
    alpha, r = options.get("lora_alpha", 32), options.get("r", 16)
    assert layer.scaling == alpha / (math.sqrt(r) if options.get("use_rslora") else r)


PARTS = ("x", "lora_A", "lora_B", "router.weight", "weight", "bias")


@pytest.mark.parametrize("wanted", subsets(PARTS), ids="-".join)
def test_every_subset_of_gradients(wanted: tuple[str, ...]) -> None:
    layer = make_layer()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in wanted)
    x = torch.randn(2, 25, 48, requires_grad="x" in wanted)
    inputs = {"x": x, **dict(layer.named_parameters())}
    grad = torch.randn(2, 25, 40)
    y = layer(x)
    grads = torch.autograd.grad(y, [inputs[name] for name in wanted], grad, retain_graph=True)
    again = torch.autograd.grad(y, [inputs[name] for name in wanted], grad)

    exact = {name: t.detach().double().requires_grad_(name in wanted) for name, t in inputs.items()}
    order = ("x", "weight", "bias", "lora_A", "lora_B", "router.weight")
    expected = reference.moa_linear(*[exact[name] for name in order], 2, scaling=layer.scaling)
    wants = torch.autograd.grad(expected, [exact[name] for name in wanted], grad.double())
    for name, have, second, want in zip(wanted, grads, again, wants, strict=True):
        assert torch.equal(have, second)
        # The router's part is a difference of large numbers: errors of rounding show more.
        assert error(have, want) < (5e-6 if name == "router.weight" else 1e-6), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("score_func", "norm"), FLAGS)
def test_backward(isa: str, dtype: torch.dtype, score_func: str, norm: bool) -> None:
    layer = make_layer(dtype=dtype, score_func=score_func, norm_topk_prob=norm)
    x = torch.randn(60, 48).to(dtype).requires_grad_()
    grad = torch.randn(60, 40).to(dtype)
    names = ["lora_A", "lora_B", "router.weight"]
    trained = [layer.get_parameter(name) for name in names]
    grads = torch.autograd.grad(layer(x), [x, *trained], grad)

    exact = copy.deepcopy(layer).double()
    exact_x = x.detach().double().requires_grad_()
    flags = {"score_func": score_func, "norm_topk_prob": norm, "scaling": layer.scaling}
    adapters = [exact.get_parameter(name) for name in names]
    y = reference.moa_linear(exact_x, exact.weight, exact.bias, *adapters, 2, **flags)
    for name, have, want in zip(
        ["x", *names], grads, torch.autograd.grad(y, [exact_x, *adapters], grad.double()), strict=True
    ):
        limit = TOLERANCE[dtype]
        if name == "router.weight":
            assert have.dtype == torch.float32
            limit = max(5 * limit, 2e-6)  # a difference of large numbers, and float32 even under float64
        assert error(have, want) < limit, name


def test_layouts_of_x_and_of_its_gradient() -> None:
    layer = make_layer()
    x = torch.randn(30, 48)
    y = layer(x)
    assert_same(layer(x.t().contiguous().t()), y)
    assert_same(layer(x.view(5, 6, 48).transpose(0, 1)), y.view(5, 6, 40).transpose(0, 1))
    assert_close(layer(x[:1].expand(30, 48)), expected_output(layer, x[:1].expand(30, 48)))
    x = x.requires_grad_()
    y = layer(x)
    (expected,) = torch.autograd.grad(y, x, torch.ones(30, 40), retain_graph=True)
    (summed,) = torch.autograd.grad(y.sum(), x, retain_graph=True)  # its gradient is one number, expanded
    assert_same(summed, expected)
    (transposed,) = torch.autograd.grad(y, x, torch.ones(40, 30).t())
    assert_same(transposed, expected)


def test_float32_adapters_under_a_low_precision_base() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        layer = MoALinear.from_linear(nn.Linear(48, 40, dtype=dtype), dtype=torch.float32)
        nn.init.normal_(layer.lora_B)
        x = torch.randn(30, 48).to(dtype).requires_grad_()
        y = layer(x)
        assert y.dtype == dtype
        assert_close(y, expected_output(layer, x))
        y.backward(torch.randn_like(y))
        assert x.grad.dtype == dtype
        assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- routing


def test_a_given_routing_and_its_own_agree() -> None:
    for dtype in DTYPES:
        layer = make_layer(dtype=dtype)
        x = torch.randn(2, 15, 48).to(dtype)
        _, routing = layer.route(x)
        assert torch.equal(layer(x, routing=routing), layer(x))


def test_one_routing_serves_many_layers() -> None:
    q, v = make_layer(48, 40), make_layer(48, 24)
    v.router = None
    x = torch.randn(10, 48, requires_grad=True)
    _, routing = q.route(x)
    (q(x, routing=routing).sum() + v(x, routing=routing).square().sum()).backward()
    assert q.router.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no router"):
        v(x)


def test_gradients_reach_logits_through_a_routing() -> None:
    layer = make_layer()
    x, logits = torch.randn(20, 48), torch.randn(20, 8, requires_grad=True)
    y = layer(x, routing=topk_routing(logits, 2, norm_topk_prob=False))
    grad = torch.randn_like(y)
    (have,) = torch.autograd.grad(y, logits, grad)
    z = logits.detach().double().requires_grad_()
    weights, _, offsets, order = reference.topk_routing(z, 2, 0, False)
    p = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    expected, _ = reference.segment_lora(
        x.double(), p["lora_A"], p["lora_B"], weights, offsets, order, None, layer.scaling
    )
    (want,) = torch.autograd.grad(expected, z, grad.double())
    assert error(have, want) < 5e-6


def test_masked_tokens_get_the_base_alone() -> None:
    layer = make_layer()
    x, mask = torch.randn(3, 10, 48), torch.rand(3, 10) < 0.6
    y = layer(x, mask=mask)
    assert_close(y, expected_output(layer, x, mask))
    base = F.linear(x, layer.weight, layer.bias)
    assert_close(y[~mask], base[~mask].double())
    assert torch.equal(layer(x, mask=torch.ones_like(mask)), layer(x))


def test_sequence_routing_decides_once_per_row() -> None:
    layer = make_layer(routing_level="sequence")
    x = torch.randn(4, 9, 48)
    logits, routing = layer.route(x)
    assert_close(logits, x.double().mean(1) @ layer.router.weight.detach().double().t())
    expected = topk_routing(logits, 2, norm_topk_prob=True)
    assert torch.equal(routing.indices, expected.indices.repeat_interleave(9, 0))
    y = layer(x)
    assert torch.equal(y, layer(x, routing=expected.repeat(9)))
    assert not torch.equal(y, make_layer()(x))


def test_sequence_routing_pools_over_the_mask() -> None:
    layer = make_layer(routing_level="sequence")
    x, lengths = torch.randn(3, 8, 48), torch.tensor([8, 5, 0])
    mask = torch.arange(8) < lengths[:, None]
    y = layer(x, mask=mask)
    assert_close(layer(x[1:2, :5])[0], y[1, :5].double())
    x[~mask] = math.nan  # padding counts nowhere, whatever it holds
    assert torch.equal(layer(x, mask=mask)[mask], y[mask])
    _, routing = layer.route(x, mask)
    assert (routing.indices.view(3, 8, 2)[~mask] == -1).all()
    assert (routing.indices.view(3, 8, 2)[mask] >= 0).all()


def test_sequence_routing_trains_its_router() -> None:
    layer = make_layer(routing_level="sequence", norm_topk_prob=False).double()
    x = torch.randn(3, 4, 48, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    weight = layer.router.weight

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"router.weight": weight}, (x,), {"mask": mask})

    assert torch.autograd.gradcheck(run, (x, weight))


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_top_1_renormalised_warns(score_func: str) -> None:
    with pytest.warns(UserWarning, match="teaches the router nothing"):
        MoALinear(8, 8, top_k=1, score_func=score_func)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoALinear(8, 8, top_k=1, norm_topk_prob=False)
        MoALinear(8, 8, top_k=1, num_experts=1)
        MoALinear(8, 8, top_k=2)
