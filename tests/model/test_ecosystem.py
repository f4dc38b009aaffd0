"""Autocast, torch.compile and quantised bases, as users switch them on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import batch_of, build, fill, mixture, without_labels

from helpers import error
from moa_ops import MoAConfig, MoAModel, get_moa_model

BY_ID = {"adapter_names": ["a", "__base__", "c"]}
ROUTED = {"domain_ids": torch.tensor([0, 1, 2])}


def gradients(model: MoAModel, family: str = "llama", **given: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch_of(family), **given).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trainable(family: str = "llama", **config: Any) -> MoAModel:
    model = mixture(family, router_aux_loss_coef=0.1, router_z_loss_coef=0.1, **config).train()
    model.set_trainable(experts=True, router=True)
    return model


# --------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("given", [BY_ID, ROUTED], ids=["by id", "routed"])
def test_autocast(given: dict[str, Any]) -> None:
    """bfloat16 inside, float32 routers and gradients; near the exact numbers."""
    model = trainable()
    exact, exact_grads = gradients(model, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grads = gradients(model, **given)
    assert loss == pytest.approx(exact, rel=2e-2)
    assert loss != exact
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    adapters = [name for name in grads if "lora_B" in name]
    assert sum(error(grads[name], exact_grads[name]) for name in adapters) / len(adapters) < 0.2


def test_a_bfloat16_base_with_float32_adapters() -> None:
    model = trainable()
    half = get_moa_model(build("llama").to(torch.bfloat16), model.moa_config)
    for name in model.adapters:
        half.insert_adapter(model.adapter_data(name), name)
    assert {p.dtype for n, p in half.named_parameters() if "lora_" in n or "routers" in n} == {torch.float32}
    with torch.no_grad():
        for name in (*model.adapters, "__base__"):
            given = {**without_labels(batch_of("llama")), "adapter_names": [name] * 3}
            assert error(half(**given).logits, model(**given).logits) < 5e-2


# ---------------------------------------------------------------------------------------------------- compile


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiled_training(fresh_compiler: None) -> None:
    """Losses and gradients of a routed transformer are those of the model as it is."""
    model = trainable(top_k=2)
    loss, expected = gradients(model, **ROUTED)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    out = compiled(**batch_of("llama"), **ROUTED)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert error(grad, expected[name]) < 1e-5, name


# -------------------------------------------------------------------------------------------- quantised bases


def int8_base() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    base = build("llama")
    torchao.quantize_(base.model.layers, torchao.Int8WeightOnlyConfig())
    return base


@pytest.fixture
def quantised() -> MoAModel:
    model = get_moa_model(int8_base(), MoAConfig(r=4, target_modules="all-linear"))
    for name in "abc":
        model.add_adapter(name)
    return fill(model).eval()


def dense_weights(model: MoAModel) -> dict[str, Tensor]:
    return {
        path: (layer.weight if layer.base_layer is None else layer.base_layer.weight).dequantize()
        for path, layer in model.layers.items()
    }


def test_an_int8_base_is_adapted(quantised: MoAModel) -> None:
    """Outputs are those of the dequantised base with the same adapters."""
    plain = build("llama")
    with torch.no_grad():
        for path, weight in dense_weights(quantised).items():
            plain.get_submodule(path).weight.copy_(weight)
    reference = get_moa_model(plain, quantised.moa_config)
    for name in quantised.adapters:
        reference.insert_adapter(quantised.adapter_data(name), name)
    given = without_labels(batch_of("llama"))
    with torch.no_grad():
        for names in (["a"] * 3, ["c", "__base__", "b"]):
            ours = quantised(**given, adapter_names=names).logits
            assert error(ours, reference(**given, adapter_names=names).logits) < 1e-5
        out = quantised.base_model
        with quantised.disable_adapter():
            base = quantised(**given).logits
        assert torch.equal(base, out(**given).logits)


def test_an_int8_base_trains_and_saves(quantised: MoAModel, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    before = {path: weight.clone() for path, weight in dense_weights(quantised).items()}
    quantised.train()
    quantised.set_trainable(experts=True, router=True)
    optimizer = torch.optim.AdamW(quantised.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = quantised(**batch_of("llama"), **ROUTED).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(weight, before[path]) for path, weight in dense_weights(quantised).items())
    quantised.save_pretrained(tmp_path)
    again = MoAModel.from_pretrained(int8_base(), tmp_path).eval()
    given = without_labels(batch_of("llama"))
    with torch.no_grad():
        assert torch.equal(again(**given).logits, quantised.eval()(**given).logits)
    state = quantised.state_dict()
    assert not any("weight" in name and "routers" not in name for name in state)


def test_an_int8_base_refuses_merges(quantised: MoAModel) -> None:
    with pytest.raises(ValueError, match="nothing can be merged exactly"):
        quantised.merge_adapter(["a"])
    assert quantised.merged is None


def test_a_bitsandbytes_base() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = build("llama")
    for layer in base.model.layers:
        for name in ("gate_proj", "up_proj"):
            old = getattr(layer.mlp, name)
            new = bnb.nn.Linear4bit(
                old.in_features, old.out_features, bias=False, compute_dtype=torch.float32
            )
            new.load_state_dict(old.state_dict())
            setattr(layer.mlp, name, new.to("cuda" if torch.cuda.is_available() else "cpu"))
    model = get_moa_model(base, MoAConfig(r=4, target_modules=["gate_proj", "up_proj"]))
    for name in "abc":
        model.add_adapter(name)
    fill(model)
    given = without_labels(batch_of("llama"))
    with torch.no_grad():
        out = model(**given, adapter_names=["a", "__base__", "c"]).logits
        with model.disable_adapter():
            plain = model(**given).logits
    assert out.isfinite().all()
    assert torch.equal(out[1], plain[1])
    assert error(out[0], plain[0]) > 1e-3
    with pytest.raises(ValueError, match="nothing can be merged exactly"):
        model.merge_adapter(["a"])


# ----------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: m.double().float(), lambda m: m.to("cpu")])
def test_copies_and_conversions_keep_outputs(change: Callable[[MoAModel], MoAModel]) -> None:
    model = mixture()
    given = without_labels(batch_of("llama"))
    with torch.no_grad():
        expected = model(**given).logits
        assert torch.equal(change(model)(**given).logits, expected)
