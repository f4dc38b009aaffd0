"""MoALinear in a model: dropout, autocast, wrapped layers, dtypes, devices, state, training."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import assert_close, error, expected_output, make_layer
from moa_ops import MoALinear
from moa_ops.linear import Router

# --------------------------------------------------------------------------------------- dropout and autocast


def test_dropout_is_of_the_adapters_input_in_training() -> None:
    layer = make_layer(lora_dropout=0.5)
    plain = make_layer()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(30, 48)
    layer.eval()
    assert torch.equal(layer(x), plain(x))
    layer.train()
    torch.manual_seed(3)
    y = layer(x)
    assert not torch.equal(y, plain(x))
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    _, routing = plain.route(x)
    adapters = plain(dropped, routing=routing) - F.linear(dropped, layer.weight, layer.bias)
    assert error(y, F.linear(x, layer.weight, layer.bias) + adapters) < 1e-5


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(weights_dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    """Base and adapters in bfloat16, routing from x as it comes, decided in float32."""
    layer = make_layer(dtype=weights_dtype)
    x = torch.randn(2, 30, 48, dtype=x_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        logits, routing = layer.route(x)
        with torch.no_grad():
            assert torch.equal(layer(x), y)
        assert torch.equal(layer(x, routing=routing), y)
        assert F.linear(x, layer.weight, layer.bias).dtype == y.dtype
        assert layer.router(x).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert logits.dtype == routing.weights.dtype == torch.float32
    assert_close(logits, (x.double() @ layer.router.weight.double().t()).flatten(0, 1))
    assert_close(y, expected_output(layer, x))
    y.backward(torch.randn_like(y))
    for tensor in (x, layer.lora_A, layer.lora_B, layer.router.weight):
        assert tensor.grad.dtype == tensor.dtype


def test_autocast_leaves_float64_alone() -> None:
    layer = make_layer(dtype=torch.float64)
    x = torch.randn(5, 48, dtype=torch.float64)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, routing = layer.route(x)
        assert torch.equal(layer(x, routing=routing), expected)


# ----------------------------------------------------------------------------------------- from_linear, state


def test_from_linear_shares_the_weight() -> None:
    linear = nn.Linear(48, 40)
    layer = MoALinear.from_linear(linear, num_experts=3, r=4)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    x = torch.randn(5, 48)
    assert torch.equal(layer(x), linear(x))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
        "router.weight",
    }
    assert MoALinear.from_linear(nn.Linear(8, 8, dtype=torch.bfloat16)).lora_A.dtype == torch.bfloat16
    assert MoALinear.from_linear(nn.Linear(8, 8, bias=False)).bias is None


class Int8Linear(nn.Module):
    """A quantised linear, as those of bitsandbytes or torchao: integers and a scale per row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter(
            (linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False
        )
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * self.scale).to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing_level", ["token", "sequence"])
def test_from_linear_wraps_other_modules(routing_level: str, dtype: torch.dtype) -> None:
    base = Int8Linear(nn.Linear(48, 40))
    layer = MoALinear.from_linear(base, routing_level=routing_level)
    assert layer.base_layer is base
    assert layer.weight is None
    assert layer.lora_A.dtype == torch.float32
    x = torch.randn(2, 7, 48, dtype=dtype, requires_grad=True)
    assert torch.equal(layer(x), base(x))
    nn.init.normal_(layer.lora_B)
    y = layer(x)
    _, routing = layer.route(x)
    plain = make_layer(bias=False)
    plain.weight.data = (base.weight * base.scale).data
    plain.lora_A, plain.lora_B = layer.lora_A, layer.lora_B
    assert error(y, plain(x.float(), routing=routing)) < (1e-6 if dtype == torch.float32 else 2e-2)
    y.sum().backward()
    assert layer.lora_B.grad.norm() > 0
    assert x.grad.dtype == dtype
    assert "bias" not in layer.extra_repr()


def test_from_linear_calls_what_is_not_certainly_a_linear() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(3, 8)
    doubled = Doubled(8, 8)
    assert torch.equal(MoALinear.from_linear(doubled)(x), doubled(x))
    with pytest.raises(TypeError, match="in_features and out_features"):
        MoALinear.from_linear(nn.Conv1d(8, 8, 1))


