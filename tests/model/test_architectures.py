"""Every kind of model: fresh adapters change nothing, by id equals PEFT, and taking out leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import MODELS, batch_of, build, fill, mixture, without_labels

from helpers import error
from moa_ops import MoAConfig, MoALinear, get_moa_model
from moa_ops.model.peft_format import write_peft_adapter

NAMES = list(MODELS)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()  # attention takes another path where a weight of the base is trainable
def test_nothing_fresh_disabled_or_by_base_id_changes_a_bit(name: str) -> None:
    base, batch = build(name), without_labels(batch_of(name))
    expected = base(**batch).logits
    model = get_moa_model(base, MoAConfig(r=4, target_modules="all-linear"))
    assert torch.equal(model(**batch).logits, expected)
    model.add_adapter("a")
    model.add_adapter("b", r=2)
    assert torch.equal(model(**batch).logits, expected)
    fill(model)
    assert error(model(**batch).logits, expected) > 1e-2
    assert torch.equal(model(**batch, adapter_names=["__base__"] * 3).logits, expected)
    assert torch.equal(model(**batch, adapter_ids=torch.tensor([-1, -1, -1])).logits, expected)
    mixed = model(**batch, adapter_names=["a", "__base__", "b"]).logits
    if name == "mixtral":  # its experts multiply the tokens of all rows in one matrix
        assert error(mixed[1], expected[1]) < 1e-6
    else:
        assert torch.equal(mixed[1], expected[1])
    assert error(mixed[0], expected[0]) > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)
    assert error(model(**batch).logits, expected) > 1e-2


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_unload_gives_the_same_modules_back(name: str) -> None:
    base, batch = build(name), without_labels(batch_of(name))
    expected = base(**batch).logits
    before = dict(base.named_modules(remove_duplicate=False))
    flags = {path: p.requires_grad for path, p in base.named_parameters()}
    pointers = {path: p.data_ptr() for path, p in base.named_parameters()}
    model = fill(get_moa_model(base, MoAConfig(r=4, target_modules="all-linear", num_experts=2)))
    assert any(isinstance(module, MoALinear) for module in base.modules())
    model(**batch)
    assert model.unload() is base
    after = dict(base.named_modules(remove_duplicate=False))
    assert list(before) == list(after)
    assert all(before[path] is after[path] for path in before)
    assert {path: p.requires_grad for path, p in base.named_parameters()} == flags
    assert {path: p.data_ptr() for path, p in base.named_parameters()} == pointers
    assert not any(module._forward_pre_hooks for module in base.modules())
    assert torch.equal(base(**batch).logits, expected)
    get_moa_model(base, MoAConfig(target_modules="all-linear"))  # and again


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("granularity", "level"),
    [
        ("block", "sequence"),
        ("block", "token"),
        ("module", "token"),
        ("module", "sequence"),
        ("model", "sequence"),
    ],
)
def test_routed_forward_and_backward(name: str, granularity: str, level: str) -> None:
    model = mixture(
        name, router_granularity=granularity, routing_level=level, top_k=2, router_aux_loss_coef=0.1
    )
    model.set_trainable(experts=True, router=True)
    batch, ids = batch_of(name), torch.tensor([0, 2, 1])
    out = model(**batch, domain_ids=ids)
    assert set(out.moa_losses) == {"lm", "router", "balance"}
    torch.testing.assert_close(out.loss, sum(out.moa_losses.values()))
    out.loss.backward()
    for path, layer in model.layers.items():
        assert layer.lora_A.grad.abs().sum() > 0, path
        assert layer.lora_B.grad.abs().sum() > 0, path
    for site, router in model.routers.items():
        assert router.weight.grad.abs().sum() > 0, site


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "qwen3_moe"])
def test_by_id_equals_peft(name: str, tmp_path: Path) -> None:
    """In float64, as float32 through a whole model may round by more than 1e-6 on either side; but what
    multiplies the experts of qwen3_moe has no float64.
    """
    peft = pytest.importorskip("peft")
    dtype, limit = (torch.float32, 5e-6) if name == "qwen3_moe" else (torch.float64, 1e-6)
    model, batch = mixture(name, top_k=1), without_labels(batch_of(name))
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    for adapter in model.adapters:
        write_peft_adapter(tmp_path / adapter, model.adapter_data(adapter))
    model.to(dtype)
    ours = {adapter: model(**batch, adapter_names=[adapter] * 3).logits for adapter in model.adapters}
    mixed = model(**batch, adapter_names=["c", "__base__", "a"]).logits
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "a", adapter_name="a")
    for adapter in model.adapters[1:]:
        theirs.load_adapter(tmp_path / adapter, adapter)
    theirs.to(dtype)
    for adapter in model.adapters:
        theirs.set_adapter(adapter)
        expected = theirs(**batch).logits
        assert error(ours[adapter], expected) < limit, adapter
        row = {"a": 2, "c": 0}.get(adapter)
        if row is not None:
            assert error(mixed[row], expected[row]) < limit, adapter


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_one_adapter_routed_is_plain_lora(name: str) -> None:
    """The gate of a router over one adapter is exactly 1: routed, by id and set give the same bits."""
    model, batch = mixture(name, adapters=("a",)), without_labels(batch_of(name))
    routed = model(**batch).logits
    assert torch.equal(routed, model(**batch, adapter_names=["a"] * 3).logits)
    model.set_adapter("a")
    assert torch.equal(routed, model(**batch).logits)


def test_the_base_is_shared_not_copied() -> None:
    base = build("llama")
    pointers = {p.data_ptr() for p in base.parameters()}
    model = get_moa_model(base, MoAConfig(target_modules="all-linear", num_experts=3))
    added = [p for p in model.parameters() if p.data_ptr() not in pointers]
    sizes = model.num_parameters_by_kind()
    assert sum(p.numel() for p in added) == sizes["adapters"] + sizes["routers"]
    assert set(base.state_dict()) >= set(build("llama").state_dict())  # the base's own names stay


def test_a_shared_linear_is_adapted_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first
            self.third = nn.Linear(8, 8)
            self.third.weight = self.first.weight  # tied weights, but a module of its own

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(self.second(self.first(x)))

    base = Shared()
    original = base.first
    model = get_moa_model(base, MoAConfig(r=2, target_modules="all-linear", router_granularity="module"))
    model.add_adapter("a")
    assert sorted(model.layers) == ["first", "third"]
    assert base.first is base.second
    assert base.first.weight is base.third.weight
    fill(model)
    model(torch.randn(4, 8)).sum().backward  # noqa: B018
    model.unload()
    assert base.first is original
    assert base.second is original


def test_experts_of_a_moe_are_left_alone() -> None:
    """Fused experts are 3-D parameters, no linears; the model's own router keeps its output's name."""
    model = mixture("mixtral")
    assert not any("experts" in path for path in model.layers)
    out = model(**batch_of("mixtral"), output_router_logits=True)
    assert out.router_logits is not None
    assert set(out.moa_router_logits) == {"model.layers.0", "model.layers.1"}


def test_wrapping_twice_is_an_error() -> None:
    model = mixture("llama")
    with pytest.raises(ValueError, match="already holds"):
        get_moa_model(model.base_model, MoAConfig())
