"""Adapters of a model combined: into another adapter, into the base and out again, with learned weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import TARGETS, inputs
from torch import Tensor, nn
from zoo import build

from helpers import error
from moa_ops import MoAConfig, MoAModel, get_moa_model

FAMILIES = list(TARGETS)


@torch.no_grad()
def run(model: nn.Module, family: str = "llama", adapter: str | None = None) -> Tensor:
    given = inputs(family)
    names = {} if adapter is None else {"adapter_names": [adapter] * len(given["input_ids"])}
    return model(**given, **names).logits


def mixture(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> MoAModel:
    """Two adapters of different ranks, scaling rules and layers."""
    torch.manual_seed(5)
    model = get_moa_model(build(family).to(dtype), MoAConfig(target_modules=TARGETS[family], **options))
    model.add_adapter("a", r=3, lora_alpha=5)
    model.add_adapter("b", r=6, use_rslora=True, lora_alpha=2, target_modules=TARGETS[family][:2])
    for layer in model.layers.values():
        nn.init.normal_(layer.lora_B, std=0.2)
    for router in model.routers.values():
        nn.init.normal_(router.weight)
    return model.eval()


def owner(layer: Any) -> nn.Module:
    """The module whose parameter the base weight is."""
    return layer if layer.base_layer is None else layer.base_layer


def deltas(model: MoAModel, name: str) -> dict[str, Tensor]:
    return {path: f.delta(torch.float64) for path, f in model.adapter_data(name).modules.items()}


# -------------------------------------------------------------------------------------------- into an adapter


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {"svd_rank": 9}),
        ("ties", {"density": 0.5}),
        ("dare_linear", {"density": 0.5, "seed": 3}),
        ("dare_ties", {"density": 0.5, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.5}),
    ],
)
def test_add_weighted_adapter(kind: str, options: dict[str, Any]) -> None:
    model = mixture()
    before = {name: run(model, adapter=name) for name in ("a", "b", "__base__")}
    model.set_adapter_scale("b", 2.0)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "mix", kind, **options)
    model.set_adapter_scale("b", 1.0)
    assert model.adapters == ["a", "b", "mix"]
    for name, out in before.items():
        assert torch.equal(run(model, adapter=name), out)
    a, b, mix = (deltas(model, name) for name in ("a", "b", "mix"))
    if kind in ("linear", "cat", "svd"):
        for path, delta in mix.items():
            expected = 0.7 * a[path] - (0.6 * b[path] if path in b else 0.0)
            assert error(delta, expected) < 1e-6
    assert run(model, adapter="mix").isfinite().all()
    assert error(run(model, adapter="mix"), before["__base__"]) > 1e-3


def test_bad_combinations_change_nothing() -> None:
    model = mixture()
    for arguments, message in [
        ((["a", "x"], [1, 1], "mix"), "no adapter is called 'x'"),
        ((["a", "b"], [1], "mix"), "one weight per adapter"),
        ((["a", "b"], [1, 1], "b"), "already there"),
        ((["a", "b"], [1, 1], "mix", "slerp"), "combination_type"),
        ((["a", "b"], [1, 1], "mix", "ties"), "needs density"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
    with pytest.raises(TypeError, match="a list of adapter names"):
        model.add_weighted_adapter("a", [1], "mix")
    assert model.adapters == ["a", "b"]


def test_learned_weights() -> None:
    """The text was written by a mixture of the adapters; its weights are found, and nothing else changes."""
    model = mixture()
    model.add_weighted_adapter(["a", "b"], [1.5, -0.5], "author")
    given = inputs("llama", rows=16, length=20)
    teacher = run_logits(model, given, "author")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss_of(name: str) -> float:
        return nn.functional.mse_loss(run_logits(model, given, name), teacher).item()

    model.base_model.loss_function = lambda logits, **_: nn.functional.mse_loss(logits, teacher)
    batches = [{**given, "labels": given["input_ids"]}]
    weights = model.learn_adapter_weights(["a", "b"], batches, steps=60, lr=0.1)
    assert weights == pytest.approx([1.5, -0.5], abs=0.1)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
    model.add_weighted_adapter(["a", "b"], weights, "learned")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "uniform")
    assert loss_of("learned") < 0.05 * loss_of("uniform")
    with pytest.raises(ValueError, match="batches is empty"):
        model.learn_adapter_weights(["a"], [])
    with pytest.raises(ValueError, match="one weight per adapter"):
        model.learn_adapter_weights(["a"], batches, initial=[1, 2])


@torch.no_grad()
def run_logits(model: MoAModel, given: dict[str, Tensor], name: str) -> Tensor:
    return model(**given, adapter_names=[name] * len(given["input_ids"])).logits


# ---------------------------------------------------------------------------------------------- into the base


@pytest.mark.parametrize("keep_original", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_back(family: str, keep_original: bool) -> None:
    model = mixture(family)
    outs = {name: run(model, family, name) for name in ("a", "b", "__base__")}
    routed = run(model, family)
    weights = {path: owner(layer).weight for path, layer in model.layers.items()}
    copies = {path: weight.clone() for path, weight in weights.items()}
    model.merge_adapter(["a"], keep_original=keep_original)
    assert error(run(model, family), outs["a"]) < 1e-5
    assert error(run(model, family, "b"), outs["a"]) < 1e-5  # no adapter acts beside what is merged
    assert all(torch.equal(weight, copies[path]) for path, weight in weights.items())
    with pytest.raises(ValueError, match="merged into the base already"):
        model.merge_adapter(["b"])
    model.unmerge_adapter()
    for name, out in outs.items():
        again = run(model, family, name)
        assert torch.equal(again, out) if keep_original else error(again, out) < 1e-5
    assert torch.equal(run(model, family), routed) or not keep_original
    if keep_original:
        for path, layer in model.layers.items():
            assert owner(layer).weight is weights[path]
    with pytest.raises(ValueError, match="nothing is merged"):
        model.unmerge_adapter()


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_and_unload(family: str) -> None:
    model = mixture(family)
    model.set_adapter_scale("b", 0.5)
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "mix")
    expected = run(model, family, "mix")
    merged = model.merge_and_unload(["a", "b"], [0.5, 2.0])
    assert error(run(merged, family), expected) < 1e-5
    plain = build(family)
    assert type(merged) is type(plain)
    assert [name for name, _ in merged.named_modules()] == [name for name, _ in plain.named_modules()]
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in merged.parameters())
    assert error(run(build(family), family), expected) > 1e-4


def test_merge_and_unload_by_default(tmp_path: Path) -> None:
    model = mixture()
    with pytest.raises(ValueError, match="say which of the adapters"):
        model.merge_and_unload()
    expected = run(model, adapter="b")
    model.set_adapter("b")
    merged = model.merge_and_unload()
    assert error(run(merged), expected) < 1e-5
    merged.save_pretrained(tmp_path)
    assert error(run(type(merged).from_pretrained(tmp_path).eval()), expected) < 1e-5


def test_merging_in_bfloat16_rounds_once() -> None:
    model = mixture(dtype=torch.bfloat16)
    expected = {
        path: (model.layers[path].weight.double() + delta).to(torch.bfloat16)
        for path, delta in deltas(model, "a").items()
    }
    model.merge_adapter(["a"])
    for path, weight in expected.items():
        assert (model.layers[path].weight != weight).float().mean() < 0.01  # ties of float32's own rounding


@pytest.mark.parametrize("keep_original", [True, False])
def test_tied_embeddings_stay_when_the_head_is_merged(keep_original: bool) -> None:
    model = get_moa_model(build("gpt2"), MoAConfig(target_modules=["lm_head"], router_granularity="module"))
    model.add_adapter("a", r=2)
    nn.init.normal_(model.layers["lm_head"].lora_B)
    expected, embedding = run(model, "gpt2", "a"), model.base_model.transformer.wte.weight
    before = embedding.clone()
    model.merge_adapter(["a"], keep_original=keep_original)
    assert error(run(model, "gpt2"), expected) < 1e-5
    assert torch.equal(embedding, before)
    model.unmerge_adapter()
    assert model.layers["lm_head"].weight is embedding


def test_merges_that_cannot_be_change_nothing() -> None:
    model = mixture(dtype=torch.float16)
    model.layers["model.layers.1.mlp.down_proj"].lora_B.data[0] *= 1e6
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"down_proj that are not finite"):
        model.merge_adapter(["a"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.merged is None


def test_merged_options() -> None:
    model = mixture()
    model.add_weighted_adapter(["a", "b"], [1, 1], "ties", "ties", density=0.5)
    expected = run(model, adapter="ties")
    model.merge_adapter(["a", "b"], combination_type="ties", density=0.5)
    assert error(run(model), expected) < 1e-5