def test_parametrised_weights_are_used() -> None:
    layer = make_layer()

    class Negative(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    x = torch.randn(5, 48)
    adapters = layer(x) - F.linear(x, layer.weight, layer.bias)
    nn.utils.parametrize.register_parametrization(layer, "weight", Negative())
    assert error(layer(x), F.linear(x, layer.weight, layer.bias) + adapters) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_stays_in_float32(dtype: torch.dtype) -> None:
    model = nn.Sequential(make_layer(), make_layer(40, 48))
    before = model[0].router.weight.detach().clone()
    x = torch.randn(6, 48).to(dtype)
    converted = [
        copy.deepcopy(model).to(dtype),
        copy.deepcopy(model).to("cpu", dtype),
        copy.deepcopy(model).half() if dtype == torch.float16 else copy.deepcopy(model).bfloat16(),
    ]
    for other in converted:
        assert other[0].weight.dtype == other[0].lora_A.dtype == dtype
        assert torch.equal(other[0].router.weight, before)
        assert isinstance(other[0].router.weight, nn.Parameter)
        other(x).sum().backward()
        assert other[0].router.weight.grad.dtype == torch.float32
        other.to(dtype)  # gradients are converted along
        assert other[0].router.weight.grad.dtype == torch.float32
    assert MoALinear(8, 8, dtype=dtype).router.weight.dtype == torch.float32
    assert copy.deepcopy(model).double()[0].router.weight.dtype == torch.float64


def test_the_router_alone() -> None:
    router = Router(48, 8)
    assert "num_experts=8" in repr(router)
    x = torch.randn(2, 5, 48, dtype=torch.bfloat16)
    router.weight.data.normal_()
    assert_close(router(x), x.double() @ router.weight.double().t())


def test_meta_device_and_materialising() -> None:
    layer = MoALinear(48, 40, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer(torch.randn(3, 48, device="meta", dtype=torch.bfloat16)).shape == (3, 40)
    source = make_layer(dtype=torch.bfloat16)
    layer = layer.to_empty(device="cpu")
    assert layer.router.weight.dtype == torch.float32
    layer.load_state_dict(source.state_dict())
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    assert torch.equal(layer(x), source(x))
    with torch.device("meta"):
        assert MoALinear(48, 40).lora_A.device.type == "meta"


def test_state_dict_copy_and_pickle() -> None:
    layer = make_layer(top_k=3, score_func="sigmoid", use_rslora=True)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B", "router.weight"}
    x = torch.randn(5, 48)
    expected = layer(x)
    other = make_layer(top_k=3, score_func="sigmoid", use_rslora=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


def test_initial_values() -> None:
    torch.manual_seed(0)
    layer = MoALinear(400, 300, num_experts=4, r=8)
    bound = 1 / math.sqrt(400)  # of a uniform distribution: a = √5 makes kaiming's gain √(1/3)
    for weight in (layer.lora_A, layer.router.weight):
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not layer.lora_B.any()
    weight = layer.weight.clone()
    nn.init.normal_(layer.lora_B)
    layer.reset_parameters()
    assert not layer.lora_B.any()
    assert torch.equal(layer.weight, weight)


def test_repr_names_the_settings() -> None:
    text = repr(MoALinear(48, 40, num_experts=5, r=4, use_rslora=True))
    for part in (
        "in_features=48",
        "num_experts=5",
        "r=4",
        "top_k=2",
        "routing_level='token'",
        "use_rslora=True",
    ):
        assert part in text


def test_it_learns() -> None:
    """Two tasks told apart by their inputs: the mixture fits both, and its router separates them."""
    torch.manual_seed(0)
    layer = MoALinear(16, 16, num_experts=2, r=4, top_k=1, norm_topk_prob=False)
    targets = torch.randn(2, 16, 16) / 4
    means = torch.randn(2, 16)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(300):
        task = torch.randint(0, 2, (64,))
        x = torch.randn(64, 16) + 2 * means[task]
        low_rank = torch.einsum("ti,tio->to", x[:, :4], targets[task][:, :4])
        loss = (layer(x) - F.linear(x, layer.weight, layer.bias) - low_rank).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20
