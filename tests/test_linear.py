"""MoALinear: the equation, the base bit for bit, routing levels, masks, dtypes, state."""

from __future__ import annotations

import copy
import io
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import DTYPES, TOLERANCE, assert_close, error, subsets
from moa_ops import MoALinear, Routing, reference, topk_routing
from moa_ops.linear import Router

FLAGS = list(itertools.product(["softmax", "sigmoid"], [False, True]))


def make_layer(*sizes: int, dtype: torch.dtype = torch.float32, **options: object) -> MoALinear:
    """A layer whose adapters do something: lora_B starts at zero, so it is drawn anew."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # top-1 renormalised: see test_top_1_renormalised_warns
        layer = MoALinear(*(sizes or (48, 40)), dtype=dtype, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def expected_output(layer: MoALinear, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The layer's equation in float64, routed per token."""
    p = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    return reference.moa_linear(
        x.double(),
        p["weight"],
        p.get("bias"),
        p["lora_A"],
        p["lora_B"],
        p["router.weight"],
        layer.top_k,
        score_func=layer.score_func,
        norm_topk_prob=layer.norm_topk_prob,
        scaling=layer.scaling,
        mask=mask,
    )


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
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    routing = Routing.from_indices([0] * tokens, num_experts=8)
    assert torch.equal(layer(x, routing=routing), expected)


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
            assert torch.equal(layer(x), y)
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
    assert torch.equal(layer(x.t().contiguous().t()), y)
    assert torch.equal(layer(x.view(5, 6, 48).transpose(0, 1)), y.view(5, 6, 40).transpose(0, 1))
    assert_close(layer(x[:1].expand(30, 48)), expected_output(layer, x[:1].expand(30, 48)))
    x = x.requires_grad_()
    y = layer(x)
    (expected,) = torch.autograd.grad(y, x, torch.ones(30, 40), retain_graph=True)
    (summed,) = torch.autograd.grad(y.sum(), x, retain_graph=True)  # its gradient is one number, expanded
    assert torch.equal(summed, expected)
    (transposed,) = torch.autograd.grad(y, x, torch.ones(40, 30).t())
    assert torch.equal(transposed, expected)


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
