"""Adapters and their router rows come and go; what belongs to the others stays as it is, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo import batch_of, build, fill, mixture

from helpers import error
from moa_ops import MoAConfig, MoAModel, get_moa_model
from moa_ops.model import LoraAdapter, LoraFactors


def by_id(model: MoAModel, name: str) -> Tensor:
    with torch.no_grad():
        return model(**batch_of("llama"), adapter_names=[name] * 3).logits


def rows(model: MoAModel) -> dict[str, dict[str, Tensor]]:
    """Router rows by adapter and place."""
    found: dict[str, dict[str, Tensor]] = {}
    for site, router in model.routers.items():
        weight = router.out.weight if hasattr(router, "out") else router.weight
        for name, row in zip(model.adapters, weight.detach().clone(), strict=True):
            found.setdefault(name, {})[site] = row
    return found


@pytest.mark.parametrize("kind", ["linear", "mlp", "static"])
@pytest.mark.parametrize("gone", ["a", "b", "c"])
def test_deleting_one_leaves_the_others_to_the_bit(kind: str, gone: str) -> None:
    model = mixture(router_type=kind)
    kept = [name for name in model.adapters if name != gone]
    outputs, before = {name: by_id(model, name) for name in kept}, rows(model)
    model.delete_adapter(gone)
    assert model.adapters == kept
    assert all(torch.equal(by_id(model, name), outputs[name]) for name in kept)
    after = rows(model)
    assert all(torch.equal(after[n][site], row) for n in kept for site, row in before[n].items())
    assert torch.isfinite(model(**batch_of("llama")).loss)
    with pytest.raises(ValueError, match="no adapter is called"):
        by_id(model, gone)


def test_adding_one_leaves_the_others_to_the_bit() -> None:
    model = mixture()
    outputs, before = {name: by_id(model, name) for name in model.adapters}, rows(model)
    model.add_adapter("wide", r=9, lora_alpha=1, target_modules=["q_proj", "lm_head"])
    assert model.adapters == ["a", "b", "c", "wide"]
    assert all(torch.equal(by_id(model, name), expected) for name, expected in outputs.items())
    after = rows(model)
    assert all(torch.equal(after[n][site], row) for n in before for site, row in before[n].items())
    assert torch.equal(by_id(model, "wide"), by_id(model, "__base__"))
    assert "lm_head" in model.layers  # not among "all-linear": adapted because this adapter asks for it
    fill_one(model, "wide")
    assert not torch.equal(by_id(model, "wide"), by_id(model, "__base__"))
    assert all(torch.equal(by_id(model, name), expected) for name, expected in outputs.items())


def fill_one(model: MoAModel, name: str) -> None:
    data = model.adapter_data(name)
    modules = {
        path: LoraFactors(f.A, torch.randn(f.B.shape), f.lora_alpha) for path, f in data.modules.items()
    }
    model.replace_adapter(LoraAdapter(modules), name)


def test_replacing_one_leaves_the_others_to_the_bit() -> None:
    model = mixture()
    outputs, before = {name: by_id(model, name) for name in model.adapters}, rows(model)
    model.set_adapter_scale("b", 0.5)
    path = "model.layers.0.self_attn.q_proj"
    model.replace_adapter(LoraAdapter({path: LoraFactors(torch.randn(7, 32), torch.randn(32, 7), 3.0)}), "b")
    assert [layer.slots[1].r for layer in model.layers.values()].count(0) == len(model.layers) - 1
    assert model.layers[path].slots[1].scaling == pytest.approx(0.5 * 3 / 7)
    for name in ("a", "c"):
        assert torch.equal(by_id(model, name), outputs[name])
    after = rows(model)
    assert all(torch.equal(after[n][site], row) for n in before for site, row in before[n].items())


def test_scale_is_linear_and_1_and_0_are_exact() -> None:
    model = mixture(target_modules=["lm_head"], exclude_modules=None)
    base, one = by_id(model, "__base__"), by_id(model, "b")
    model.set_adapter_scale("b", 0.5)
    assert error(by_id(model, "b"), (base + one) / 2) < 1e-6
    model.set_adapter_scale("b", 0)
    assert torch.equal(by_id(model, "b"), base)
    model.set_adapter_scale("b", 1)
    assert torch.equal(by_id(model, "b"), one)
    with pytest.raises(ValueError, match="finite"):
        model.set_adapter_scale("b", float("nan"))


def test_renaming_keeps_everything() -> None:
    model = mixture()
    expected, routed = by_id(model, "b"), model(**batch_of("llama")).logits
    model.set_adapter("b")
    model.rename_adapter("b", "beta")
    assert model.active_adapter == "beta"
    model.set_adapter(None)
    assert model.adapters == ["a", "beta", "c"]
    assert torch.equal(by_id(model, "beta"), expected)
    assert torch.equal(model(**batch_of("llama")).logits, routed)
    with pytest.raises(ValueError, match="already there"):
        model.rename_adapter("beta", "a")
    with pytest.raises(ValueError, match="cannot name an adapter"):
        model.rename_adapter("beta", "../beta")


def test_deleting_the_set_adapter_hands_back_to_the_routers() -> None:
    model = mixture()
    model.set_adapter("b")
    model.delete_adapter("b")
    assert model.active_adapter is None
    assert not any("active_" in name for name, _ in model.named_parameters())


def test_deleting_another_while_one_is_set_keeps_what_it_learned() -> None:
    model = mixture()
    model.set_adapter("c")
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.1)
    expected = model(**batch_of("llama")).logits
    model.delete_adapter("a")
    assert torch.equal(model(**batch_of("llama")).logits, expected)
    assert model.trainable_parameters()
    model.set_adapter(None)
    assert torch.equal(by_id(model, "c"), expected)


def test_all_adapters_gone_is_the_base() -> None:
    model = mixture()
    base = by_id(model, "__base__")
    for name in list(model.adapters):
        model.delete_adapter(name)
    assert torch.equal(model(**batch_of("llama")).logits, base)
    model.add_adapter("new")
    fill(model)
    assert not torch.equal(model(**batch_of("llama")).logits, base)


def test_data_goes_round() -> None:
    model = mixture()
    other = get_moa_model(build("llama"), MoAConfig(r=1, target_modules=["q_proj"]))
    for name in model.adapters:
        other.insert_adapter(model.adapter_data(name), name)
    assert all(torch.equal(by_id(model, name), by_id(other, name)) for name in model.adapters)


def test_adapters_that_do_not_fit_change_nothing() -> None:
    model = mixture()
    before, expected = dict(model.layers), by_id(model, "b")
    good = LoraFactors(torch.randn(2, 32), torch.randn(32, 2), 1.0)
    path = "model.layers.0.self_attn.q_proj"
    for modules, message in (
        ({}, "empty"),
        ({path: good, "model.layers.9.self_attn.q_proj": good}, "made for another model"),
        ({path: LoraFactors(torch.randn(2, 31), torch.randn(32, 2), 1.0)}, "that linear takes"),
        ({path: LoraFactors(torch.randn(2, 32), torch.randn(32, 3), 1.0)}, "that linear takes"),
        ({"model.norm": good}, "no linears"),
    ):
        with pytest.raises(ValueError, match=message):
            model.insert_adapter(LoraAdapter(modules), "new")
        with pytest.raises(ValueError, match=message):
            model.replace_adapter(LoraAdapter(modules), "b")
    with pytest.raises(ValueError, match="already there"):
        model.insert_adapter(LoraAdapter({path: good}), "b")
    with pytest.raises(ValueError, match="stands for the base"):
        model.add_adapter("__base__")
    with pytest.raises(ValueError, match="at least 1"):
        model.add_adapter("none", r=0)
    assert model.layers == before
    assert model.adapters == ["a", "b", "c"]
    assert torch.equal(by_id(model, "b"), expected)


def test_patterns_give_ranks_and_alphas() -> None:
    config = MoAConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
        alpha_pattern={"layers.0.self_attn.q_proj": 5},
        num_experts=1,
    )
    model = get_moa_model(build("llama"), config)
    slots = {path: layer.slots[0] for path, layer in model.layers.items()}
    base = "model.layers.{}.self_attn.{}"
    assert [slots[base.format(i, p)].r for i in (0, 1) for p in ("q_proj", "v_proj")] == [4, 2, 3, 2]
    assert slots[base.format(0, "q_proj")].scaling == pytest.approx(5 / 2)
    assert slots[base.format(1, "q_proj")].scaling == pytest.approx(8 / 3**0.5)
